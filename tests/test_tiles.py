"""What every shipped tile keeps, measured or not: the numerics' part of it, the GPU's limits on its form, and a reason."""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import flashcore_jax
from flashcore_jax.errors import OptionError
from flashcore_jax.problem import SPLIT_UNIT, problem_of
from flashcore_jax.tuning import tile_rows
from flashcore_jax.tuning.candidates import candidates
from flashcore_jax.tuning.gpus import Gpu, gpu_of, target_gpu
from flashcore_jax.tuning.tile_rows import KERNELS
from flashcore_jax.tuning.tiles import bucket_tiles, tiles_for

pytestmark = pytest.mark.host

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
            for number, least in ((tile["block_q"], 16), (tile["block_k"], 16), (tile["num_warps"], 1)):
                assert number >= least
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
    assert gpu_of("NVIDIA A10").capability == (8, 6)
    assert gpu_of("NVIDIA A10G", "8.6").kind == "NVIDIA A10G"  # which JAX does not list


class Local:
    device_kind, compute_capability, platform = "NVIDIA GeForce RTX 3090", "8.6", "gpu"


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_a_gpu_that_is_not_listed_knows_its_own_capability(monkeypatch, on_a_mesh):
    """On a mesh too, whose abstract device has the kind alone: there it was taken for one that no kernel runs on."""
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [Local()])
    abstract = jax.sharding.AbstractDevice(device_kind=Local.device_kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    query = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh) if on_a_mesh else contextlib.nullcontext():
        assert (target_gpu().kind, target_gpu().capability) == (Local.device_kind, (8, 6))
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
        assert flashcore_jax.explain(query, query, query).implementation == "triton"
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
        explanation = flashcore_jax.explain(query, query, query)
    assert explanation.implementation == "xla"
    assert "a list of its own" in explanation.reasons["triton"]


# --- the user's rows

H200 = gpu_of("NVIDIA H200")


def row(kernel="dq", gpu="NVIDIA H200", bits=16, head_dim=128, block_k=64, **fields):
    sizes = {"block_q": 64, "block_k": block_k, "num_warps": 4, "num_stages": 1}
    return {"gpu": gpu, "bits": bits, "head_dim": head_dim, "kernel": kernel} | sizes | {"reason": "the user's"} | fields


@pytest.fixture
def user(tmp_path, monkeypatch):
    """`user(rows or text)` is what this user's file holds, to a process that has not read it yet."""

    def write(content):
        file = tmp_path / "tiles.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("FLASHCORE_TILES", str(file))
        tile_rows.user_rows.cache_clear()
        return file

    yield write
    tile_rows.user_rows.cache_clear()


def test_a_users_row_comes_before_the_shipped_one_and_changes_no_other_bucket(user):
    cases = [(gpu, problem(dtype, H)) for gpu in map(gpu_of, GPUS) for dtype in ("bfloat16", "float32") for H in (64, 128, 256)]
    before = [tiles_for(*case) for case in cases]
    user([row(), row("decode", head_dim=256, heads_fastest=False, spills="why"), row(gpu="NVIDIA of tomorrow", capability="8.9")])
    for (gpu, call), shipped in zip(cases, before, strict=True):
        tiles = tiles_for(gpu, call)
        changed = {name for name in KERNELS if getattr(tiles, name) != getattr(shipped, name)}
        of_16_bits = call.dtype == "bfloat16"
        expected = {128: {"dq"}, 256: {"decode"}}.get(call.H, set()) if gpu.capability == (9, 0) and of_16_bits else set()
        expected |= {"dq"} if gpu.capability == (8, 9) and call.H == 128 and of_16_bits else set()
        assert changed == expected
        assert all(getattr(tiles, name).reason == "the user's" for name in changed)
    assert tiles_for(H200, problem("float16", 80)).dq.num_stages == 1
    assert tiles_for(Gpu("NVIDIA of tomorrow", (8, 9), 101376, 64), problem("float16", 80)).dq.reason == "the user's"
    assert not tiles_for(H200, problem("bfloat16", 256)).decode.heads_fastest
    assert tile_rows.origin() == f"the package's, but for 3 of {tile_rows.user_file()}"


def test_a_row_of_this_very_gpu_comes_before_others_of_its_capability(user):
    user([row(gpu="NVIDIA H100", num_stages=2), row(num_stages=3), row("decode", gpu="NVIDIA H100", num_stages=4)])
    kinds = ("NVIDIA H200", "NVIDIA H100", "NVIDIA GH200")
    tiles = {kind: tiles_for(gpu_of(kind), problem("bfloat16", 128)) for kind in kinds}
    assert [tiles[kind].dq.num_stages for kind in kinds] == [3, 2, 2]  # the first, where none is its own
    assert [tiles[kind].decode.num_stages for kind in kinds] == [4, 4, 4]  # the user's before the package's, whatever it was measured on
    assert tile_rows.origin() == f"the package's, but for 3 of {tile_rows.user_file()}"


def test_float32_multiply_adds_have_tiles_of_their_own(user):
    """The measured ones are for tensor cores: without them they spill all that they hold (head dim 256: 330,552 bytes, compiled for an
    H100 by ptxas 13.5.37)."""
    user([row("dq", bits=32, head_dim=64)])

    def timed(head_dim, **options):
        tiles = vars(tiles_for(H200, problem("float32", head_dim, **options))).values()
        return [tile.reason == "the user's" or " us" in tile.reason for tile in tiles]

    for head_dim in (64, 128, 256):
        assert all(timed(head_dim))
        assert not any(timed(head_dim, precision="highest"))


def test_a_users_file_is_read_once_and_not_at_import(user, monkeypatch):
    file = user([row(num_stages=3)])
    assert tiles_for(H200, problem("bfloat16", 128)).dq.num_stages == 3
    file.write_text("gone wrong")
    assert tiles_for(H200, problem("bfloat16", 128)).dq.num_stages == 3
    subprocess.run([sys.executable, "-c", "import flashcore_jax"], check=True, cwd=os.getcwd())
    monkeypatch.setenv("FLASHCORE_TILES", "")
    tile_rows.user_rows.cache_clear()
    assert tiles_for(H200, problem("bfloat16", 128)).dq.reason != "the user's"


@pytest.mark.parametrize("kernels", [["forward"], ["closing", "decode"], ["forward", "closing", "decode"]], ids=", ".join)
def test_one_block_k_for_the_kernels_of_one_key_grid(user, kernels):
    file = user([row("dq", block_k=32), *(row(kernel, block_k=128) for kernel in kernels)])
    if len(kernels) == 3:  # another key grid, and a whole one
        tiles = tiles_for(H200, problem("bfloat16", 128))
        assert {tiles.forward.block_k, tiles.closing.block_k, tiles.decode.block_k} == {128}
        return
    with pytest.raises(OptionError, match="one block_k") as error:
        tiles_for(H200, problem("bfloat16", 128))
    assert f"{kernels[0]} 128 ({file}, row 2)" in str(error.value)
    assert "64 (measured.json, row" in str(error.value)
    tiles_for(H200, problem("bfloat16", 64))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("", "JSON"), pytest.param("[" * 100_000, "JSON", id="nested"), ('[{"gpu": "NVIDIA H2', "JSON"), ("{}", "a list"), ("[1]", "row 1"),
        ([row(), {"gpu": "NVIDIA H200"}], "row 2"), ([row(kernel="backward")], "a kernel of"), ([row(bits=8)], "bits"),
        ([row(head_dim=80)], "head_dim"), ([row(block_q=48)], "powers of two"), ([row(num_warps=0)], "above 0"), ([row(num_stages="2")], "above 0"),
        ([row("decode", block_k=256)], "block_k"), ([row(heads_fastest=1)], "heads_fastest"), ([row(reason="")], "a reason"),
        ([row(block_n=64)], "block_n"), ([row(), row()], "a second one"), ([row(gpu="NVIDIA of tomorrow")], "capability"),
        ([row(capability="9")], "capability"),
    ],
)  # fmt: skip
def test_a_users_file_that_is_wrong_is_refused_by_name(user, content, names):
    file = user(content)
    for _ in range(2):  # the second call too: it does not go on with other tiles
        with pytest.raises(OptionError, match="FLASHCORE_TILES=") as error:
            tiles_for(H200, problem("bfloat16", 128))
        assert str(file) in str(error.value)
        assert str(error.value) in tile_rows.origin()
        assert names in str(error.value)


def test_where_the_users_file_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("FLASHCORE_TILES", "")
    assert tile_rows.user_file() is None
    monkeypatch.delenv("FLASHCORE_TILES")
    assert tile_rows.user_file() == str(tmp_path / ".cache/flashcore_jax/tiles.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    in_cache = tmp_path / "cache/flashcore_jax/tiles.json"
    assert tile_rows.user_file() == str(in_cache)

    read = tile_rows.user_rows.__wrapped__
    assert read() == {}
    in_cache.mkdir(parents=True)  # there is something, and it cannot be read
    with pytest.warns(UserWarning, match="the shipped tiles are taken"):
        assert read() == {}
    monkeypatch.setenv("FLASHCORE_TILES", str(tmp_path / "not there"))  # named, so it was meant
    with pytest.raises(OptionError, match="not there"):
        read()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("gpu", GPUS)
def test_candidates_are_few_and_keep_the_key_grid(gpu, bits):
    for head_dim, kernel in itertools.product(tile_rows.HEAD_DIMS, KERNELS):
        tiles = bucket_tiles(gpu_of(gpu), bits, head_dim, {})
        found = candidates(gpu_of(gpu), bits, head_dim, kernel, tiles.forward.block_k)
        assert 3 <= len(found) == len(set(found)) <= 50
        for tile in found:
            if kernel in tile_rows.ON_THE_KEY_GRID:
                assert tile.block_k == tiles.forward.block_k
            held = {"dkdv": 2 * tile.block_q}.get(kernel, 2 * tile.block_k) * tile.num_stages * head_dim * bits // 8
            assert held <= gpu_of(gpu).shared_memory
