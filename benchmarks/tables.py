"""The Markdown tables of docs/performance.md and the README, from the `Results` of benchmarks.records."""

import math
import statistics

from benchmarks.peers import BASELINE, NO_SPLIT, OURS, PEERS
from benchmarks.records import SLOWER, Results
from benchmarks.workloads import DIRECTIONS, TITLES

ABSENT = "-"
SHAPE = "B x T, N/K, H"


def table(head, rows) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(x: float, digits: int = 0) -> str:
    """Small numbers keep three digits, so that a CPU's are not all zero."""
    return f"{x:.{digits}f}" if x >= 10 ** (1 - digits) else f"{x:.3g}"


def mib(n: float) -> str:
    return number(n / 2**20, 1)


def label(contender: str) -> str:
    """A peer's; the forms of a loop are called by their names."""
    return PEERS[contender].label if contender in PEERS else contender


def geometric_mean(values) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def speeds(results: Results, direction: str, figure: str = "tflops", cells=None, head: str = SHAPE) -> str:
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

    def mean(name):
        ratios = {} if name == BASELINE else results.ratios(direction, name, results.summarised)
        note = "" if len(ratios) == len(results.summarised) else f" ({len(ratios)} of {len(results.summarised)})"
        return f"{geometric_mean(ratios.values()):.2f}{note}" if ratios else ""

    rows = [[f"{name}: {results.cells[name]}", *(entry(name, contender) for contender in names)] for name in cells]
    if set(results.summarised) & set(cells):
        first, *_, last = results.summarised
        rows.append([f"geometric mean, {first} to {last}", *map(mean, names)])
    return table([head, *map(label, names)], rows)


def time_entry(results: Results, *key: str) -> str:
    """A time in µs; in brackets that of the run before, and the change. Bold where it became slower, or has no time any more."""
    now, before, change = results.time_us(*key), results.before_us(*key), results.change(*key)
    text = number(now, 1) if now else ABSENT
    if change is None:
        return text
    text += f" ({number(before, 1)}, {change:+.1%})" if now else f" ({number(before, 1)})"
    return f"**{text}**" if change > SLOWER else text


def times(results: Results, direction: str) -> str:
    """Our times and the baseline's beside those of the run before, and what the default `split_size` adds."""
    names = [name for name in (OURS, NO_SPLIT, BASELINE) if name in results.contenders(direction)]
    compared = {OURS, NO_SPLIT} <= set(names)

    def added(cell):
        ours, free = (results.time_us(cell, direction, name) for name in (OURS, NO_SPLIT))
        return f"{ours / free - 1:+.1%}" if ours and free else ABSENT

    rows = [
        [f"{name}: {cell}", *(time_entry(results, name, direction, n) for n in names), *([added(name)] if compared else [])]
        for name, cell in results.cells.items()
    ]
    return table([f"{SHAPE}: µs", *map(label, names), *(["default against None"] if compared else [])], rows)


def errors(results: Results) -> str:
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

    return table([SHAPE, *map(label, names)], [[c, *(entry(c, name) for name in names)] for c in results.cells])


def loops(results: Results) -> str:
    def row(cell, form):
        record = results.times[cell, "fwd"].get(form)
        if record is None or record["status"] != "ok":
            return [f"{record['status']}: {record['reason']}" if record else ABSENT, *[""] * 6]
        copied = ", ".join(f"{count} {opcode}" for opcode, count in record["copies"].items()) or "none"
        return [
            time_entry(results, cell, "fwd", form), number(record["turn_us"], 1),
            f"{1 / record['ratio']:.3f}" if record["ratio"] else ABSENT, number(record["wall_us"]),
            f"{mib(record['temp_bytes'])} ({record['temp_bytes'] / record['cache_bytes']:.2%})", copied,
            f"{record['max_diff']['out']:.1g}" if record.get("max_diff") else ABSENT,
        ]  # fmt: skip

    rows = [[f"{name}: {what}", *row(name, form)] for name, cell in results.cells.items() for form, what in cell.forms.items()]
    head = [
        "B x S, N/K, H: " + ", ".join(dict.fromkeys(map(str, results.cells.values()))), "kernel time, µs", "per layer or step",
        "time, unrolled = 1", "from Python, µs", "temporary MiB (of the cache)", "copies", "difference from unrolled",
    ]  # fmt: skip
    return table(head, rows)


def latency(results: Results, cells, head: str, figure) -> str:
    """A row for each of {its title: cell}, with `figure(cell, contender)`, None where it lacks."""
    names = results.contenders("fwd")
    return table([head, *map(label, names)], [[title, *(figure(cell, name) or ABSENT for name in names)] for title, cell in cells.items()])


def dtypes(results: Results) -> str:
    """Our float32 beside our bfloat16, cell by cell: "NAME-float32" and "NAME-bfloat16"."""

    def row(name, cell):
        found = []
        for direction in DIRECTIONS:
            wide, narrow = (results.ok(f"{name}-{dtype}", direction, OURS) for dtype in ("float32", "bfloat16"))
            times = [r["time_us"]["median"] if r else None for r in (wide, narrow)]
            found += [number(t, 1) if t else ABSENT for t in times]
            found.append(f"{times[0] / times[1]:.2f}" if all(times) else ABSENT)
            errors = wide.get("relative", {}) if wide else {}
            gradients = [error for result, error in errors.items() if result != "out"]
            found.append(" / ".join(f"{e:.1e}" for e in (errors.get("out"), max(gradients, default=None)) if e is not None) or ABSENT)
        return [f"{name}: {cell}", *found]

    names = {cell.name.removesuffix("-float32"): cell for cell in results.cells.values() if cell.dtype == "float32"}
    figures = ["µs in float32", "in bfloat16", "quotient", "float32's error"]
    head = [SHAPE, *(f"{TITLES[direction].lower()}: {figure}" for direction in DIRECTIONS for figure in figures)]
    return table(head, [row(name, cell) for name, cell in names.items()])


def memory(results: Results) -> str:
    columns = [(name, direction) for name in PEERS for direction in DIRECTIONS if (name, direction) in results.memory]
    lengths = sorted({T for found in results.memory.values() for T in found})
    rows = [[f"{T:,}", *(mib(results.memory[c][T]["temp_bytes"]) if T in results.memory[c] else ABSENT for c in columns)] for T in lengths]
    return table(["T", *(f"{label(name)}, {TITLES[direction].lower()}" for name, direction in columns)], rows)


def best_of(results: Results, peers) -> str:
    """What to call the fastest of these peers: by its name, where only one was timed."""
    timed = [name for name in peers if any(group.get(name, {}).get("status") == "ok" for group in results.times.values())]
    return label(timed[0]) if len(timed) == 1 else "the best other Pallas kernel"


def readme(results: Results, peers) -> str:
    """Our speed alone, and against the baseline's and the fastest of `peers`."""
    lead = {direction: results.lead(direction, peers) for direction in DIRECTIONS}

    def figures(cell, direction):
        ours, over = results.ok(cell, direction, OURS), lead[direction].get(cell)
        return [
            number(ours["tflops"]) if ours else ABSENT,
            f"{ours['ratio']:.2f}" if ours and ours["ratio"] else ABSENT,
            f"{over:.2f}" if over else ABSENT,
        ]

    rows = [[f"{name}: {cell}", *(x for d in DIRECTIONS for x in figures(name, d))] for name, cell in results.cells.items()]
    of = ["of cuDNN", f"of {best_of(results, peers)}"]
    return table([SHAPE, "forward, TFLOP/s", *of, "with backward, TFLOP/s", *of], rows)
