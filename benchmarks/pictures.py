"""The pictures of docs/images, drawn from the `Results` of benchmarks.report."""

import functools
import pathlib

from benchmarks.peers import BASELINE, OURS, PEERS
from benchmarks.workloads import DIRECTIONS, TITLES, Cell

COLOURS = {
    "flashcore": "#d1495b", "flashcore_nosplit": "#f0a6ae", "flashcore_xla": "#edae49", "cudnn": "#66a182", "xla": "#b0b0b0",
    "pallas_triton": "#2e6f9e", "pallas_gqa": "#2e6f9e", "pallas_mosaic": "#8db8d8", "tokamax_triton": "#5b3a8c", "tokamax_mosaic": "#b39bd1",
}  # fmt: skip


def of(boards, folder: pathlib.Path) -> dict[pathlib.Path, object]:
    """{file: the function that draws it}."""
    prefill, decode = boards["prefill"], boards["decode"]
    drawn = {"prefill_tflops": (draw_tflops, prefill), "prefill_fraction": (draw_fraction, prefill)} if prefill.cells else {}
    drawn |= {"memory": (draw_memory, prefill)} if prefill.memory else {}
    drawn |= {"decode_bandwidth": (draw_bandwidth, decode)} if decode.cells else {}
    return {folder / f"{name}.png": functools.partial(draw, results) for name, (draw, results) in drawn.items()}


def _axes(rows: int, size):
    from matplotlib.figure import Figure  # an extra, and a second of import: --check does without

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def draw_tflops(results):
    figure, axes = _axes(2, (13, 8))
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        names = results.contenders(direction)
        width = 0.85 / max(len(names), 1)
        for i, name in enumerate(names):
            found = {x: record["tflops"] for x, cell in enumerate(results.cells) if (record := results.ok(cell, direction, name))}
            ax.bar(
                [x + (i - (len(names) - 1) / 2) * width for x in found],
                list(found.values()),
                width,
                color=COLOURS[name],
                label=PEERS[name].label,
            )
        if "matmul" in results.ceilings:
            roof = results.ceilings["matmul"]
            ax.axhline(roof["value"], color="#444444", linestyle=":", linewidth=1)
            ax.annotate(
                f"matrix product ({roof['what']})",
                (len(results.cells) - 0.5, roof["value"]),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#444444",
            )
        ax.set_xticks(range(len(results.cells)), [_tick(name, cell) for name, cell in results.cells.items()], fontsize=8)
        ax.set_ylabel("TFLOP/s")
        ax.set_title(TITLES[direction], loc="left")
    axes[0].legend(ncols=5, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08))
    return figure


def draw_bandwidth(results):
    """Bars, from the least to the most keys that are read: several cells have the same batch x context, in other shapes."""
    cells = sorted((name for name, cell in results.cells.items() if cell.T == 1), key=lambda name: results.cells[name].lengths.sum())
    names = results.contenders("fwd")
    figure, (ax,) = _axes(1, (13, 5))
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        found = {x: record["gbps"] for x, cell in enumerate(cells) if (record := results.ok(cell, "fwd", name))}
        places = [x + (i - (len(names) - 1) / 2) * width for x in found]
        ax.bar(places, list(found.values()), width, color=COLOURS[name], label=PEERS[name].label)
    if roof := results.ceilings.get("read"):
        ax.axhline(roof["value"], color="#444444", linestyle=":", linewidth=1)
        ax.annotate(f"read ({roof['what']})", (len(cells) - 0.5, roof["value"]), ha="right", va="bottom", fontsize=8, color="#444444")
    ticks = []
    for name in cells:
        cell = results.cells[name]
        shape, heads, size = str(cell).split(", ")
        ticks.append(f"{name}\n{shape}\n{heads}, {size}\n{cell.lengths.sum() / 1024:,.4g}k keys")
    ax.set_xticks(range(len(cells)), ticks, fontsize=8)
    ax.set_xlabel("batch x context (valid keys), ascending")
    ax.set_ylabel("GB/s of valid keys and values")
    ax.set_title("Decode, one token per row", loc="left")
    ax.legend(ncols=len(names), fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.06))
    return figure


def draw_fraction(results):
    figure, axes = _axes(2, (11, 7))
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        names = [name for name in results.contenders(direction) if name != BASELINE]
        for i, name in enumerate(names):
            ratios = results.ratios(direction, name)
            places = [list(results.cells).index(cell) + (i - (len(names) - 1) / 2) * 0.07 for cell in ratios]
            ours = name == OURS
            ax.plot(
                places,
                list(ratios.values()),
                "D" if ours else "o",
                ms=8 if ours else 6,
                color=COLOURS[name],
                label=PEERS[name].label,
                zorder=3 + ours,
            )
        ax.axhline(1, color=COLOURS[BASELINE], linewidth=1.5)
        ax.annotate("cuDNN", (-0.45, 1), ha="left", va="bottom", fontsize=8, color=COLOURS[BASELINE])
        ax.set_xlim(-0.5, len(results.cells) - 0.5)
        ax.set_ylim(bottom=0)
        ax.set_xticks(range(len(results.cells)), [_tick(name, cell) for name, cell in results.cells.items()], fontsize=8)
        ax.set_ylabel("speed, cuDNN = 1")
        ax.set_title(TITLES[direction], loc="left")
    axes[0].legend(ncols=4, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08))
    return figure


def draw_memory(results):
    figure, (ax,) = _axes(1, (8, 5))
    for (name, direction), found in results.memory.items():
        points = {T: r["temp_bytes"] / 2**20 for T, r in sorted(found.items()) if r["temp_bytes"]}
        style = "-o" if direction == "fwd+bwd" else "--o"
        ax.plot(
            list(points), list(points.values()), style, color=COLOURS[name], ms=4, label=f"{PEERS[name].label}, {TITLES[direction].lower()}"
        )
    cells = [Cell(**r["cell"]) for r in next(iter(results.memory.values())).values()]
    logits = {cell.T: 4 * cell.B * cell.N * cell.T**2 / 2**20 for cell in cells}
    ax.plot(list(logits), list(logits.values()), ":", color="#888888", label="one float32 array of all logits, for comparison")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("T")
    ax.set_ylabel("temporary memory of one call, MiB")
    ax.legend(fontsize=8, frameon=False)
    return figure


def _tick(name: str, cell: Cell) -> str:
    shape, heads, *rest = str(cell).split(", ")
    return "\n".join([name, shape, f"{heads}, {rest[0]}", rest[1]])
