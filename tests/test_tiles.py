"""What every shipped tile keeps, measured or not: the numerics' part of it, the GPU's limits on its form, and a reason."""

import dataclasses
import itertools

import jax
import pytest

from flashcore_jax.problem import SPLIT_UNIT, problem_of
from flashcore_jax.tuning.gpus import gpu_of, target_gpu
from flashcore_jax.tuning.tiles import tiles_for

GPUS = ["NVIDIA A100", "NVIDIA L4", "NVIDIA H100", "NVIDIA H200", "NVIDIA B200", "NVIDIA of tomorrow"]
HEAD_DIMS = [8, 40, 64, 80, 128, 160, 192, 256]


def problem(dtype, H, Hv=None, T=4096, S=4096, N=8, K=2, B=2, **options):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv or H)
    return problem_of(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), **options)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_block_k_depends_on_the_gpu_the_dtype_and_the_head_dim_alone(gpu, dtype):
    """It is the key grid: a row must have the same bits however long, wide or masked the call around it is."""
    for H in HEAD_DIMS:
        calls = [
            problem(dtype, H, T=T, S=S, N=N, K=K, B=B, **options)
            for (T, S), (N, K), B, options in itertools.product(
                [(1, 1), (1, 100_000), (513, 8192)],
                [(1, 1), (32, 8)],
                [1, 64],
                [{}, {"is_causal": True}, {"local_window_size": 100, "logits_soft_cap": 3.0}, {"split_size": None}],
            )
        ]
        tiles = [tiles_for(gpu_of(gpu), call) for call in calls]
        blocks = {tile.block_k for t in tiles for tile in (t.forward, t.closing, t.decode)}
        assert len(blocks) == 1
        assert SPLIT_UNIT % blocks.pop() == 0


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_form(gpu, dtype):
    for H in HEAD_DIMS:
        tiles = tiles_for(gpu_of(gpu), problem(dtype, H))
        for name, tile in dataclasses.asdict(tiles).items():
            assert tile["reason"], (name, H)
            for number in (tile["block_q"], tile["block_k"], tile["num_warps"]):
                assert number >= 4
                assert number & (number - 1) == 0, "Triton takes powers of two"
            if dtype != "float32" and name in ("forward", "closing"):
                assert tile["block_q"] >= 16 * tile["num_warps"], "a row's columns stay in one warp, and so does its sum"


def test_the_gpu_in_sight_is_that_of_the_abstract_mesh():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert target_gpu() == gpu_of("NVIDIA A100")
    assert gpu_of("NVIDIA H200").capability == (9, 0)
    assert gpu_of("NVIDIA H100 80GB HBM3").kind == "NVIDIA H100"
    assert gpu_of("NVIDIA RTX 6000", "8.9").capability == (8, 9)
