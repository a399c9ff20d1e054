"""The pictures of docs/images, drawn from the `Results` of benchmarks.records. As wide as a page shows them, in colours that
colour-blind readers tell apart (Okabe and Ito's), and with a marker of its own for each contender."""

import collections
import functools
import math
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.peers import OURS, OWN, PEERS
from benchmarks.workloads import DIRECTIONS, TITLES, Cell

DPI = 130
INK, FAINT = "#333333", "#e4e4e4"
STYLES = {
    "flashcore": ("#d55e00", "D"), "flashcore_nosplit": ("#e69f00", "d"), "flashcore_xla": ("#a6761d", "<"), "flashcore_triton": ("#a6761d", ">"), "cudnn": ("#000000", "s"),
    "xla": ("#999999", "X"), "pallas_triton": ("#0072b2", "o"), "pallas_gqa": ("#0072b2", "v"), "pallas_mosaic": ("#56b4e9", "o"),
    "tokamax_triton": ("#009e73", "^"), "tokamax_mosaic": ("#cc79a7", "^"),
}  # fmt: skip
RIVALS = [name for name in PEERS if name not in OWN]


def _figure(rows: int, columns: int, size, **options):
    """A figure and its axes [rows][columns]."""
    from matplotlib.figure import Figure  # an extra, and a second of import: --check does without

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color=FAINT, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return figure, axes


def _legend(figure, names, columns: int) -> None:
    """Above everything, in the order of the contenders."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=STYLES[n][0], marker=STYLES[n][1], ms=6, lw=0, label=PEERS[n].label) for n in PEERS if n in names]
    figure.legend(handles=handles, ncols=columns, fontsize=9, frameon=False, loc="outside upper left")


def _tick(name: str, cell: Cell) -> str:
    shape, heads, *rest = str(cell).split(", ")
    if cell.cached:
        return "\n".join([name, re.sub(" (to|on) ", r"\n\1 ", shape), f"{heads}, {rest[0]}"])
    return "\n".join([name, shape, f"{heads}, {rest[0]}", rest[1].replace(" ", "\n")])


# Where we stand


def draw_who_wins(boards):
    """A heat map for each board and direction: rows are the fastest peer and each peer, columns the cells."""
    panels = _panels(boards)
    heights = [len(leads) + 2.2 for *_, leads in panels]
    figure, axes = _figure(len(panels), 1, (10, 0.28 * sum(heights) + 0.5), height_ratios=heights)
    for ax, (title, results, leads) in zip(axes[:, 0], panels, strict=True):
        cells = list(results.cells)
        heat = [[math.log2(found[cell]) if cell in found else math.nan for cell in cells] for found in leads.values()]
        ax.set_facecolor("#dcdcdc")  # where a peer has no time
        ax.imshow(heat, cmap="BrBG", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
        for y, found in enumerate(leads.values()):
            for x, cell in enumerate(cells):
                text = f"{found[cell]:.2f}" if cell in found else "-"
                ink = "white" if abs(heat[y][x]) > 1 else INK  # on the dark ends of the colours
                ax.text(x, y, text, ha="center", va="center", fontsize=9, color=ink, weight="bold" if y == 0 else "normal")
        ax.axhline(0.5, color="white", linewidth=4)
        ax.set_yticks(range(len(leads)), leads)
        ax.set_xticks(range(len(cells)), [_tick(name, results.cells[name]) for name in cells], fontsize=7.5)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_title(title, loc="left", fontsize=11)
    figure.suptitle("Our speed over the peer's: above 1 (green) we are faster, below 1 (brown) the peer is", fontsize=10, x=0.01, ha="left")
    return figure


def _panels(boards) -> list:
    """[(title, results, {row: {cell: our speed over that peer's}})], the first row over the fastest peer of each cell."""
    found = []
    for board, direction, title in (
        ("prefill", "fwd", "Forward"),
        ("prefill", "fwd+bwd", "Forward + backward"),
        ("decode", "fwd", "Decode"),
    ):
        results = boards[board]
        if best := results.lead(direction, RIVALS):
            peers = [name for name in results.contenders(direction) if name in RIVALS]
            found.append((title, results, {"the fastest peer": best} | {PEERS[p].label: results.lead(direction, [p]) for p in peers}))
    return found


# Against the roofs


def _timed(results) -> list[str]:
    """The directions that have a time."""
    return [direction for direction in DIRECTIONS if results.contenders(direction)]


def draw_prefill(boards):
    results = boards["prefill"]
    shown = _timed(results)
    figure, axes = _figure(len(shown), 1, (10, 3.6 * len(shown) + 0.6))
    for ax, direction in zip(axes[:, 0], shown, strict=True):
        _points(ax, results, direction, list(results.cells), "tflops", "TFLOP/s", "matmul")
        ax.set_title(TITLES[direction], loc="left", fontsize=11)
    _legend(figure, {name for direction in shown for name in results.contenders(direction)}, 4)
    return figure


def _steps(boards) -> list[str]:
    """The cells of one token that have a time, from the least to the most keys that are read: several cells have the same
    batch x context, in other shapes."""
    results = boards["decode"]
    cells = [name for name, cell in results.cells.items() if cell.T == 1 and any(results.ok(name, "fwd", n) for n in PEERS)]
    return sorted(cells, key=lambda name: results.cells[name].lengths.sum())


def draw_decode(boards):
    results, cells = boards["decode"], _steps(boards)
    figure, ((ax,),) = _figure(1, 1, (10, 4.4))
    _points(ax, results, "fwd", cells, "gbps", "GB/s of valid keys and values", "read")
    ticks = [f"{_tick(name, results.cells[name])}\n{results.cells[name].lengths.sum() / 1024:,.4g}k keys" for name in cells]
    ax.set_xticks(range(len(cells)), ticks, fontsize=8)
    ax.set_xlabel("batch x context (valid keys), ascending", fontsize=9)
    _legend(figure, results.contenders("fwd"), 4)
    return figure


def _points(ax, results, direction: str, cells, figure: str, unit: str, roof: str) -> None:
    """Every contender's figure in each cell, side by side; on the right as a fraction of the roof."""
    names = results.contenders(direction)
    step = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        colour, marker = STYLES[name]
        places = {x: r[figure] for x, cell in enumerate(cells) if (r := results.ok(cell, direction, name))}
        ours = name == OURS
        ax.plot(
            [x + (i - (len(names) - 1) / 2) * step for x in places], list(places.values()), marker, ms=8 if ours else 6, color=colour,
            zorder=3 + ours, linestyle="none",
        )  # fmt: skip
    ax.set_xlim(-0.5, len(cells) - 0.5)
    ax.set_xticks(range(len(cells)), [_tick(name, results.cells[name]) for name in cells], fontsize=8)
    for x in range(1, len(cells)):
        ax.axvline(x - 0.5, color=FAINT, linewidth=0.8)
    ax.set_ylabel(unit, fontsize=9)
    ceiling = results.ceilings.get(roof)
    ax.set_ylim(0, ceiling["value"] * 1.1 if ceiling else None)
    if ceiling:
        top = ceiling["value"]
        ax.axhline(top, color=INK, linestyle=":", linewidth=1.2)
        ax.text(len(cells) - 0.6, top * 1.01, f"measured roof: {roof}", ha="right", va="bottom", fontsize=8, color=INK)
        right = ax.secondary_yaxis("right", functions=(lambda y: 100 * y / top, lambda y: y * top / 100))
        right.set_ylabel("% of the roof", fontsize=9)
        right.tick_params(labelsize=9)


# Against the sequence length


def _by_length(boards) -> dict[int, dict[tuple[str, str], dict[int, dict]]]:
    """{head dim: {(direction, contender): {T: record}}} of the board lengths and of what the board prefill has of its kind."""

    def kind(cell):
        return cell.N == cell.K, cell.B * cell.T, cell.N * cell.H, cell.is_causal, cell.window, cell.dtype

    lengths = boards["lengths"]
    kinds = {kind(cell) for cell in lengths.cells.values()}
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for results in (boards["prefill"], lengths):
        for name, cell in results.cells.items():
            for direction in DIRECTIONS if kind(cell) in kinds else ():
                for contender in lengths.contenders(direction):
                    if record := results.ok(name, direction, contender):
                        found[cell.H][direction, contender][cell.T] = record
    return dict(sorted(found.items()))


def _of_one_commit(boards) -> bool:
    """If not, a line through the times of two programs would show neither."""
    return len({run["commit"] for board in ("prefill", "lengths") for run in boards[board].runs.values()}) == 1


def _lines(ax, found, direction: str, figure, joined: bool) -> None:
    for (of, name), records in found.items():
        if of == direction:
            points = {T: figure(record) for T, record in sorted(records.items())}
            (colour, marker), ours = STYLES[name], name == OURS
            ax.plot(list(points), list(points.values()), color=colour, marker=marker, ls="-" if joined else "", ms=7 if ours else 5, lw=2.4 if ours else 1.5, zorder=3 + ours)  # fmt: skip
    ticks = sorted({T for records in found.values() for T in records})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{T // 1024}k" if T >= 1024 else T for T in ticks])
    ax.minorticks_off()


def draw_lengths(boards):
    found = _by_length(boards)
    figure, axes = _figure(2, len(found), (10, 6.2), sharey=True, sharex="col")
    roof = boards["lengths"].ceilings.get("matmul")
    for row, direction in zip(axes, DIRECTIONS, strict=True):
        for ax, (H, lines) in zip(row, found.items(), strict=True):
            _lines(ax, lines, direction, lambda record: record["tflops"], _of_one_commit(boards))
            ax.set_title(f"{TITLES[direction]}, head dim {H}", loc="left", fontsize=10)
            if roof:
                ax.axhline(roof["value"], color=INK, linestyle=":", linewidth=1.2)
            ax.set_ylim(bottom=0)
        row[0].set_ylabel("TFLOP/s" + (" (dotted: matrix product)" if roof else ""), fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("T", fontsize=9)
    _legend(figure, {name for lines in found.values() for _, name in lines}, 5)
    return figure


def draw_time(boards):
    """Of the middle head dim: on this scale the others look alike."""
    found = _by_length(boards)
    H = list(found)[len(found) // 2]
    figure, (axes,) = _figure(1, 2, (10, 4), sharey=True)
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        _lines(ax, found[H], direction, lambda record: record["time_us"]["median"] / record["cell"]["B"], _of_one_commit(boards))
        ax.set_yscale("log")
        ax.set_title(f"{TITLES[direction]}, head dim {H}", loc="left", fontsize=10)
        ax.set_xlabel("T", fontsize=9)
    axes[0].set_ylabel("µs per sequence (time / B)", fontsize=9)
    _legend(figure, {name for _, name in found[H]}, 5)
    return figure


def draw_memory(boards):
    memory = boards["prefill"].memory
    figure, ((ax,),) = _figure(1, 1, (10, 4))
    for (name, direction), found in memory.items():
        points = {T: r["temp_bytes"] / 2**20 for T, r in sorted(found.items()) if r["temp_bytes"]}
        colour, marker = STYLES[name]
        style = "-" if direction == "fwd+bwd" else "--"
        ax.plot(list(points), list(points.values()), style, marker=marker, color=colour, ms=5, label=f"{PEERS[name].label}, {TITLES[direction].lower()}")  # fmt: skip
    cells = [Cell(**r["cell"]) for r in next(iter(memory.values())).values()]
    logits = {cell.T: 4 * cell.B * cell.N * cell.T**2 / 2**20 for cell in cells}
    ax.plot(list(logits), list(logits.values()), ":", color=INK, label="one float32 array of all logits, for comparison")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(logits), [f"{T // 1024}k" if T >= 1024 else T for T in logits])
    ax.set_yscale("log")
    ax.set_xlabel("T", fontsize=9)
    ax.set_ylabel("temporary memory of one call, MiB", fontsize=9)
    figure.legend(fontsize=9, ncols=3, frameon=False, loc="outside upper left")
    return figure


# Which are drawn


class Picture(NamedTuple):
    draw: Callable  # (boards) -> figure
    section: str  # that shows it
    what: str
    present: Callable  # (boards) -> whether there is anything to draw


PICTURES = {
    "who_wins": Picture(draw_who_wins, "who_wins", "Our speed over that of each peer, in every cell", _panels),
    "prefill": Picture(
        draw_prefill,
        "prefill",
        "TFLOP/s of every contender, and the fraction of a matrix product's",
        lambda boards: _timed(boards["prefill"]),
    ),
    "lengths": Picture(draw_lengths, "lengths", "TFLOP/s against the sequence length, for each head dim", _by_length),
    "time": Picture(draw_time, "lengths", "Time of one sequence against its length", _by_length),
    "decode": Picture(
        draw_decode,
        "decode",
        "GB/s of every contender by batch x context, and the fraction of a plain read's",
        _steps,
    ),
    "memory": Picture(draw_memory, "memory", "Temporary memory against T", lambda boards: boards["prefill"].memory),
}


def links(boards, section: str, folder: str) -> list[str]:
    """The Markdown of a section's pictures, which lie in a folder."""
    shown = {name: p for name, p in PICTURES.items() if p.section == section and p.present(boards)}
    return [f"![{p.what}]({folder}/{name}.png)\n" for name, p in shown.items()]


def of(boards, folder: pathlib.Path) -> dict[pathlib.Path, Callable]:
    """{file: the function that draws it}."""
    return {folder / f"{name}.png": functools.partial(p.draw, boards) for name, p in PICTURES.items() if p.present(boards)}
