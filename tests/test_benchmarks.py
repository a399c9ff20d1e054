"""The benchmarks: tiny cells run to the end, what they check is checked, and the report renders from what they wrote."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_gpu

from benchmarks import exact, peers, report, run, timing, workloads
from benchmarks.workloads import Cell, Loop
from flashcore_jax import testing

QUICK = workloads.QUICK_BOARDS["prefill"]
BOARDS = list(workloads.BOARDS)
CONTENDERS = ("flashcore", "xla", "cudnn")


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "quick.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "BASELINE", "xla")  # cuDNN is not on every machine
        boards = ["--board", *BOARDS[:2], "--board", *BOARDS[2:]]
        run.main(["--quick", "--memory", *boards, "--peers", ",".join(CONTENDERS), "--rounds", "2", "--out", str(file)])
    return file


@pytest.fixture(scope="module")
def records(results_file):
    return [json.loads(line) for line in results_file.read_text().splitlines()]


def timed(records, board):
    return [r for r in records if r["kind"] == "time" and r["board"] == board]


def test_one_run_holds_all_boards(records):
    assert [r["kind"] for r in records].count("run") == 1
    assert {r["board"] for r in records if r["kind"] == "time"} == set(BOARDS)


@pytest.mark.parametrize("board", BOARDS)
def test_every_contender_has_one_record_per_cell_and_direction(records, board):
    found = [(r["cell"]["name"], r["direction"], r["contender"]) for r in timed(records, board)]
    expected = [
        (cell.name, direction, name)
        for cell in workloads.QUICK_BOARDS[board]
        for direction in workloads.directions(board)
        for name in (cell.forms if board == "loops" else CONTENDERS)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("board", [board for board in BOARDS if board != "loops"])
def test_records_say_what_was_found(records, board):
    for r in timed(records, board):
        if r["contender"] == "cudnn" and not on_gpu():
            assert (r["status"], r["reason"]) == ("declined", "needs an NVIDIA GPU")
            continue
        on_tf32 = on_gpu() and r["cell"]["dtype"] == "float32"  # all that XLA takes for the products there, and cuDNN takes no float32
        assert r["status"] == ({"cudnn": "failed", "xla": "wrong"}.get(r["contender"], "ok") if on_tf32 else "ok"), r
        if r["status"] != "ok":
            assert "time_us" not in r
            continue
        assert set(r["errors"]) == ({"out"} if r["direction"] == "fwd" else {"out", "dq", "dk", "dv"})
        assert r["errors"]["out"] <= 1  # the gate, which bounds every entry
        assert max(r["errors"].values()) < 1.2  # the gradients' is a root mean square, of which these few numbers are a sample
        assert r["samples"] >= 2
        assert r["time_us"]["min"] <= r["time_us"]["median"]


@pytest.mark.parametrize("board", BOARDS)
def test_ratio_is_the_baselines_time_over_the_contenders(records, board):
    times = {(r["cell"]["name"], r["direction"], r["contender"]): r for r in timed(records, board) if r["status"] == "ok"}
    for (cell, direction, _), r in times.items():
        baseline = times.get((cell, direction, "unrolled" if board == "loops" else "xla"))
        median = r["time_us"]["median"]
        assert r["ratio"] == (pytest.approx(baseline["time_us"]["median"] / median) if baseline else None)
        if board == "loops":
            assert r["turn_us"] == pytest.approx(median / Loop(**r["cell"]).turns)
            continue
        assert r["tflops"] == pytest.approx(Cell(**r["cell"]).flops(direction) / median / 1e6)
        if board == "decode":
            assert r["gbps"] == pytest.approx(Cell(**r["cell"]).kv_bytes / median / 1e3)


def test_both_forms_of_a_loop_compute_the_same(records):
    for r in timed(records, "loops"):
        assert r["status"] == "ok", r
        assert r["max_diff"]["out"] == 0
        assert r["alias_bytes"] == r["cache_bytes"]  # donated, and taken
        assert isinstance(r["copies"], dict)  # what a CPU copies in interpret mode says nothing


def test_an_error_is_relative_to_the_result_and_tells_the_dtypes_apart(records):
    for r in timed(records, "float32"):
        if r["status"] == "ok":
            low, high = {"float32": (0, 2e-6), "bfloat16": (5e-4, 2e-2)}[r["cell"]["dtype"]]
            assert set(r["relative"]) == set(r["errors"])
            assert all(low < error < high for error in r["relative"].values()), r


def test_memory_and_ceilings_are_recorded(records):
    assert {r["name"] for r in records if r["kind"] == "ceiling"} == {"matmul", "copy", "read"}
    assert {(r["cell"]["T"], r["direction"]) for r in records if r["kind"] == "memory" and r["status"] == "ok"} == {
        (cell.T, direction) for cell in workloads.QUICK_MEMORY for direction in workloads.DIRECTIONS
    }


def test_report_renders_and_knows_when_it_is_stale(results_file, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- numbers:start -->\nold\n<!-- numbers:end -->\nafter\n")
    arguments = ["--results", str(results_file), "--root", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = (tmp_path / "docs/performance.md").read_text()
    assert all(
        f"## {title}\n" in text for title in ("Prefill", "Forward + backward", "Lengths", "Padded", "Decode", "Loops", "Latency", "Float32")
    )
    assert text.count("Kernel time by CUPTI" if on_gpu() else "Wall time of one call") == 1  # of the one run, once
    assert ("needs an NVIDIA GPU" in text) != on_gpu()
    pictures = {file.name for file in (tmp_path / "docs/images").iterdir()}
    assert pictures == {f"{name}.png" for name in ("who_wins", "prefill", "lengths", "time", "decode", "memory")}
    assert readme.read_text().startswith("before\n")
    assert "old" not in readme.read_text()
    readme.write_text(readme.read_text().replace("flashcore", "flashcore!").replace("TFLOP/s", "GFLOP/s"))
    assert report.main([*arguments, "--check"]) == 1


def assert_same_in_float64(got, expected, cell):
    """Equal but for the order of float64 sums. An entry sums S products, and behind each stand two sums of H (a logit, a dp), so
    either side is off by at most (S + 2 H) roundoffs of the sum's magnitude, for which the largest entry stands. Seen: 14
    roundoffs; a key too many costs 1/S of an entry, ten decades more."""
    limit = 2 * (cell.keys + 2 * cell.H) * 2.0**-53 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "cell", [*QUICK, *workloads.QUICK_BOARDS["padded"], Cell("full", 1, 96, 4, 2, 16, is_causal=False)], ids=lambda cell: cell.name
)
def test_exact_agrees_with_the_oracle(cell):
    q, k, v, d_out, *lengths = run.random_inputs(cell, jax.random.key(3))
    with jax.enable_x64(True):
        got = jax.jit(exact.attention, static_argnums=0)(cell, q, k, v, d_out, *lengths)
    G = cell.N // cell.K
    inputs = testing.Inputs(q, k, v, d_out, np.zeros((cell.B, cell.T, cell.N)))
    of_rows = {name: cell.lengths for name in ("query_seq_lengths", "key_value_seq_lengths") if cell.padded}
    truth, weights = (testing.oracle(x, **cell.options, **of_rows).exact for x in (inputs, inputs._replace(value=jnp.abs(v))))
    expected = (
        truth.out[-1, :, -G:], weights.out[-1, :, -G:],
        truth.dquery[-1, :, -G:], truth.dkey[-1, :, -1], truth.dvalue[-1, :, -1],
    )  # fmt: skip
    for x, y in zip(got, expected, strict=True):
        assert_same_in_float64(x, y, cell)


CACHED = [*workloads.QUICK_BOARDS["decode"], Cell("ragged chunk", 3, 5, 4, 2, 16, S=40, shortest=5)]


@pytest.mark.parametrize("cell", CACHED, ids=lambda cell: cell.name)
def test_exact_on_a_cache_agrees_with_the_oracle(cell):
    q, k, v, query_lengths, key_lengths = run.random_inputs(cell, jax.random.key(3))
    inputs = testing.Inputs(q, k, v, jnp.zeros_like(q), np.zeros((cell.B, cell.T, cell.N)))
    options = {"is_causal": True, "query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
    truth, weights = (testing.oracle(x, **options).exact for x in (inputs, inputs._replace(value=jnp.abs(v))))
    found, G = exact.cached(cell, q, k, v), cell.N // cell.K
    assert {row for row, _ in found} >= {0, cell.lengths.argmin(), cell.lengths.argmax(), cell.B - 1}
    for (row, head), (out, weight) in found.items():
        at = row, slice(None), slice(head * G, (head + 1) * G)
        assert_same_in_float64(out, truth.out[at], cell)
        assert_same_in_float64(weight, weights.out[at], cell)


@pytest.mark.parametrize("cell", CACHED, ids=lambda cell: cell.name)
def test_contenders_on_a_cache_mean_the_same(cell):
    """Those that run here, and the mask that others are given."""
    arrays = run.random_inputs(cell, jax.random.key(0))
    truth = exact.cached(cell, *arrays[:3])
    for name in ("flashcore_xla", "xla"):
        out = jax.jit(peers.PEERS[name].program(cell, "fwd"))(*arrays)
        assert exact.errors(cell, (out,), truth)["out"] <= 1, name
    wrong = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(*arrays[:3])  # the first query on the first key
    assert not exact.errors(cell, (wrong,), truth)["out"] <= exact.WRONG
    nan = exact.errors(cell, (out.at[0, 0, 0, 0].set(jnp.nan),), truth)["out"]
    assert np.isnan(nan)


@pytest.mark.parametrize("peer", peers.PEERS.values(), ids=peers.PEERS)
def test_a_contender_without_a_kind_of_cell_declines_it(peer):
    for cell, adapter in ((QUICK[0], peer.forward), (CACHED[0], peer.cached)):
        if adapter is None:
            with pytest.raises(peers.Declined):
                dataclasses.replace(peer, gpu_only=False).program(cell, "fwd")


def test_default_contenders():
    assert all(name in peers.PEERS for names in peers.DEFAULT.values() for name in names)
    assert "pallas_gqa" not in peers.DEFAULT["prefill"]
    assert "pallas_mosaic" not in peers.DEFAULT["decode"]


def test_a_wrong_contender_is_not_timed():
    cell = QUICK[0]
    arrays = run.random_inputs(cell, jax.random.key(0))
    with jax.enable_x64(True):
        truth = [np.asarray(x) for x in jax.jit(exact.attention, static_argnums=0)(cell, *arrays)]
    not_causal = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v))
    (record,) = run.measure(cell, "fwd", {"xla": not_causal}, [arrays], truth, samples=1)
    assert record["status"] == "wrong"
    assert "time_us" not in record


def test_flops_follow_the_board():
    causal, full, window = Cell("c", 2, 8, 4, 2, 16), Cell("f", 2, 8, 4, 2, 16, is_causal=False), Cell("w", 2, 8, 4, 2, 16, window=2)
    assert full.flops("fwd") == 4 * 2 * 4 * 8 * 8 * 16
    assert causal.flops("fwd") == full.flops("fwd") / 2
    assert causal.flops("fwd+bwd") == 3.5 * causal.flops("fwd")
    assert window.visible_pairs == 1 + 2 + 6 * 3
    padded = Cell("p", 2, 8, 4, 2, 16, is_causal=False, shortest=4)
    assert padded.visible_pairs == np.mean([n * n for n in padded.lengths.tolist()])
    assert 4 <= padded.lengths.min() < padded.lengths.max() <= 8


def test_profiler_takes_a_rotating_function_as_it_is():
    assert isinstance(timing.Rotating(None, [()]), jax.stages.Wrapped)


def test_bytes_and_pairs_of_a_cache():
    cell = Cell("c", 2, 3, 4, 2, 16, S=8)
    assert cell.kv_bytes == 2 * (2 * 8 * 2 * 16) * 2  # two arrays, B S K H, two bytes
    assert cell.visible_pairs == 8 + 7 + 6
    ragged = workloads.DECODE[4]
    assert (ragged.name, ragged.lengths.min(), ragged.lengths.max(), ragged.lengths.sum()) == ("D5", 129, 8097, 121907)
    assert ragged.kv_bytes == 121907 * 4096
    assert ragged.flops("fwd") == pytest.approx(4 * 121907 * 32 * 128)
