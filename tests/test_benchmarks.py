"""The benchmarks on a CPU: tiny cells run to the end, what they check is checked, and the report renders from what they wrote."""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot, exact, hlo, loops, peers, report, run, timing, workloads
from benchmarks.workloads import Cell, Loop
from flashcore_jax import testing

QUICK = workloads.QUICK_BOARDS["prefill"]
BOARDS = list(workloads.BOARDS)
CONTENDERS = ("flashcore", "xla", "cudnn")


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "quick.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "BASELINE", "xla")  # there is no cuDNN here
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


@pytest.mark.parametrize("board", ["prefill", "decode", "latency"])
def test_records_say_what_was_found(records, board):
    for r in timed(records, board):
        if r["contender"] == "cudnn":
            assert (r["status"], r["reason"]) == ("declined", "needs an NVIDIA GPU")
            continue
        assert r["status"] == "ok", r
        assert set(r["errors"]) == ({"out"} if r["direction"] == "fwd" else {"out", "dq", "dk", "dv"})
        assert max(r["errors"].values()) < 1.2  # the root mean square of these few numbers is a sample
        assert r["samples"] >= 2
        assert r["time_us"]["min"] <= r["time_us"]["median"]


@pytest.mark.parametrize("board", BOARDS)
def test_ratio_is_the_baselines_time_over_the_contenders(records, board):
    times = {(r["cell"]["name"], r["direction"], r["contender"]): r for r in timed(records, board) if r["status"] == "ok"}
    for (cell, direction, _), r in times.items():
        baseline = times[cell, direction, "unrolled" if board == "loops" else "xla"]["time_us"]["median"]
        median = r["time_us"]["median"]
        assert r["ratio"] == pytest.approx(baseline / median)
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
    assert all(f"## {title}\n" in text for title in ("Forward + backward", "Decode", "Loops", "Latency"))
    assert text.count("Wall time of one call") == 1  # of the one run, once
    assert "needs an NVIDIA GPU" in text
    pictures = {file.name for file in (tmp_path / "docs/images").iterdir()}
    assert pictures == {"prefill_tflops.png", "prefill_fraction.png", "memory.png", "decode_bandwidth.png"}
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


def made_up(run_id, board, device="NVIDIA H200"):
    """A result file's lines of one board as a GPU would give them: 100 µs for the baseline, a fifth less for the rest."""
    yield {"run": run_id, "kind": "run", "date": run_id, "quick": False, "commit": "", "device": device, "versions": {"jax": "0"}}
    yield {"run": run_id, "kind": "ceiling", "name": "read", "value": 4500.0, "unit": "GB/s", "what": "sum", "clock": "cupti"}
    for cell in workloads.BOARDS[board]:
        names = cell.forms if board == "loops" else ("flashcore", "flashcore_nosplit", "cudnn")
        for name in names:
            us = 100.0 if name in ("cudnn", "unrolled") else 80.0
            record = {
                "run": run_id, "board": board, "kind": "time", "cell": dataclasses.asdict(cell), "direction": "fwd", "contender": name,
                "status": "ok", "clock": "cupti", "samples": 20, "time_us": {"median": us, "min": us, "spread": 0.01}, "wall_us": us + 60,
                "ratio": 100 / us, "max_diff": {"out": 0.0}, "errors": {"out": 0.5},
            }  # fmt: skip
            if board == "loops":
                found = {"turn_us": us / cell.turns, "temp_bytes": 2**20, "alias_bytes": 0, "cache_bytes": cell.cache_bytes}
                copied = {"copy": 3} if name == "unrolled" else {}
                yield record | found | {"copies": copied}
            else:
                yield record | {"tflops": 300.0, "gbps": cell.kv_bytes / us / 1e3}


def render(tmp_path, *runs):
    files = []
    for i, lines in enumerate(runs):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    boards = {board: report.Results.load(files, quick=False, board=board) for board in BOARDS}
    return report.performance(boards)


def test_decode_is_rendered(tmp_path):
    text = render(tmp_path, made_up("2026-01-01", "decode"))
    assert "Decode: 1.25 of cuDNN's speed (geometric mean over D1 to D12; 1.25 in D1 to 1.25 in D1), 1.25 with `split_size=None`." in text
    cell = workloads.DECODE[0]
    assert f"| D1: 64 x 8192, 32/8, 128 | {cell.kv_bytes / 80e3:.0f} (1.25) | {cell.kv_bytes / 80e3:.0f} (1.25) |" in text
    assert "| D1: 64 x 8192, 32/8, 128 | 2,147.5 | 80.0 | 80.0 | 100.0 | +0.0% |" in text
    assert "| D5: 64 x 128 to 8192, 32/8, 128 |" in text
    assert "| C1: 8 x 512 on 7680, 32/8, 128 | 300 (1.25) |" in text
    assert "takes 60 µs more" in text
    assert "## Forward" not in text


def test_loops_and_latency_are_rendered(tmp_path):
    text = render(tmp_path, made_up("2026-01-01", "loops"), made_up("2026-01-02", "latency"))
    assert "| L1: one scan over a stack of 16 layers | 80 | 5.0 | 0.800 | 140 | 1.0 (0.02%) | none | 0 |" in text
    assert "| L2: 64 calls of one step | 100 | 1.6 | 1.000 | 160 | 1.0 (0.39%) | 3 copy | 0 |" in text
    assert "| 2048 | 1.00 (80.0 / 80.0) | 1.00 (80.0 / 80.0) | 1.00 (100.0 / 100.0) |" in text
    assert "| 96 | 0.052 (80.0) | 0.052 (80.0) | 0.065 (100.0) |" in text


def test_a_board_that_the_newest_run_lacks_keeps_its_rows_and_says_their_date(tmp_path):
    runs = made_up("2026-01-01", "decode"), made_up("2026-01-02", "loops"), made_up("2026-01-03", "loops")
    text = render(tmp_path, *runs)
    decode, loop = text.split("## Loops")
    assert "NVIDIA H200, 2026-01-01;" in decode
    assert "NVIDIA H200, 2026-01-03;" in loop
    assert "2026-01-02" not in text
    assert "## Decode" not in render(tmp_path, made_up("2026-01-01", "decode"), made_up("2026-01-02", "loops", device="another"))


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


CACHED = [*workloads.QUICK_BOARDS["decode"], Cell("ragged chunk", 3, 5, 4, 2, 16, S=40, shortest=5)]


@pytest.mark.parametrize("cell", CACHED, ids=lambda cell: cell.name)
def test_exact_on_a_cache_agrees_with_the_oracle(cell):
    q, k, v, query_lengths, key_lengths = run.random_inputs(cell, jax.random.key(3))
    inputs = testing.Inputs(q, k, v, jnp.zeros_like(q), np.zeros((cell.B, cell.T, cell.N)))
    oracle = testing.oracle(inputs, is_causal=True, query_seq_lengths=query_lengths, key_value_seq_lengths=key_lengths)
    found, G = exact.cached(cell, q, k, v), cell.N // cell.K
    assert {row for row, _ in found} >= {0, cell.lengths.argmin(), cell.lengths.argmax(), cell.B - 1}
    for (row, head), (out, weight) in found.items():
        at = row, slice(None), slice(head * G, (head + 1) * G)
        np.testing.assert_allclose(out, oracle.exact.out[at], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(weight, oracle.bound.out[at] / testing.UNIT_ROUNDOFF[cell.dtype], rtol=1e-9)


@pytest.mark.parametrize("cell", CACHED, ids=lambda cell: cell.name)
def test_contenders_on_a_cache_mean_the_same(cell):
    """Those that run here, and the mask that others are given."""
    arrays = run.random_inputs(cell, jax.random.key(0))
    truth = exact.cached(cell, *arrays[:3])
    for name in ("flashcore_xla", "xla"):
        out = jax.jit(peers.PEERS[name].program(cell, "fwd"))(*arrays)
        assert exact.errors(cell, (out,), truth)["out"] <= 1.2, name
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


HLO = """
HloModule jit_f

%fused_update (param_0: f32[4,64], param_1: f32[64]) -> f32[4,64] {
  %param_0 = f32[4,64]{1,0} parameter(0)
  %param_1 = f32[64]{0} parameter(1)
  ROOT %update = f32[4,64]{1,0} dynamic-update-slice(%param_0, %param_1)
}

%fused_slice (param_0.1: f32[4,64]) -> f32[64] {
  %param_0.1 = f32[4,64]{1,0} parameter(0)
  ROOT %slice = f32[64]{0} dynamic-slice(%param_0.1), dynamic_slice_sizes={1,64}
}

%fused_sum (param_0.2: f32[4,64]) -> f32[] {
  %param_0.2 = f32[4,64]{1,0} parameter(0)
  %twice = f32[4,64]{1,0} add(%param_0.2, %param_0.2)
  ROOT %sum = f32[] reduce(%twice)
}

%body (state: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %state = (s32[], f32[4,64]{1,0}) parameter(0)
  %cache = f32[4,64]{1,0} get-tuple-element(%state), index=1
  %appended = (f32[4,64]{1,0}, /*index=1*/f32[4,64]{1,0}) custom-call(%cache, %cache), output_to_operand_aliasing={{0}: (0, {})}
  %layer = f32[64]{0} fusion(%cache), kind=kLoop, calls=%fused_slice, metadata={op_name="a(b)/c = d"}
  %layer-start = ((f32[4,64]{1,0}), f32[64]{0}, u32[]) fusion-start(%cache), kind=kLoop, calls=%fused_slice
  %layer-done = f32[64]{0} fusion-done(%layer-start)
  %updated = f32[4,64]{1,0} fusion(%cache, %layer), kind=kLoop, calls=%fused_update
  %total = f32[] fusion(%updated), kind=kInput, calls=%fused_sum
  ROOT %next = (s32[], f32[4,64]{1,0}) tuple(%total, %updated)
}

ENTRY %main (cache.1: f32[4,64]) -> f32[4,64] {
  %cache.1 = f32[4,64]{1,0} parameter(0)
  %copy-start = (f32[4,64]{1,0}, f32[4,64]{1,0}, u32[]) copy-start(%cache.1)
  %copy-done = f32[4,64]{1,0} copy-done(%copy-start)
  %small = f32[8]{0} copy(%cache.1)
  %start = (s32[], f32[4,64]{1,0}) tuple(%small, %copy-done)
  %while = (s32[], f32[4,64]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[4,64]{1,0} get-tuple-element(%while), index=1
}
"""


def test_copies_are_counted_and_updates_in_place_are_not():
    assert hlo.copies(HLO, 64) == {"fusion": 2, "copy": 1}  # a layer taken out, twice, and the whole cache
    assert hlo.copies(HLO, 4 * 64) == {"copy": 1}
    assert hlo.copies(HLO, 4 * 64 + 1) == {}


def copies_of(f, donate):
    x, row = jnp.zeros((16, 64, 64)), jnp.ones((64, 64))
    return hlo.copies(jax.jit(f, donate_argnums=donate).lower(x, row, 3).compile().as_text(), row.size)


def test_copies_of_a_compiled_program():
    def update(x, row, i):
        return jax.lax.fori_loop(0, i, lambda at, x: jax.lax.dynamic_update_index_in_dim(x, row, at, 0), x)

    assert copies_of(update, donate=0) == {}
    assert sum(copies_of(update, donate=()).values()) == 1
    assert sum(copies_of(lambda x, row, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) * 2, donate=()).values()) == 1


def copies_of_the_boards_loops():
    """{cell: (the copies of its scan's program for an H200, the temporary bytes)}."""
    found = {}
    for cell in workloads.LOOPS:
        form = loops.forms(cell)["scan"]
        inputs = jax.eval_shape(lambda cell=cell, form=form: form.inputs(cell, *loops.inputs_of(cell, jax.random.key(0))))
        program = aot.compile_for(functools.partial(form.program, cell), *inputs, gpu="NVIDIA H200", donate_argnums=1)
        found[cell] = hlo.copies(program.as_text(), cell.layer_elements), program.memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_the_boards_loops_copy_nothing():
    # In a process of its own, as in test_aot.py.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), aot.leave_the_gpu_alone) as pool:
        found = pool.submit(copies_of_the_boards_loops).result()
    assert len(found) == 2
    for cell, (copied, temporary) in found.items():
        assert copied == {}
        assert temporary < cell.cache_bytes / 100
