"""What the report shows, of which run and beside which, from made-up results; and that its pictures can be drawn."""

import dataclasses
import json
import re

import pytest

from benchmarks import pictures, records, report, tables, workloads

pytestmark = pytest.mark.host

DECODE = [cell.name for cell in workloads.DECODE]


def made_up(run_id, board, device="NVIDIA H200", us=80.0, cells=None, baseline=True, failed=(), clock="cupti", commit=""):
    """A result file's lines of one board as a GPU would give them: 100 µs for the baseline, `us` for the rest."""
    yield {"run": run_id, "kind": "run", "date": run_id, "quick": False, "commit": commit, "device": device, "versions": {"jax": "0"}}
    for name in ("matmul", "read"):
        yield {"run": run_id, "kind": "ceiling", "name": name, "value": 4500.0, "unit": "GB/s", "what": "sum", "clock": clock}
    for cell in workloads.BOARDS[board]:
        if cells is not None and cell.name not in cells:
            continue
        for direction in workloads.directions(board):
            names = cell.forms if board == "loops" else ("flashcore", "flashcore_nosplit", *(["cudnn"] if baseline else []))
            for name in names:
                time = 100.0 if name in ("cudnn", "unrolled") else us
                record = {
                    "run": run_id, "board": board, "kind": "time", "cell": dataclasses.asdict(cell), "direction": direction, "contender": name,
                }  # fmt: skip
                if (cell.name, name) in failed:
                    yield record | {"status": "failed", "reason": "it broke"}
                    continue
                record |= {
                    "status": "ok", "clock": clock, "samples": 20, "time_us": {"median": time, "min": time, "spread": 0.01},
                    "wall_us": time + 60, "ratio": 100 / time, "max_diff": {"out": 0.0}, "errors": {"out": 0.5},
                }  # fmt: skip
                if board == "loops":
                    found = {"turn_us": time / cell.turns, "temp_bytes": 2**20, "alias_bytes": 0, "cache_bytes": cell.cache_bytes}
                    copied = {"copy": 3} if name == "unrolled" else {}
                    yield record | found | {"copies": copied}
                else:
                    yield record | {"tflops": 300.0, "gbps": cell.kv_bytes / time / 1e3}


def load(tmp_path, *runs):
    files = []
    for i, lines in enumerate(runs):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    return next(iter(records.load(files).values()))


def render(tmp_path, *runs):
    return report.performance(load(tmp_path, *runs))


# Which run is shown


def test_the_newest_whole_run_is_shown_whatever_the_order_of_the_files(tmp_path):
    results = load(tmp_path, made_up("2026-01-02", "decode", us=70.0), made_up("2026-01-01", "decode"))["decode"]
    assert list(results.runs) == ["2026-01-02"]
    assert results.ratios("fwd", "flashcore", ["D1"]) == {"D1": pytest.approx(100 / 70)}
    assert not results.left_out


@pytest.mark.parametrize(
    "partial",
    [dict(cells=["D1", "D7"]), dict(baseline=False), dict(failed=[("D2", "cudnn")])],
    ids=["two cells", "no cuDNN", "cuDNN failed"],
)
def test_a_newer_run_of_less_replaces_nothing_and_is_named(tmp_path, partial):
    boards = load(tmp_path, made_up("2026-01-01", "decode"), made_up("2026-01-02", "decode", us=5.0, **partial))
    assert list(boards["decode"].runs) == ["2026-01-01"]
    assert boards["decode"].times["D1", "fwd"]["flashcore"]["time_us"]["median"] == 80
    (line,) = report.left_out(boards)
    has = {"cells": "2 of the board's 13 cells (D1, D7)", "baseline": "0 of the board's 13 cells", "failed": "12 of the board's 13 cells"}
    assert line.startswith("- Decode: a newer run, 2026-01-02, is not shown")
    assert has[next(iter(partial))] in line
    assert line in report.performance(boards)


def test_our_own_failure_does_not_hide_a_run(tmp_path):
    boards = load(tmp_path, made_up("2026-01-01", "decode"), made_up("2026-01-02", "decode", failed=[("D3", "flashcore")]))
    assert list(boards["decode"].runs) == ["2026-01-02"]
    text = report.performance(boards)
    assert "| D3: 1 x 131072, 32/8, 128 | **- (80.0)** |" in text
    assert "D3 (no time now, cuDNN (jax.nn) +0.0%)" in text


def test_directions_are_chosen_apart(tmp_path):
    forward = [r for r in made_up("2026-01-02", "prefill", us=70.0) if r.get("direction") != "fwd+bwd"]
    results = load(tmp_path, made_up("2026-01-01", "prefill"), forward)["prefill"]
    assert list(results.runs) == ["2026-01-01", "2026-01-02"]
    assert [results.time_us("P1", direction, "flashcore") for direction in workloads.DIRECTIONS] == [70, 80]


def test_where_no_run_is_whole_the_one_with_most_cells_is_shown(tmp_path):
    runs = [made_up(f"2026-01-0{i}", "decode", cells=DECODE[:count]) for i, count in ((1, 3), (2, 5), (3, 5), (4, 1))]
    results = load(tmp_path, *runs)["decode"]
    assert list(results.runs) == ["2026-01-03"]
    assert results.left_out == {("fwd", "2026-01-04"): DECODE[:1]}


def test_a_run_that_was_cut_is_completed_by_others_of_its_commit(tmp_path):
    halves = [
        made_up(f"2026-01-0{i}", "decode", cells=DECODE[at], commit=c)
        for i, at, c in ((1, slice(8, 10), "b"), (2, slice(5), "a"), (3, slice(5, 9), "a"))
    ]
    results = load(tmp_path, *halves)["decode"]
    assert list(results.cells) == DECODE[:9]
    assert list(results.runs) == ["2026-01-02", "2026-01-03"]
    assert results.left_out == {}


def test_a_board_that_the_newest_run_lacks_keeps_its_rows_and_says_their_date(tmp_path):
    runs = made_up("2026-01-01", "decode"), made_up("2026-01-02", "loops"), made_up("2026-01-03", "loops")
    top, decode, loop = re.split("## Decode|## Loops", render(tmp_path, *runs))
    assert "NVIDIA H200, 2026-01-03;" in loop
    assert "2026-01-0" not in decode  # said at the top already, for it is the first board
    assert "NVIDIA H200, 2026-01-01;" in top
    assert "## Decode" not in render(tmp_path, made_up("2026-01-01", "decode"), made_up("2026-01-02", "loops", device="another"))


def test_each_kind_of_gpu_has_a_page_and_the_newest_run_the_first(tmp_path):
    load(tmp_path, made_up("1", "decode"), made_up("2", "prefill"), made_up("3", "loops", device="NVIDIA H100 80GB HBM3"))
    pages = report.pages_of(records.load(sorted(tmp_path.glob("*.jsonl"))))
    texts = {file.name: text for file, text in report.texts(pages, tmp_path).items()}
    assert list(texts) == ["performance.md", "performance-h200.md"]
    assert "Measured on other GPUs: [NVIDIA H200](performance-h200.md)." in texts["performance.md"]
    assert "## Decode" not in texts["performance.md"]
    assert "(images/h200/who_wins.png)" in texts["performance-h200.md"]
    assert "NVIDIA H100" in texts["performance.md"]


# The run before


def test_the_run_before_of_a_cell_is_the_newest_older_one_that_timed_it(tmp_path):
    older, partial, newest = made_up("1", "decode", us=50.0), made_up("2", "decode", us=60.0, cells=["D7"]), made_up("3", "decode", us=80.0)
    results = load(tmp_path, newest, older, partial)["decode"]
    assert [results.before_us(cell, "fwd", "flashcore") for cell in ("D1", "D7")] == [50, 60]
    assert results.change("D7", "fwd", "flashcore") == pytest.approx(80 / 60 - 1)
    assert results.change("D7", "fwd", "cudnn") == 0
    assert results.change("D7", "fwd", "xla") is None


@pytest.mark.parametrize("change", ["clock", "device", "cell"])
def test_nothing_is_compared_with_another_clock_device_or_cell(tmp_path, change):
    before = made_up("1", "decode", **({} if change == "cell" else {change: "another"}))
    if change == "cell":  # of the same name
        before = [r | {"cell": r["cell"] | {"B": 7}} if r["kind"] == "time" else r for r in before]
    assert not load(tmp_path, before, made_up("2", "decode"))["decode"].before


@pytest.mark.parametrize(("us", "marked"), [(82.3, False), (82.5, True), (60.0, False)])
def test_more_than_three_percent_slower_is_marked(tmp_path, us, marked):
    boards = load(tmp_path, made_up("1", "decode", us=80.0), made_up("2", "decode", us=us))
    text = report.performance(boards)
    entry = f"{us:.1f} (80.0, {us / 80 - 1:+.1%})"
    assert (f"| **{entry}** |" in text) == marked
    assert (f"| {entry} |" in text) == (not marked)
    assert f"- Decode, against 1: our 26 times changed by {us / 80 - 1:+.1%}, cuDNN (jax.nn)'s by +0.0% (medians); " in text
    assert (f"**slower by more than 3%: D1 ({us / 80 - 1:+.1%}, cuDNN (jax.nn) +0.0%); D1 flashcore, split_size=None" in text) == marked
    assert ("none slower by more than 3%" in text) == (not marked)


def test_without_an_earlier_run_the_report_says_so(tmp_path):
    boards = load(tmp_path, made_up("1", "decode"))
    assert "No cell shown was measured in an earlier run." in report.performance(boards)


# What is rendered


def test_report_without_results(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert report.main(["--results", str(tmp_path / "empty.jsonl"), "--root", str(tmp_path)]) == 0
    assert "Nothing has been measured yet" in (tmp_path / "docs/performance.md").read_text()


def test_decode_is_rendered(tmp_path):
    text = render(tmp_path, made_up("2026-01-01", "decode"))
    assert "Decode: 1.25 of cuDNN's speed (geometric mean over D1 to D12; 1.25 in D1 to 1.25 in D1), 1.25 with `split_size=None`;" in text
    cell = workloads.DECODE[0]
    assert f"| D1: 64 x 8192, 32/8, 128 | {cell.kv_bytes / 80e3:.0f} (1.25) | {cell.kv_bytes / 80e3:.0f} (1.25) |" in text
    assert "| D1: 64 x 8192, 32/8, 128 | 80.0 | 80.0 | 100.0 | +0.0% |" in text
    assert "| D5: 64 x 128 to 8192, 32/8, 128 |" in text
    assert "| C1: 8 x 512 on 7680, 32/8, 128 | 300 (1.25) |" in text
    assert "takes 60 µs more" in text
    assert "## Prefill" not in text


def test_a_padded_batch_is_rendered(tmp_path):
    text = render(tmp_path, made_up("2026-01-01", "padded"))
    assert "| R1: 32 x 128 to 1024, 16/16, 128, causal | 300 (1.25) | 300 (1.25) | 300 |" in text
    assert text.count("| R5: ") == 4


def test_loops_and_latency_are_rendered(tmp_path):
    text = render(tmp_path, made_up("2026-01-01", "loops"), made_up("2026-01-02", "latency"))
    assert "| L1: one loop over a stack of 16 layers | 80.0 | 5.0 | 0.800 | 140 | 1.0 (0.02%) | none | 0 |" in text
    assert "| L2: 64 calls of one step | 100.0 | 1.6 | 1.000 | 160 | 1.0 (0.39%) | 3 copy | 0 |" in text
    assert "| 2048 | 1.00 | 1.00 | 1.00 |" in text
    assert "| 96 | 0.052 | 0.052 | 0.065 |" in text


def memory_of(run_id, commit=""):
    """A result file's lines of the memory alone."""
    yield {
        "run": run_id,
        "kind": "run",
        "date": run_id,
        "quick": False,
        "commit": commit,
        "device": "NVIDIA H200",
        "versions": {"jax": "0"},
    }
    cell = dataclasses.asdict(workloads.MEMORY[0])
    yield {"run": run_id, "board": "prefill", "kind": "memory", "cell": cell, "direction": "fwd", "contender": "flashcore", "status": "ok", "temp_bytes": 1}  # fmt: skip


def test_the_memory_of_another_run_says_so_and_no_time_is_taken_for_its(tmp_path):
    boards = load(
        tmp_path, memory_of("2026-01-01", "a"), made_up("2026-01-02", "prefill", commit="b"), made_up("2026-01-03", "lengths", commit="b")
    )
    assert list(boards["prefill"].runs) == ["2026-01-02"]
    assert pictures._of_one_commit(boards)
    of_times, of_memory = report.performance(boards).split("## Memory")
    assert "2026-01-01" not in of_times
    assert "Of 2026-01-01, commit a." in of_memory
    assert "Of 2026" not in render(tmp_path, [*made_up("1", "prefill"), *list(memory_of("1"))[1:]])
    assert "Of 2026-01-01, commit a." in render(tmp_path, memory_of("2026-01-01", "a"))


def test_the_readme_has_the_numbers_of_the_prefill_board(tmp_path):
    text = report.readme_section(load(tmp_path, made_up("1", "prefill"), made_up("2", "prefill", us=60.0)))
    assert "| P1: 16 x 1024, 16/16, 128, causal | 300 | 1.67 | - | 300 | 1.67 | - |" in text
    assert "Against the run before" not in text


def test_small_numbers_keep_three_digits():
    assert [tables.number(x) for x in (1234.5, 9.876, 0.1234)] == ["1234", "9.88", "0.123"]
    assert tables.number(9.876, 1) == "9.9"


# Pictures


def test_pictures_are_linked_where_there_is_something_to_draw(tmp_path):
    boards = load(tmp_path, made_up("1", "lengths"), made_up("2", "decode"))
    drawn = {file.stem for file in pictures.of(boards, tmp_path)}
    assert drawn == {"who_wins", "lengths", "time", "decode"}
    assert set(re.findall(r"\(images/(\w+)\.png\)", report.performance(boards))) == drawn
    assert pictures.of(load(tmp_path), tmp_path) == {}


def test_lengths_are_completed_by_the_prefill_board(tmp_path):
    found = pictures._by_length(load(tmp_path, made_up("1", "lengths"), made_up("2", "prefill")))
    assert {H: sorted(lines["fwd", "cudnn"]) for H, lines in found.items()} == {H: [512, 1024, 4096, 16384] for H in (64, 128, 256)}


@pytest.mark.parametrize(("commit", "line"), [("a", "-"), ("b", "None")])
def test_no_line_joins_the_times_of_two_programs(tmp_path, commit, line):
    pytest.importorskip("matplotlib")
    boards = load(tmp_path, made_up("1", "lengths", commit="a"), made_up("2", "prefill", commit=commit))
    for draw in (pictures.draw_lengths, pictures.draw_time):
        assert {drawn.get_linestyle() for drawn in draw(boards).axes[0].lines} - {":"} == {line}


def test_every_picture_draws_every_contender(tmp_path):
    pytest.importorskip("matplotlib")
    assert set(pictures.STYLES) == set(pictures.PEERS)
    boards = load(tmp_path, made_up("1", "lengths"), made_up("2", "decode"), made_up("3", "prefill"))
    for file, draw in pictures.of(boards, tmp_path).items():
        figure = draw()
        figure.savefig(file, dpi=40)
        assert figure.get_figwidth() == 10, file  # a page's width: the text is read at this size
    (forward, *_) = pictures.draw_who_wins(boards).axes
    assert [text.get_text() for text in forward.texts] == ["1.25"] * 20  # the fastest peer, and cuDNN, in ten cells
