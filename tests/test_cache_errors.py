"""Mistakes in calls of `KVCache`: each has a typed error that says what was expected, what came, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import LENGTHS, B, H, Hv, K, L, S, array, assert_same_bits, filled, trace

from flashcore_jax import ArgumentError, DtypeError, KVCache, OptionError, ShapeError

RIGHT = {"key": array(B, 5, K, H), "value": array(B, 5, K, Hv)}
WRONG = [
    ("key without batch", {"key": array(5, K, H)}, ShapeError, "[B, T, K, H]"),
    ("another batch", {"key": array(B + 1, 5, K, H)}, ShapeError, str(B + 1)),
    ("more heads", {"value": array(B, 5, 2 * K, Hv)}, ShapeError, "[B, T, K, Hv]"),
    ("key's head dim for value", {"value": array(B, 5, K, H)}, ShapeError, "[B, T, K, Hv]"),
    ("another dtype of key", {"key": array(B, 5, K, H, dtype=jnp.bfloat16)}, DtypeError, "bfloat16"),
    ("another dtype of value", {"value": array(B, 5, K, Hv, dtype=jnp.float16)}, DtypeError, "float16"),
    ("fewer values than keys", {"value": array(B, 4, K, Hv)}, ShapeError, "(5, 4)"),
    ("no tokens", {"key": array(B, 0, K, H), "value": array(B, 0, K, Hv)}, ShapeError, "T >= 1"),
    ("a list", {"key": [[1.0]]}, ShapeError, "[B, T, K, H]"),
    ("lengths of another batch", {"query_seq_lengths": array(B - 1, dtype=jnp.int32)}, ShapeError, f"({B - 1},)"),
    ("one length", {"query_seq_lengths": array(dtype=jnp.int32)}, ShapeError, "int32[B]"),
    ("lengths as floats", {"query_seq_lengths": array(B)}, DtypeError, "float32"),
    ("a layer of none", {"layer": 0}, OptionError, "layers="),
    ("an unknown implementation", {"implementation": "cuda"}, OptionError, "'cuda'"),
]
STACKED = [
    ("no layer", {}, OptionError, "layer="),
    ("a layer too high", {"layer": L}, OptionError, str(L)),
    ("a layer too low", {"layer": -L - 1}, OptionError, str(-L - 1)),
    ("layer 1.0", {"layer": 1.0}, OptionError, "1.0"),
    ("layer True", {"layer": True}, OptionError, "True"),
    ("two layers", {"layer": array(2, dtype=jnp.int32)}, OptionError, "scalar"),
    ("a layer as a float array", {"layer": array()}, OptionError, "scalar"),
]


@pytest.mark.parametrize(
    ("layers", "changed", "error", "words"), [(None, *row[1:]) for row in WRONG] + [(L, *row[1:]) for row in STACKED],
    ids=[row[0] for row in WRONG + STACKED],
)  # fmt: skip
def test_wrong_arguments_of_append(layers, changed, error, words):
    cache = KVCache.create(B, S, K, H, value_head_dim=Hv, layers=layers, dtype=jnp.float32)
    with pytest.raises(error) as raised:
        trace(cache.append, RIGHT | changed)
    message = str(raised.value)
    assert words in message
    assert message.startswith("expected ")
    assert message.count("; got ") == 1


@pytest.mark.parametrize("layer", [L, -L - 1, jnp.int32(L), np.int32(-L - 1)], ids=repr)
def test_a_layer_that_is_not_there(layer):
    """Outside `jit`, as a number or in an array."""
    cache = KVCache.create(B, S, K, H, layers=L, dtype=jnp.float32)
    tokens = jnp.ones((B, 1, K, H))
    with pytest.raises(OptionError, match=f"expected layer from {-L} to {L - 1}; got {int(layer)}; "):
        cache.append(tokens, tokens, layer=layer)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"batch": 0}, OptionError),
        ({"batch": True}, OptionError),
        ({"capacity": 0}, OptionError),
        ({"capacity": 10.0}, OptionError),
        ({"kv_heads": 0}, OptionError),
        ({"layers": 0}, OptionError),
        ({"layers": True}, OptionError),
        ({"head_dim": 12}, ShapeError),
        ({"head_dim": 264}, ShapeError),
        ({"value_head_dim": 0}, ShapeError),
        ({"dtype": jnp.int8}, DtypeError),
        ({"dtype": None}, DtypeError),
        ({"dtype": "foo"}, DtypeError),
        ({"dtype": 16}, DtypeError),
    ],
    ids=str,
)
def test_wrong_arguments_of_create(changed, error):
    with pytest.raises(error, match=r"^expected .*; got .*; ") as raised:
        KVCache.create(**{"batch": 2, "capacity": 10, "kv_heads": 2, "head_dim": 16} | changed)
    assert isinstance(raised.value, ArgumentError)


@pytest.mark.parametrize(
    "length", [np.array([1, 2]), np.zeros((2, B), np.int32), np.zeros((L, 1, B), np.int32)], ids=lambda x: str(x.shape)
)
def test_truncate_refuses_lengths_of_another_shape(length):
    """They would give a cache whose lengths are not its rows'."""
    with pytest.raises(ArgumentError):
        filled(LENGTHS[0]).truncate(length)


@pytest.mark.parametrize("shape", [(B - 1,), (B, 1), (1, B)], ids=str)
def test_reset_refuses_masks_of_another_shape(shape):
    with pytest.raises(ArgumentError):
        filled(LENGTHS[0]).reset(np.ones(shape, bool))


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (B, OptionError, f"rows from {-B} to {B - 1}; got [{B}]"),
        (-B - 1, OptionError, f"got [{-B - 1}]"),
        (np.int64(99), OptionError, "got [99]"),
        (np.array([0, 99, -1, -99]), OptionError, "got [99, -99]"),
        (jnp.array([99, -B]), OptionError, "got [99]"),
        ([B, 0], OptionError, f"got [{B}]"),
        (2**31, OptionError, f"got [{2**31}]"),
        (np.array([2**32]), OptionError, f"got [{2**32}]"),  # in 32 bits it is row 0
        (np.uint32(2**32 - 1), OptionError, f"got [{2**32 - 1}]"),
        (None, DtypeError, "got object"),
        ("a", DtypeError, "rows as ints"),
        (1.0, DtypeError, "rows as ints, or as a mask; got float"),
        (np.array([0.0, 1.0]), DtypeError, "got float"),
    ],
    ids=str,
)
def test_reset_refuses_wrong_rows(rows, error, words):
    with pytest.raises(error) as raised:
        filled(LENGTHS).reset(rows)
    assert words in str(raised.value)


@pytest.mark.parametrize("rows", [B, -B - 1, np.array([99, 1, -99])], ids=str)
def test_reset_ignores_traced_rows_that_do_not_exist(rows):
    """Nothing can raise there; and no other row pays for it."""
    cache = filled(LENGTHS, overflowed=np.ones((L, B), bool))
    expected = cache if np.ndim(rows) == 0 else cache.reset(1)
    assert_same_bits(jax.jit(KVCache.reset)(cache, rows), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_indices_of_any_integer_type(make, dtype):
    """Of more rows and layers than int8 counts."""
    cache = KVCache.create(200, 4, 1, 8, layers=130, dtype=jnp.float32)
    index, token = make(np.array(1, dtype)), jnp.ones((200, 1, 1, 8))
    after = cache.append(token, token, layer=index)
    assert after.length.sum() == 200
    np.testing.assert_array_equal(after.length[1], 1)
    assert after.reset(index).length.sum() == 199
    assert after.reset(index[None]).length[1, 1] == 0
    traced = jax.jit(lambda layer: cache.append(token, token, layer=layer).length)
    np.testing.assert_array_equal(traced(index), after.length)
    if dtype == "uint32":
        assert traced(make(np.array(2**31, dtype)))[-1].sum() == 200  # clamped, not wrapped


@pytest.mark.parametrize("index", [np.int8(-1), jnp.int8(-1)], ids=["numpy", "jax"])
def test_the_last_layer_of_more_than_its_type_counts(index):
    cache, token = KVCache.create(1, 4, 1, 8, layers=200, dtype=jnp.float32), jnp.ones((1, 1, 1, 8))
    assert cache.append(token, token, layer=index).length[-1] == 1
