"""The mask against its drawings and its definition, and the block ranges against brute force."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax.masks import Band, seeing, sees_any, visible, visible_blocks

BANDS = [Band(left, right) for left in (None, 0, 1, 5, 40) for right in (None, 0, 1, 5, 40)]


def sees(i, j, query_length, key_length, band: Band) -> bool:
    """The definition, one pair at a time."""
    p = key_length - query_length + i
    left = band.left is None or p - band.left <= j
    right = band.right is None or j <= p + band.right
    return i < query_length and j < key_length and left and right


@pytest.mark.parametrize(
    ("drawing", "band"),
    [
        (["###..", "####.", "#####"], Band(right=0)),
        (["...", "...", "#..", "##.", "###"], Band(right=0)),
        ([".##...", "..##..", "...##.", "....##"], Band(1, 0)),
    ],
)
def test_the_drawings(drawing, band):
    drawn = np.array([[mark == "#" for mark in row] for row in drawing])
    T, S = drawn.shape
    np.testing.assert_array_equal(visible(np.arange(T)[:, None], np.arange(S), T, S, band), drawn)


def test_band_of_options():
    assert Band.of(False, None) == Band(None, None)
    assert Band.of(True, None) == Band(None, 0)
    assert Band.of(False, 3) == Band(3, 3)
    assert Band.of(False, (3, None)) == Band(3, None)
    assert Band.of(True, (3, 5)) == Band(3, 0)
    assert Band(2, 7).transposed == Band(7, 2)


@pytest.mark.parametrize("band", BANDS, ids=str)
def test_visible_and_sees_any(band):
    T, S = 9, 11
    i, j = np.arange(T), np.arange(S)
    for query_length in range(T + 1):
        for key_length in range(S + 1):
            expected = np.array([[sees(a, b, query_length, key_length, band) for b in j] for a in i])
            got = visible(i[:, None], j, query_length, key_length, band)
            np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(visible(j[:, None], i, key_length, query_length, band.transposed), expected.T)
            np.testing.assert_array_equal(sees_any(i, query_length, key_length, band), expected.any(axis=1))
            np.testing.assert_array_equal(sees_any(j, key_length, query_length, band.transposed), expected.any(axis=0))
            first, stop = seeing(query_length, key_length, band)
            np.testing.assert_array_equal((i >= first) & (i < stop), expected.any(axis=1))


@pytest.mark.parametrize(("size", "block"), [(1, 1), (4, 4), (8, 4), (4, 8), (5, 3), (16, 16)])
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("tile_of", ["queries", "keys"])
def test_visible_blocks(tile_of, band, size, block):
    """Exactly the blocks with a visible pair are visited, and exactly those without a hidden one go without a mask."""
    axis = 33 + -33 % math.lcm(size, block)
    positions, starts, numbers = np.arange(axis), np.arange(0, axis, size), np.arange(axis // block)
    lengths = np.array([0, 1, 3, 8, 16, 31, 32, 33])
    find_blocks = _visible_blocks(band if tile_of == "queries" else band.transposed, size, block)
    for own_length, other_length in itertools.product(lengths, lengths):
        if tile_of == "queries":
            seen = visible(positions[:, None], positions, own_length, other_length, band)
        else:
            seen = visible(positions[:, None], positions, other_length, own_length, band).T
        # Rows past the length count as seeing everything, in a tile that has others.
        unmasked = (seen | (positions >= own_length)[:, None]) & (positions // size * size < own_length)[:, None]
        some = seen.reshape(starts.size, size, numbers.size, block).any(axis=(1, 3))
        every = unmasked.reshape(starts.size, size, numbers.size, block).all(axis=(1, 3))
        start, unmasked_start, unmasked_stop, stop = (np.asarray(x)[:, None] for x in find_blocks(starts, own_length, other_length))
        assert np.all((0 <= start) & (start <= unmasked_start) & (unmasked_start <= unmasked_stop) & (unmasked_stop <= stop))
        np.testing.assert_array_equal((start <= numbers) & (numbers < stop), some)
        np.testing.assert_array_equal((unmasked_start <= numbers) & (numbers < unmasked_stop), every)


@functools.cache
def _visible_blocks(band, size, block):
    def ranges(start, own_length, other_length):
        r = visible_blocks(start, size, own_length, other_length, band, block)
        return jnp.broadcast_arrays(start, r.start, r.unmasked_start, r.unmasked_stop, r.stop)[1:]

    return jax.jit(ranges)
