"""The simulator notices what a GPU may punish: small kernels that do it, each in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

pytestmark = [pytest.mark.mosaic, pytest.mark.host]
TILE = (64, 64)


def kernel(source, out, tile, vector, full, free, *, warpgroup, do):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    full, free = full.at[0], free.at[0]

    @pl.when(warpgroup() == 1)
    def _():
        plgpu.set_max_registers(240 if do == "registers" else 40, action="decrease")
        rows = {"before the array": -8, "beyond the array": 96, "ten rows of eight": 90}.get(do, 0)
        plgpu.copy_gmem_to_smem(source.at[pl.ds(rows, 64)], tile, full)
        if do == "nobody waits":
            plgpu.copy_gmem_to_smem(source.at[pl.ds(0, 64)], tile, full)
        if do == "two phases":
            plgpu.barrier_arrive(full)
        if do == "a vector beyond the array":
            plgpu.copy_gmem_to_smem(source.at[0, pl.ds(8, 64)], vector, full)
        if do == "for ever":
            plgpu.barrier_wait(free)

    @pl.when(warpgroup() == 0)
    def _():
        plgpu.set_max_registers(440, action="increase")
        plgpu.barrier_wait(full)
        tile[...] = tile[...] * 2
        if do != "not committed":
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out)
        if do == "overwritten":
            tile[...] = tile[...] + 1
        if do != "in flight":
            plgpu.wait_smem_to_gmem(0)


@pytest.fixture
def run(monkeypatch):
    import hopper_simulator
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from flashcore_jax.kernels.mosaic_gpu import forward

    hopper_simulator.install(monkeypatch, hopper_simulator.ORDERS["fetching first"]())

    def run(do: str, shape=TILE):
        def body(*refs):
            kernel(*refs, warpgroup=lambda: forward.lax.axis_index("warpgroup"), do=do)

        source = jnp.arange(100 * 64, dtype=jnp.float32).reshape(100, 64)
        scratch = [plgpu.SMEM(shape, jnp.float32), plgpu.SMEM((64,), jnp.float32), *[plgpu.Barrier(num_barriers=1)] * 2]
        out_type = [jax.ShapeDtypeStruct(TILE, jnp.float32)]
        return source, forward.launch(body, source, name="test", programs=1, warpgroups=2, out_type=out_type, scratch=scratch)[0]

    return run


def test_what_is_right_passes(run):
    source, out = run("")
    np.testing.assert_array_equal(out, 2 * source[:64])


def test_beyond_the_array_a_tile_is_zero(run):
    source, out = run("beyond the array")
    np.testing.assert_array_equal(out, 2 * np.pad(source[96:], [(0, 60), (0, 0)]))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("before the array", "begins 8 before the array"),
        ("a vector beyond the array", "a vector beyond the array"),
        ("ten rows of eight", "no multiple of 8"),
        ("not committed", "has not been told"),
        ("overwritten", "was overwritten"),
        ("in flight", "ends with something in flight"),
        ("nobody waits", "moved on by two phases"),
        ("two phases", "moved on by two phases"),
        ("for ever", r"warpgroups \[1\] wait for ever"),
        ("registers", "more than there are"),
    ],
)
def test_a_hazard_is_met(run, do, message):
    from hopper_simulator import Hazard

    with pytest.raises(Hazard, match=message):
        run(do)


def test_shared_memory_ends(run):
    from hopper_simulator import Hazard

    with pytest.raises(Hazard, match="more shared memory than there is"):
        run("", (64, 1024))
