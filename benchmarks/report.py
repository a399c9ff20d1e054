"""Render docs/performance.md, its pictures and the README's numbers from committed results. Nobody writes these numbers by hand.

    python -m benchmarks.report                        # from every benchmarks/results/*.jsonl that is not a --quick run
    python -m benchmarks.report --results FILE...      # from these, quick ones too
    python -m benchmarks.report --check                # exit code 1 if what is committed is not what would be rendered

Of each cell the newest run that has the baseline in it is shown, all contenders from that one run, on the newest run's device.
A board that the newest run lacks is shown from the newest run that has it, with that run's date.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys

from benchmarks import loops, pictures
from benchmarks.peers import BASELINE, NO_SPLIT, OURS, PEERS
from benchmarks.workloads import BOARDS, DIRECTIONS, SUMMARIES, TITLES, Cell, Loop, cell_of, directions

ROOT = pathlib.Path(__file__).parent.parent
MARKERS = "<!-- numbers:start -->", "<!-- numbers:end -->"
ABSENT = "-"
TRITON_PEERS = [name for name, peer in PEERS.items() if peer.triton and name not in (OURS, NO_SPLIT)]


@dataclasses.dataclass
class Results:
    """What is shown of one board, newest first already chosen. `times[cell name, direction][contender]` is that contender's record."""

    board: str
    runs: dict[str, dict]
    cells: dict[str, Cell | Loop]
    times: dict[tuple[str, str], dict[str, dict]]
    ceilings: dict[str, dict]
    memory: dict[tuple[str, str], dict[int, dict]]  # [contender, direction][T]

    @classmethod
    def load(cls, files, quick: bool, board: str = "prefill") -> "Results":
        records = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
        runs = {r["run"]: r for r in records if r["kind"] == "run" and (quick or not r["quick"])}
        device = runs[max(runs)]["device"] if runs else None
        runs = {run: r for run, r in sorted(runs.items()) if r["device"] == device}
        by_kind = collections.defaultdict(list)
        for record in sorted((r for r in records if r["run"] in runs), key=lambda r: r["run"]):  # stable: oldest run first
            by_kind[record["kind"]].append(record)

        timed = [r for r in by_kind["time"] if r.get("board", "prefill") == board]  # the first runs knew one board, and did not name it
        baseline = loops.BASELINE if board == "loops" else BASELINE
        shown = {}  # (cell, direction) -> run
        for needs_baseline in (False, True):
            for r in timed:
                if not needs_baseline or (r["contender"] == baseline and r["status"] == "ok"):
                    shown[r["cell"]["name"], r["direction"]] = r["run"]
        times, cells = collections.defaultdict(dict), {}
        for r in timed:
            key = r["cell"]["name"], r["direction"]
            if shown[key] == r["run"]:
                times[key][r["contender"]] = r
                cells[key[0]] = cell_of(board, r["cell"])
        memory = collections.defaultdict(dict)
        for r in by_kind["memory"]:
            if r["status"] == "ok" and board == "prefill":
                memory[r["contender"], r["direction"]][r["cell"]["T"]] = r
        used = {r["run"] for group in times.values() for r in group.values()}
        used |= {r["run"] for group in memory.values() for r in group.values()}
        ceilings = {r["name"]: r for r in by_kind["ceiling"] if r["run"] in used}
        places = {cell.name: place for place, cell in enumerate(BOARDS[board])}
        order = sorted(cells, key=lambda name: (places.get(name, len(places)), len(name), name))
        return cls(
            board, {k: v for k, v in runs.items() if k in used}, {name: cells[name] for name in order}, dict(times), ceilings, dict(memory)
        )

    @property
    def summarised(self) -> tuple[str, ...]:
        """The cells of the geometric mean."""
        return SUMMARIES.get(self.board, ())

    def ok(self, cell: str, direction: str, contender: str) -> dict | None:
        record = self.times.get((cell, direction), {}).get(contender)
        return record if record and record["status"] == "ok" else None

    def ratios(self, direction: str, contender: str, among=None) -> dict[str, float]:
        """{cell: the baseline's time over the contender's}: above 1 is faster than the baseline."""
        found = {cell: self.ok(cell, direction, contender) for cell in among or self.cells}
        return {cell: r["ratio"] for cell, r in found.items() if r and r["ratio"]}

    def contenders(self, direction: str) -> list[str]:
        return [name for name in PEERS if any(self.ok(cell, direction, name) for cell in self.cells)]


def geometric_mean(values) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


# Text


def table(head, rows) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(x: float, digits: int = 0) -> str:
    """Small numbers keep three digits, so that a CPU's are not all zero."""
    return f"{x:.{digits}f}" if x >= 10 ** (1 - digits) else f"{x:.3g}"


def mean_of(results: Results, direction: str, contender: str) -> str:
    ratios = results.ratios(direction, contender, results.summarised)
    if not ratios:
        return ABSENT
    note = "" if len(ratios) == len(results.summarised) else f" ({len(ratios)} of {len(results.summarised)})"
    return f"{geometric_mean(ratios.values()):.2f}{note}"


def board_table(results: Results, direction: str, figure: str = "tflops", cells=None, head: str = "B x T, N/K, H") -> str:
    """One figure of every contender in each cell; with the geometric mean where that is over these cells."""
    names = results.contenders(direction)
    cells = results.cells if cells is None else cells

    def entry(cell, name):
        record = results.ok(cell, direction, name)
        if record is None:
            status = results.times.get((cell, direction), {}).get(name, {}).get("status", "")
            return f"**{status}**" if status == "wrong" else ABSENT
        ratio = f" ({record['ratio']:.2f})" if record["ratio"] and name != BASELINE else ""
        return number(record[figure]) + ratio

    rows = [[f"{name}: {results.cells[name]}", *(entry(name, contender) for contender in names)] for name in cells]
    if set(results.summarised) & set(cells):
        first, *_, last = results.summarised
        means = ["" if name == BASELINE else mean_of(results, direction, name) for name in names]
        rows.append([f"geometric mean, {first} to {last}", *means])
    return table([head, *(PEERS[name].label for name in names)], rows)


def mean_sentence(results: Results, direction: str, title: str) -> str:
    """Our geometric mean, its extremes, and what `split_size=None` reaches; "" where there is none."""
    cells = results.summarised
    ratios = results.ratios(direction, OURS, cells)
    if not ratios:
        return ""
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    over = f"{cells[0]} to {cells[-1]}" if len(ratios) == len(cells) else ", ".join(ratios)
    text = (
        f"{title}: {geometric_mean(ratios.values()):.2f} of cuDNN's speed (geometric mean over {over}; "
        f"{ratios[low]:.2f} in {low} to {ratios[high]:.2f} in {high})"
    )
    if free := results.ratios(direction, NO_SPLIT, cells):
        text += f", {geometric_mean(free.values()):.2f} with `split_size=None`"
    return text


def summary(results: Results) -> str:
    """The sentences that a reader wants first."""
    lines = []
    for direction in DIRECTIONS:
        text = mean_sentence(results, direction, TITLES[direction])
        if not text:
            continue
        lead = {}
        for cell in results.cells:
            ours, theirs = results.ok(cell, direction, OURS), [results.ok(cell, direction, name) for name in TRITON_PEERS]
            if ours and any(theirs):
                lead[cell] = ours["tflops"] / max(r["tflops"] for r in theirs if r)
        if lead:
            text += f"; {min(lead.values()):.2f} to {max(lead.values()):.2f} times the fastest other Triton kernel where one runs"
        lines.append(f"- {text}.")
    return "\n".join(lines) or "- No cell has both our time and cuDNN's."


def provenance(results: Results) -> str:
    run = results.runs[max(results.runs)]
    ok = [r for group in results.times.values() for r in group.values() if r["status"] == "ok"]
    dates = sorted({r["date"] for r in results.runs.values()})
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    text = f"{run['device']}, {' and '.join(dates)}; {versions}" + (f"; commit {run['commit']}" if run["commit"] else "") + "."
    if ok:
        clock = "kernel time by CUPTI (all kernels of one call)" if {r["clock"] for r in ok} == {"cupti"} else "wall time of one call"
        text += (
            f" {clock[0].upper()}{clock[1:]}, median of {min(r['samples'] for r in ok)} or more calls, contenders in turns, inputs rotated where "
            f"they would fit the L2; median spread (90th to 10th percentile) {statistics.median(r['time_us']['spread'] for r in ok):.1%}."
        )
    if results.ceilings:
        text += " Ceilings on the same GPU: " + ", ".join(
            f"{name} {number(r['value'])} {r['unit']} ({r['what']})" for name, r in results.ceilings.items()
        ) + "."  # fmt: skip
    return text


def split_cost(results: Results, cell: str, direction: str) -> str:
    exact, free = (results.ok(cell, direction, contender) for contender in (OURS, NO_SPLIT))
    return f"{exact['time_us']['median'] / free['time_us']['median'] - 1:+.1%}" if exact and free else ABSENT


def split_table(results: Results) -> str:
    rows = [[f"{name}: {cell}", *(split_cost(results, name, d) for d in DIRECTIONS)] for name, cell in results.cells.items()]
    return table(["B x T, N/K, H", *(TITLES[direction].lower() for direction in DIRECTIONS)], rows)


def numerics_table(results: Results) -> str:
    names = [n for n in PEERS if any(n in results.contenders(direction) for direction in DIRECTIONS)]

    def entry(cell, name):
        found, difference = {}, 0.0
        for direction in DIRECTIONS:
            if record := results.ok(cell, direction, name):
                found |= record["errors"]
                difference = max(difference, record.get("max_diff", {}).get("out", 0.0))
        if not found:
            return ABSENT
        gradients = [found[g] for g in ("dq", "dk", "dv") if g in found]
        text = f"{found['out']:.2f}" + (f" / {max(gradients):.2f}" if gradients else "")
        return text if name == OURS else f"{text} ({difference:.1g})"

    return table(
        ["B x T, N/K, H", *(PEERS[name].label for name in names)], [[c, *(entry(c, name) for name in names)] for c in results.cells]
    )


def dispatch_sentence(results: Results) -> str:
    extra = [
        r["wall_us"] - r["time_us"]["median"]
        for group in results.times.values()
        for r in group.values()
        if r["status"] == "ok" and r["clock"] == "cupti"
    ]
    if not extra:
        return ""
    return (
        f"\nThese are kernel times. From Python, one jitted call and the wait for its result takes {statistics.median(extra):.0f} µs more "
        "(median over all contenders and cells); a model under one `jit` does not pay it per layer.\n"
    )


def mib(n: float) -> str:
    return number(n / 2**20, 1)


def memory_table(results: Results) -> str:
    columns = [(name, direction) for name in PEERS for direction in DIRECTIONS if (name, direction) in results.memory]
    lengths = sorted({T for found in results.memory.values() for T in found})
    rows = [[f"{T:,}", *(mib(results.memory[c][T]["temp_bytes"]) if T in results.memory[c] else ABSENT for c in columns)] for T in lengths]
    return table(["T", *(f"{PEERS[name].label}, {TITLES[direction].lower()}" for name, direction in columns)], rows)


def growth_sentence(results: Results) -> str:
    parts = []
    for direction in DIRECTIONS:
        found = results.memory.get((OURS, direction), {})
        if len(found) > 1:
            low, high = min(found), max(found)
            a, b = found[low]["temp_bytes"], found[high]["temp_bytes"]
            grown = f"{b / a:.1f} times" if a else f"from 0 to {mib(b)} MiB"
            parts.append(f"{TITLES[direction].lower()} {grown}")
    return f"From T = {low:,} to {high:,}, that is {high / low:.0f} times, temporary memory grows: {', '.join(parts)}." if parts else ""


def declined_list(results: Results) -> str:
    reasons = collections.defaultdict(lambda: collections.defaultdict(list))
    for (cell, direction), group in results.times.items():
        for name, record in group.items():
            if record["status"] != "ok":
                reasons[name, record["status"], record["reason"]][direction].append(cell)
    lines = []
    only_one = len(directions(results.board)) == 1
    for (name, status, reason), found in sorted(reasons.items()):
        where = {d: "every cell" if len(c) == len(results.cells) else ", ".join(c) for d, c in found.items()}
        text = "; ".join(cells if only_one else f"{d}: {cells}" for d, cells in where.items())
        lines.append(f"- {PEERS[name].label}, {status} ({text}): {reason}")
    shown = {name for direction in DIRECTIONS for name in results.contenders(direction)}
    notes = [f"- {peer.label}: {peer.note}." for name, peer in PEERS.items() if peer.note and name in shown]
    return "\n".join(notes + lines)


# Sections


def prefill_sections(results: Results) -> list[str]:
    if not results.cells:
        return []
    parts = [
        "", summary(results),
        (
            "\nTFLOP/s counts 4·B·N·T²·H, half of it when causal, a window's visible pairs, and 3.5 times as much with the backward. In brackets: "
            "speed as a fraction of cuDNN's in the same run, above 1 is faster. bfloat16, causal unless it says full. Every contender's output "
            "was compared with float64 before it was timed. What is absent is explained at the end."
        ),
    ]  # fmt: skip
    for direction in DIRECTIONS:
        parts += [f"\n## {TITLES[direction]}\n", board_table(results, direction)]
    return [
        *parts, dispatch_sentence(results),
        "![TFLOP/s of every contender, per cell](images/prefill_tflops.png)\n", "![Speed as a fraction of cuDNN's](images/prefill_fraction.png)",
        "\n## What the default `split_size` costs\n", "Time at the default, compared with `split_size=None`.\n", split_table(results),
    ]  # fmt: skip


def errors_section(results: Results) -> list[str]:
    if not results.cells:
        return []
    return [
        "\n## Errors\n",
        (
            "Against float64 attention on the same rounded inputs (the last key/value head of the last row, every query). First the largest error of the "
            "output, then, after the slash, the worst of the three gradients (root mean square), both as fractions of their gates in "
            "`flashcore_jax.testing`: 1 is the limit for ours. In brackets: the largest difference from our output anywhere.\n"
        ),
        numerics_table(results),
    ]  # fmt: skip


def memory_section(results: Results) -> list[str]:
    if not results.memory:
        return []
    cell = Cell(**next(iter(next(iter(results.memory.values())).values()))["cell"])
    return [
        "\n## Memory\n",
        f"Temporary MiB of one call, from XLA's own accounting: B = {cell.B}, N/K = {cell.N}/{cell.K}, H = {cell.H}, {cell.dtype}, causal. {growth_sentence(results)}\n",
        memory_table(results), "\n![Temporary memory against T](images/memory.png)",
    ]  # fmt: skip


def decode_section(results: Results) -> list[str]:
    steps, chunks = ([name for name, cell in results.cells.items() if (cell.T == 1) == one] for one in (True, False))
    mean = mean_sentence(results, "fwd", "Decode")
    parts = [
        f"{mean or 'No cell has both our time and cuDNN in it'}.\n",
        (
            "One new token for each of B rows, on S valid keys; \"128 to 8192\" are lengths of the rows' own, log-uniform. bfloat16. GB/s counts the valid keys "
            "and values once. In brackets: speed as a fraction of cuDNN's. The lengths are arrays, not constants, and every contender gets them.\n"
        ),
        board_table(results, "fwd", "gbps", steps, "B x S, N/K, H: GB/s"),
    ]  # fmt: skip
    if chunks:
        parts += [
            "\nA chunk of a prompt on what is cached. cuDNN, XLA and tokamax get the mask explicitly: their causal masks start at the first key.\n",
            board_table(results, "fwd", "tflops", chunks, "B x T on cached keys, N/K, H: TFLOP/s"),
        ]
    parts += ["\nKernel time in µs, and what the default `split_size` adds to that of `split_size=None`:\n", decode_times(results)]
    parts += [dispatch_sentence(results), "![GB/s of every contender, by batch x context](images/decode_bandwidth.png)\n"]
    parts += [
        (
            "Errors against float64 (the first and last key/value head of the first, last, shortest and longest row), as fractions of the gate; in brackets the "
            "largest difference from our output anywhere:\n"
        ),
        numerics_table(results),
    ]  # fmt: skip
    return [*parts, "", notes] if (notes := declined_list(results)) else parts


def decode_times(results: Results) -> str:
    names = [name for name in (OURS, NO_SPLIT, BASELINE) if name in results.contenders("fwd")]
    rows = []
    for name, cell in results.cells.items():
        found = [results.ok(name, "fwd", contender) for contender in names]
        times = [f"{r['time_us']['median']:.1f}" if r else ABSENT for r in found]
        rows.append([f"{name}: {cell}", f"{cell.kv_bytes / 1e6:,.1f}", *times, split_cost(results, name, "fwd")])
    return table(["B x S, N/K, H", "valid keys and values, MB", *(PEERS[name].label for name in names), "default against None"], rows)


def loops_section(results: Results) -> list[str]:
    rows = []
    for name, cell in results.cells.items():
        for form, what in cell.forms.items():
            record = results.times[name, "fwd"].get(form)
            if record is None or record["status"] != "ok":
                rows.append([f"{name}: {what}", *([f"{record['status']}: {record['reason']}"] if record else [ABSENT]), *[""] * 6])
                continue
            copied = ", ".join(f"{count} {opcode}" for opcode, count in record["copies"].items()) or "none"
            rows.append([
                f"{name}: {what}", number(record["time_us"]["median"]), number(record["turn_us"], 1),
                f"{1 / record['ratio']:.3f}" if record["ratio"] else ABSENT, number(record["wall_us"]),
                f"{mib(record['temp_bytes'])} ({record['temp_bytes'] / record['cache_bytes']:.2%})", copied,
                f"{record['max_diff']['out']:.1g}" if record.get("max_diff") else ABSENT,
            ])  # fmt: skip
    cell = next(iter(results.cells.values()))
    head = [
        "B x S, N/K, H: " + ", ".join(dict.fromkeys(map(str, results.cells.values()))), "kernel time, µs", "per layer or step",
        "time, unrolled = 1", "from Python, µs", "temporary MiB (of the cache)", "copies", "difference from unrolled",
    ]  # fmt: skip
    return [
        (
            f"`attention_with_kv_cache` under `jit` with the cache donated, one token per row and turn, {cell.dtype}; the last turn fills the cache. \"Copies\" are "
            "the instructions in the optimized HLO that make an array as large as the keys of one layer, wherever they stand; kernel time holds no memcpy, so "
            "they are counted instead. \"From Python\": until the result is there.\n"
        ),
        table(head, rows),
    ]  # fmt: skip


def latency_section(results: Results) -> list[str]:
    names = results.contenders("fwd")

    def us(cell, contender):
        record = results.ok(cell, "fwd", contender)
        return record["time_us"]["median"] if record else None

    pairs, heads = [], []
    for name, cell in results.cells.items():
        if cell.is_causal:
            row = [f"{cell.T}"]
            for contender in names:
                times = us(name, contender), us(f"full-{cell.T}", contender)
                row.append(f"{times[0] / times[1]:.2f} ({times[0]:.1f} / {times[1]:.1f})" if all(times) else ABSENT)
            pairs.append(row)
        elif cell.N == cell.K:
            times = [us(name, contender) for contender in names]
            heads.append([cell.N, *(f"{t / (cell.B * cell.N):.3f} ({t:.1f})" if t else ABSENT for t in times)])
    labels = [PEERS[name].label for name in names]
    parts = []
    grouped, equal = (next((c for c in results.cells.values() if (c.N == c.K) == same), None) for same in (False, True))
    if pairs:
        parts += [
            f"Causal over full: the quotient of the times (and both, in µs). B = {grouped.B}, N/K = {grouped.N}/{grouped.K}, H = {grouped.H}, {grouped.dtype}.\n",
            table(["T", *labels], pairs),
        ]
    if heads:
        parts += [
            f"\nµs per head, that is time / (B·N) (and the time). B = {equal.B}, T = {equal.T}, H = {equal.H}, full, {equal.dtype}.\n",
            table(["N = K", *labels], heads),
        ]
    return [*parts, "", notes] if (notes := declined_list(results)) else parts


def performance(boards: dict[str, Results]) -> str:
    prefill = boards["prefill"]
    head = "# Performance\n\n<!-- Rendered by python -m benchmarks.report from benchmarks/results/. Do not edit. -->\n"
    if not any(results.runs for results in boards.values()):
        return head + "\nNothing has been measured yet: `python -m benchmarks.run --memory --out benchmarks/results/NAME.jsonl`.\n"
    parts, described = [head, provenance(prefill)] if prefill.runs else [head], prefill.runs.keys()
    parts += prefill_sections(prefill)
    for board, section in (("decode", decode_section), ("loops", loops_section), ("latency", latency_section)):
        results = boards[board]
        if not results.cells:
            continue
        parts.append(f"\n## {board.capitalize()}\n")
        if results.runs.keys() != described:  # how they came about, where that has not just been said
            parts.append(provenance(results) + "\n")
        described = results.runs.keys()
        parts += section(results)
    parts += errors_section(prefill) + memory_section(prefill)
    if prefill.cells and (notes := declined_list(prefill)):
        parts += ["\n## Declined, failed, and run another way\n", notes]
    return "\n".join(parts) + "\n"


def readme_section(results: Results, decode: Results) -> str:
    if not results.cells:
        return "Nothing has been measured yet.\n"
    run = results.runs[max(results.runs)]
    rows = []
    for name, cell in results.cells.items():
        row = [f"{name}: {cell}"]
        for direction in DIRECTIONS:
            ours = results.ok(name, direction, OURS)
            theirs = [r for r in (results.ok(name, direction, peer) for peer in TRITON_PEERS) if r]
            row += [
                f"{number(ours['tflops'])}" if ours else ABSENT,
                f"{ours['ratio']:.2f}" if ours and ours["ratio"] else ABSENT,
                f"{ours['tflops'] / max(r['tflops'] for r in theirs):.2f}" if ours and theirs else ABSENT,
            ]
        rows.append(row)
    head = [
        "B x T, N/K, H",
        "forward, TFLOP/s",
        "of cuDNN",
        "of the best other Triton",
        "with backward, TFLOP/s",
        "of cuDNN",
        "of the best other Triton",
    ]
    return (
        f"{run['device']}, jax {run['versions']['jax']}, {run['date']}, bfloat16, default `split_size`; speed as a fraction, above 1 is faster:\n\n"
        f"{table(head, rows)}\n\n{summary(results)}{decode_bullet(decode)}\n\nEvery contender, the method, the errors and the memory: [docs/performance.md](docs/performance.md).\n"
    )


def decode_bullet(decode: Results) -> str:
    if not decode.cells:
        return ""
    fastest = max(r["gbps"] for r in (decode.ok(name, "fwd", OURS) for name in decode.cells) if r)
    return f"\n- {mean_sentence(decode, 'fwd', 'Decode')}; up to {number(fastest)} GB/s of valid keys and values."


# Files


def texts(boards: dict[str, Results], root: pathlib.Path) -> dict[pathlib.Path, str]:
    """{file: what it should hold}."""
    rendered = {root / "docs/performance.md": performance(boards)}
    readme = root / "README.md"
    if readme.exists():
        text, (start, end) = readme.read_text(), MARKERS
        if start not in text or end not in text:
            sys.exit(f"{readme} has no section between {start} and {end}")
        rendered[readme] = re.sub(
            f"{start}.*?{end}", lambda _: f"{start}\n{readme_section(boards['prefill'], boards['decode'])}{end}", text, flags=re.S
        )
    return rendered


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=pathlib.Path, nargs="+", help="JSON lines files; default benchmarks/results/*.jsonl")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="where docs/ and README.md are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    args = parser.parse_args(argv)
    files = args.results or sorted(ROOT.glob("benchmarks/results/*.jsonl"))
    boards = {board: Results.load(files, quick=bool(args.results), board=board) for board in BOARDS}
    rendered, drawn = texts(boards, args.root), pictures.of(boards, args.root / "docs/images")
    if args.check:
        stale = [file for file, text in rendered.items() if not file.exists() or file.read_text() != text]
        stale += [file for file in drawn if not file.exists()]  # drawn pixels differ between versions of matplotlib
        for file in stale:
            print(f"stale: {file}; run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for file, text in rendered.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for file, draw in drawn.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(file, dpi=130)
    print("wrote " + ", ".join(str(file) for file in (*rendered, *drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
