"""Render docs/performance.md, its pictures and the README's numbers from committed results. Nobody writes these numbers by hand.

They are those of the kind of GPU that has the newest run; others have pages of their own, docs/performance-NAME.md.

    python -m benchmarks.report                        # from every benchmarks/results/*.jsonl that is not a --quick run
    python -m benchmarks.report --results FILE...      # from these, quick ones too
    python -m benchmarks.report --check                # exit code 1 if what is committed is not what would be rendered

Which run is shown, and which is the one before it: benchmarks/records.py. Tables: tables.py. Pictures: pictures.py.
"""

import argparse
import collections
import math
import pathlib
import re
import statistics
import sys

from benchmarks import pictures, records, tables
from benchmarks.peers import DEFAULT, NO_SPLIT, OURS, OWN, PEERS
from benchmarks.records import SLOWER, Results
from benchmarks.tables import geometric_mean, label, number
from benchmarks.workloads import BOARDS, DIRECTIONS, TITLES, Cell, directions

ROOT = pathlib.Path(__file__).parent.parent
MARKERS = "<!-- numbers:start -->", "<!-- numbers:end -->"
PALLAS_PEERS = [name for name, peer in PEERS.items() if peer.pallas]


# Sentences


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


def summary(prefill: Results, decode: Results) -> list[str]:
    """What a reader wants first."""
    lines = []
    for direction in DIRECTIONS:
        if text := mean_sentence(prefill, direction, TITLES[direction]):
            if lead := prefill.lead(direction, PALLAS_PEERS):
                best = f"{min(lead.values()):.2f} to {max(lead.values()):.2f} times as fast as {tables.best_of(prefill, PALLAS_PEERS)}"
                text += f"; {best} ({', '.join(lead) if len(lead) < 3 else f'{next(iter(lead))} to {list(lead)[-1]}'})"
            lines.append(f"- {text}.")
    if text := mean_sentence(decode, "fwd", "Decode"):
        fastest = max(r["gbps"] for r in (decode.ok(name, "fwd", OURS) for name in decode.cells) if r)
        lines.append(f"- {text}; up to {number(fastest)} GB/s of valid keys and values. (Attention alone, without the append.)")
    return lines or ["- No cell has both our time and cuDNN's."]


def percent(change: float) -> str:
    return "no time now" if math.isinf(change) else f"{change:+.1%}"


def slower(results: Results) -> list[str]:
    """By name, with the baseline's change in the same cell: where that is as large, it was the machine."""
    found = []
    for (cell, direction, name), change in results.changes(results.ours).items():
        if change > SLOWER:
            parts = [cell, *([direction] if len(directions(results.board)) > 1 else []), *([label(name)] if name != OURS else [])]
            control = results.change(cell, direction, results.baseline)
            beside = "" if control is None else f", {label(results.baseline)} {percent(control)}"
            found.append(f"{' '.join(parts)} ({percent(change)}{beside})")
    return found


def changes(boards: dict[str, Results]) -> list[str]:
    """For each board, our times against those of the run before."""
    lines = []
    for board, results in boards.items():
        if found := results.changes(results.ours):
            runs = " and ".join(sorted({results.before[key]["run"] for key in found}))
            text = f"- {board.capitalize()}, against {runs}: our {len(found)} times changed by {percent(statistics.median_low(found.values()))}"
            if theirs := results.changes([results.baseline]).values():
                text += f", {label(results.baseline)}'s by {percent(statistics.median_low(theirs))}"
            listed = slower(results)
            verdict = f"**slower by more than {SLOWER:.0%}: {'; '.join(listed)}**" if listed else f"none slower by more than {SLOWER:.0%}"
            lines.append(f"{text} (medians); {verdict}.")
    return lines


def left_out(boards: dict[str, Results]) -> list[str]:
    """The newer runs that are not shown, and what they have."""
    lines = []
    for board, results in boards.items():
        found = collections.defaultdict(list)
        for (direction, run), cells in results.left_out.items():
            some = f" ({', '.join(cells)})" if cells else ""
            found[run].append(f"{TITLES[direction].lower()} of {len(cells)} of the board's {len(BOARDS[board])} cells{some}")
        lines += [f"- {board.capitalize()}: a newer run, {run}, is not shown: it has {', '.join(what)}." for run, what in found.items()]
    return lines


def provenance(results: Results) -> str:
    run = results.runs[max(results.runs)]
    ok = [r for group in results.times.values() for r in group.values() if r["status"] == "ok"]
    dates = sorted({r["date"] for r in results.runs.values()})
    if len(results.runs) > len(dates):
        dates = sorted(results.runs)  # several of a day, then, which have some of the cells each
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    text = f"{run['device']}, {' and '.join(dates)}; {versions}" + (f"; commit {run['commit']}" if run["commit"] else "") + "."
    if ok:
        clock = "Kernel time by CUPTI (all kernels of one call)" if {r["clock"] for r in ok} == {"cupti"} else "Wall time of one call"
        text += (
            f" {clock}, median of {min(r['samples'] for r in ok)} or more calls, contenders in turns, inputs rotated where "
            f"they would fit the L2; median spread (90th to 10th percentile) {statistics.median(r['time_us']['spread'] for r in ok):.1%}."
        )
    if extra := [r["wall_us"] - r["time_us"]["median"] for r in ok if r["clock"] == "cupti"]:
        text += (
            f" From Python, one jitted call and the wait for its result takes {statistics.median(extra):.0f} µs more (median over all "
            "contenders and cells); a model under one `jit` does not pay it per layer."
        )
    if results.ceilings:
        roofs = (f"{name} {number(r['value'])} {r['unit']} ({r['what']})" for name, r in results.ceilings.items())
        text += f" Ceilings on the same GPU: {', '.join(roofs)}."
    return text


def declined(results: Results) -> list[str]:
    """What was run another way, and what has no time: why."""
    reasons = collections.defaultdict(lambda: collections.defaultdict(list))
    for (cell, direction), group in results.times.items():
        for name, record in group.items():
            if record["status"] != "ok":
                reasons[name, record["status"], record["reason"]][direction].append(cell)
    shown = {name for direction in DIRECTIONS for name in results.contenders(direction)}
    lines = [f"- {peer.label}: {peer.note}." for name, peer in PEERS.items() if peer.note and name in shown]
    only_one = len(directions(results.board)) == 1
    for (name, status, reason), found in sorted(reasons.items()):
        where = {d: "every cell" if len(c) == len(results.cells) else ", ".join(c) for d, c in found.items()}
        text = "; ".join(cells if only_one else f"{d}: {cells}" for d, cells in where.items())
        lines.append(f"- {label(name)}, {status} ({text}): {reason}")
    known = {name for group in results.times.values() for name in group} | set(OWN)
    if missing := [label(name) for name in DEFAULT.get(results.board, ()) if name not in known]:
        lines.append(f"- Not part of this run: {', '.join(missing)}.")
    return ["", *lines] if lines else []


# Sections: each a list of lines


def head_section(boards: dict[str, Results], images: str) -> list[str]:
    lines = [*summary(boards["prefill"], boards["decode"]), "", *pictures.links(boards, "who_wins", images), "## Against the run before\n"]
    if found := changes(boards):
        lines += [
            (
                f'Times stand beside those of the run before that measured the same cell on this kind of GPU, as in "80.0 (75.0, +6.7%)", in **bold** where '
                f"slower by more than {SLOWER:.0%}. Where the baseline changed as much, it was the machine.\n"
            )
        ]
    return lines + (found or ["- No cell shown was measured in an earlier run."]) + left_out(boards)


def prefill_section(results: Results) -> list[str]:
    lines = [
        (
            "TFLOP/s counts 4·B·N·T²·H, half of it when causal, a window's visible pairs, and 3.5 times as much with the backward. In brackets: "
            "speed as a fraction of cuDNN's in the same run, above 1 is faster. bfloat16, causal unless it says full. Every contender's output "
            "was compared with float64 before it was timed. What is absent is explained below."
        )
    ]
    for direction in DIRECTIONS:
        if results.contenders(direction):
            lines += [f"\n### {TITLES[direction]}\n", tables.speeds(results, direction), "", tables.times(results, direction)]
    return [
        *lines,
        "\n### Errors\n",
        (
            "Against float64 attention on the same rounded inputs (the last key/value head of the last row, every query). First the largest error of the "
            "output, then, after the slash, the worst of the three gradients (root mean square), both as fractions of their gates in "
            "`flashcore_jax.testing`: 1 is the limit for ours. In brackets: the largest difference from our output anywhere.\n"
        ),
        tables.errors(results),
    ]


def lengths_section(results: Results) -> list[str]:
    cell = next(iter(results.cells.values()))
    return [
        f"Causal, N = K, N·H = {cell.N * cell.H}, B·T = {cell.B * cell.T}, {cell.dtype}. The cells above that are of this kind are drawn too, without lines if they are of another commit.\n",
        "<details><summary>The numbers</summary>",
        *_in_both_directions(results),
        "\n</details>",
    ]


def padded_section(results: Results) -> list[str]:
    return [
        (
            "Rows padded on the right, with lengths of their own, log-uniform; queries and keys have the same. TFLOP/s counts the valid pairs; in brackets the "
            "speed as a fraction of cuDNN's. The lengths are arrays, not constants, and every contender gets them. bfloat16."
        ),
        *_in_both_directions(results),
        "\nErrors as above, of the last row:\n",
        tables.errors(results),
    ]


def _in_both_directions(results: Results) -> list[str]:
    lines = []
    for direction in DIRECTIONS:
        if results.contenders(direction):
            head = f"{tables.SHAPE}: TFLOP/s, {TITLES[direction].lower()}"
            lines += ["", tables.speeds(results, direction, head=head), "", tables.times(results, direction)]
    return lines


def decode_section(results: Results) -> list[str]:
    steps, chunks = ([name for name, cell in results.cells.items() if (cell.T == 1) == one] for one in (True, False))
    lines = [
        (
            'One new token for each of B rows, on S valid keys; "128 to 8192" are lengths of the rows\' own, log-uniform. bfloat16. GB/s counts the valid keys '
            "and values once. In brackets: speed as a fraction of cuDNN's. The lengths are arrays, not constants, and every contender gets them.\n"
        ),
        tables.speeds(results, "fwd", "gbps", steps, "B x S, N/K, H: GB/s"),
    ]
    if chunks:
        lines += [
            "\nA chunk of a prompt on what is cached. cuDNN, XLA and tokamax get the mask explicitly: their causal masks start at the first key.\n",
            tables.speeds(results, "fwd", "tflops", chunks, "B x T on cached keys, N/K, H: TFLOP/s"),
        ]
    return [
        *lines,
        "",
        tables.times(results, "fwd"),
        (
            "\nErrors against float64 (the first and last key/value head of the first, last, shortest and longest row), as fractions of the gate; in brackets "
            "the largest difference from our output anywhere:\n"
        ),
        tables.errors(results),
    ]


def loops_section(results: Results) -> list[str]:
    return [
        (
            "`attention_with_kv_cache` under `jit` with the cache donated, one token per row and turn, bfloat16; the last turn fills the cache. "
            '"Copies" are the instructions in the optimized HLO that make an array as large as the keys of one layer, wherever they stand; kernel time holds '
            'no memcpy, so they are counted instead. "From Python": until the result is there.\n'
        ),
        tables.loops(results),
    ]


def latency_section(results: Results) -> list[str]:
    def quotient(cell, name):
        causal, full = (results.time_us(c, "fwd", name) for c in (cell.name, f"full-{cell.T}"))
        return f"{causal / full:.2f}" if causal and full else None

    def per_head(cell, name):
        us = results.time_us(cell.name, "fwd", name)
        return f"{us / (cell.B * cell.N):.3f}" if us else None

    lines = []
    if pairs := {cell.T: cell for cell in results.cells.values() if cell.is_causal}:
        sizes = "B = {0.B}, N/K = {0.N}/{0.K}, H = {0.H}, {0.dtype}".format(next(iter(pairs.values())))
        lines += [f"Causal over full: the quotient of the times. {sizes}.\n", tables.latency(results, pairs, "T", quotient)]
    if equal := {cell.N: cell for cell in results.cells.values() if not cell.is_causal and cell.N == cell.K}:
        sizes = "B = {0.B}, T = {0.T}, H = {0.H}, full, {0.dtype}".format(next(iter(equal.values())))
        lines += [f"\nµs per head, that is time / (B·N). {sizes}.\n", tables.latency(results, equal, "N = K", per_head)]
    return [*lines, "", tables.times(results, "fwd")]


def float32_section(results: Results) -> list[str]:
    return [
        (
            "Cells of the board with float32 inputs, whose products are float32-level by default ([numerics](numerics.md)), beside themselves in bfloat16. "
            "Errors: root mean square against float64, as a fraction of the result's own; after the slash, of the worst gradient. cuDNN "
            "has no float32.\n"
        ),
        tables.dtypes(results),
        "",
        *(tables.times(results, direction) + "\n" for direction in DIRECTIONS if results.contenders(direction)),
    ]


def memory_section(results: Results) -> list[str]:
    cell = Cell(**next(iter(next(iter(results.memory.values())).values()))["cell"])
    others = [run for name, run in results.memory_runs.items() if name not in results.runs]
    whose = "".join(f" Of {run['date']}" + (f", commit {run['commit']}." if run["commit"] else ".") for run in others)
    return [
        f"Temporary MiB of one call, from XLA's own accounting: B = {cell.B}, N/K = {cell.N}/{cell.K}, H = {cell.H}, {cell.dtype}, causal.{whose}\n",
        tables.memory(results),
    ]


SECTIONS = {
    "prefill": prefill_section,
    "lengths": lengths_section,
    "padded": padded_section,
    "decode": decode_section,
    "loops": loops_section,
    "latency": latency_section,
    "float32": float32_section,
}


def performance(boards: dict[str, Results], images: str = "images", others: dict[str, str] | None = None) -> str:
    """A page, whose pictures lie in `images`; others: those of other kinds of GPU, {kind: file}."""
    lines = ["# Performance\n\n<!-- Rendered by python -m benchmarks.report from benchmarks/results/. Do not edit. -->\n"]
    if others:
        lines.append(f"Measured on other GPUs: {', '.join(f'[{device}]({file})' for device, file in others.items())}.\n")
    measured = [results for results in boards.values() if results.runs]
    if not measured:
        lines += [
            f"{'No time' if boards['prefill'].memory else 'Nothing'} has been measured yet: `python -m benchmarks.run --memory --out benchmarks/results/NAME.jsonl`."
        ]
    else:
        described = measured[0].runs.keys()
        again = f"`python -m benchmarks.run --board {' '.join(BOARDS)} --memory --out benchmarks/results/NAME.jsonl`"
        lines += [
            provenance(measured[0]) + f" To measure it yourself: {again}, then `python -m benchmarks.report`.\n",
            *head_section(boards, images),
        ]
    for results in measured:
        if results.cells:
            lines.append(f"\n## {results.board.capitalize()}\n")
            if results.runs.keys() != described:  # how they came about, where that has not just been said
                lines.append(provenance(results) + "\n")
            described = results.runs.keys()
            lines += pictures.links(boards, results.board, images) + SECTIONS[results.board](results) + declined(results)
    if boards["prefill"].memory:
        lines += ["\n## Memory\n", *pictures.links(boards, "memory", images), *memory_section(boards["prefill"])]
    return "\n".join(lines) + "\n"


def readme_section(boards: dict[str, Results]) -> str:
    prefill = boards["prefill"]
    if not prefill.cells:
        return "Nothing has been measured yet.\n"
    run = prefill.runs[max(prefill.runs)]
    return "\n".join([
        f"{run['device']}, jax {run['versions']['jax']}, {run['date']}, bfloat16, default `split_size`; speed as a fraction, above 1 is faster:\n",
        tables.readme(prefill, PALLAS_PEERS), "", *summary(prefill, boards["decode"]),
        "\nEvery contender, the method, the errors and the memory: [docs/performance.md](docs/performance.md).\n",
    ])  # fmt: skip


# Files


def name_of(device: str) -> str:
    """As part of a file's name."""
    return device.removeprefix("NVIDIA ").lower().replace(" ", "-")


def pages_of(found: dict[str, dict[str, Results]]) -> dict[str, tuple[str, dict[str, Results], str]]:
    """{file in docs/: (kind of GPU, its boards, the folder of its pictures)}: of the first kind performance.md."""
    first, *others = found
    pages = {"performance.md": (first, found[first], "images")}
    return pages | {f"performance-{name_of(device)}.md": (device, found[device], f"images/{name_of(device)}") for device in others}


def texts(pages, root: pathlib.Path) -> dict[pathlib.Path, str]:
    """{file: what it should hold}."""
    rendered = {}
    for file, (_, boards, images) in pages.items():
        others = {device: other for other, (device, *_) in pages.items() if other != file}
        rendered[root / "docs" / file] = performance(boards, images, others)
    boards, readme = pages["performance.md"][1], root / "README.md"
    if readme.exists():
        text, (start, end) = readme.read_text(), MARKERS
        if start not in text or end not in text:
            sys.exit(f"{readme} has no section between {start} and {end}")
        rendered[readme] = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{readme_section(boards)}{end}", text, flags=re.S)
    return rendered


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=pathlib.Path, nargs="+", help="JSON lines files; default benchmarks/results/*.jsonl")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="where docs/ and README.md are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    args = parser.parse_args(argv)
    pages = pages_of(records.load(args.results or sorted(ROOT.glob("benchmarks/results/*.jsonl")), quick=bool(args.results)))
    rendered, drawn = texts(pages, args.root), {}
    for _, boards, images in pages.values():
        drawn |= pictures.of(boards, args.root / "docs" / images)
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
        draw().savefig(file, dpi=pictures.DPI)
    print("wrote " + ", ".join(str(file) for file in (*rendered, *drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
