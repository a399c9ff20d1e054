"""The benchmarks on a CPU: tiny cells run to the end, what they check is checked, and the report renders from what they wrote."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import exact, peers, report, run, timing, workloads
from benchmarks.workloads import Cell
from flashcore_jax import testing

QUICK = workloads.QUICK_BOARDS["prefill"]


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "quick.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "BASELINE", "xla")  # there is no cuDNN here
        run.main(["--quick", "--memory", "--peers", "flashcore,xla,cudnn", "--rounds", "2", "--out", str(file)])
    return file


@pytest.fixture(scope="module")
def records(results_file):
    return [json.loads(line) for line in results_file.read_text().splitlines()]


def test_every_contender_has_one_record_per_cell_and_direction(records):
    found = [(r["cell"]["name"], r["direction"], r["contender"]) for r in records if r["kind"] == "time"]
    assert sorted(found) == sorted((c.name, d, p) for c in QUICK for d in workloads.DIRECTIONS for p in ("flashcore", "xla", "cudnn"))


def test_records_say_what_was_found(records):
    for r in (r for r in records if r["kind"] == "time"):
        if r["contender"] == "cudnn":
            assert (r["status"], r["reason"]) == ("declined", "needs an NVIDIA GPU")
            continue
        assert r["status"] == "ok", r
        assert set(r["errors"]) == ({"out"} if r["direction"] == "fwd" else {"out", "dq", "dk", "dv"})
        assert max(r["errors"].values()) < 1.2  # the root mean square of these few numbers is a sample
        assert r["samples"] >= 2
        assert r["time_us"]["min"] <= r["time_us"]["median"]


def test_ratio_is_the_baselines_time_over_the_contenders(records):
    times = {(r["cell"]["name"], r["direction"], r["contender"]): r for r in records if r.get("status") == "ok" and r["kind"] == "time"}
    for (cell, direction, _), r in times.items():
        baseline = times[cell, direction, "xla"]["time_us"]["median"]
        assert r["ratio"] == pytest.approx(baseline / r["time_us"]["median"])
        assert r["tflops"] == pytest.approx(Cell(**r["cell"]).flops(direction) / r["time_us"]["median"] / 1e6)


def test_memory_and_ceilings_are_recorded(records):
    assert {r["name"] for r in records if r["kind"] == "ceiling"} == {"matmul", "copy"}
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
    assert "## Forward + backward" in text
    assert "needs an NVIDIA GPU" in text
    assert all(
        (tmp_path / "docs" / name).exists() for name in ("images/prefill_tflops.png", "images/prefill_fraction.png", "images/memory.png")
    )
    assert readme.read_text().startswith("before\n")
    assert "old" not in readme.read_text()
    readme.write_text(readme.read_text().replace("flashcore", "flashcore!").replace("TFLOP/s", "GFLOP/s"))
    assert report.main([*arguments, "--check"]) == 1


def test_report_without_results(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert report.main(["--results", str(tmp_path / "empty.jsonl"), "--root", str(tmp_path)]) == 0
    assert "Nothing has been measured yet" in (tmp_path / "docs/performance.md").read_text()


def test_the_newest_run_with_the_baseline_is_shown(tmp_path):
    def line(run, contender, ratio):
        return {
            "run": run,
            "kind": "time",
            "cell": dataclasses.asdict(QUICK[0]),
            "direction": "fwd",
            "contender": contender,
            "status": "ok",
            "ratio": ratio,
        }

    old, new, partial = ({"run": f"2026-01-0{i}", "kind": "run", "quick": False, "device": "a GPU"} for i in (1, 2, 3))
    lines = [new, line("2026-01-02", "cudnn", 1.0), line("2026-01-02", "flashcore", 0.8), old, line("2026-01-01", "cudnn", 1.0)]
    lines += [line("2026-01-01", "flashcore", 0.5), partial, line("2026-01-03", "flashcore", None)]
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    results = report.Results.load([file], quick=False)
    assert results.ratios("fwd", "flashcore") == {"P1": 0.8}
    assert list(results.runs) == ["2026-01-02"]


@pytest.mark.parametrize("cell", [*QUICK, Cell("full", 1, 96, 4, 2, 16, is_causal=False)], ids=lambda cell: cell.name)
def test_exact_agrees_with_the_oracle(cell):
    q, k, v, d_out = run.random_inputs(cell, jax.random.key(3))
    with jax.enable_x64(True):
        got = jax.jit(exact.attention, static_argnums=0)(cell, q, k, v, d_out)
    G = cell.N // cell.K
    oracle = testing.oracle(testing.Inputs(q, k, v, d_out, np.zeros((cell.B, cell.T, cell.N))), **cell.options)
    truth = oracle.exact
    expected = (
        truth.out[-1, :, -G:], oracle.bound.out[-1, :, -G:] / testing.UNIT_ROUNDOFF[cell.dtype],
        truth.dquery[-1, :, -G:], truth.dkey[-1, :, -1], truth.dvalue[-1, :, -1],
    )  # fmt: skip
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


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


def test_profiler_takes_a_rotating_function_as_it_is():
    assert isinstance(timing.Rotating(None, [()]), jax.stages.Wrapped)
