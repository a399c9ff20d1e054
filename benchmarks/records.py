"""Which of the committed measurements are shown, and which stand beside them as "the run before".

Shown, for each board and direction: the newest run that measured ours and timed the baseline in all of the board's cells, with
every contender of that one run. Where no run has all cells, the newest of those that have most, and the cells that it lacks from others
of the same commit. A run of a few cells never replaces a whole one; `Results.left_out` names the newer ones. Only runs on one kind of device count.

The run before, of a cell, direction and contender: the newest older run that timed just that, by the same clock.
"""

import collections
import dataclasses
import json
import math

from benchmarks import loops
from benchmarks.peers import BASELINE, NO_SPLIT, OURS, PEERS
from benchmarks.workloads import BOARDS, DIRECTIONS, QUICK_BOARDS, SUMMARIES, Cell, Loop, cell_of

SLOWER = 0.03  # marked from here on: about twice the spread of one cell's times


@dataclasses.dataclass
class Results:
    """What is shown of one board."""

    board: str
    runs: dict[str, dict] = dataclasses.field(default_factory=dict)  # {run: its record} of the times, oldest first
    cells: dict[str, Cell | Loop] = dataclasses.field(default_factory=dict)
    times: dict[tuple[str, str], dict[str, dict]] = dataclasses.field(default_factory=dict)  # [cell, direction][contender]
    before: dict[tuple[str, str, str], dict] = dataclasses.field(default_factory=dict)  # [cell, direction, contender]
    left_out: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)  # [direction, newer run]: cells
    ceilings: dict[str, dict] = dataclasses.field(default_factory=dict)
    memory: dict[tuple[str, str], dict[int, dict]] = dataclasses.field(default_factory=dict)  # [contender, direction][T]
    memory_runs: dict[str, dict] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> tuple[str, ...]:
        return ("scan",) if self.board == "loops" else (OURS, NO_SPLIT)

    @property
    def baseline(self) -> str:
        return loops.BASELINE if self.board == "loops" else BASELINE

    @property
    def summarised(self) -> tuple[str, ...]:
        """The cells of the geometric mean."""
        return SUMMARIES.get(self.board, ())

    def ok(self, cell: str, direction: str, contender: str) -> dict | None:
        record = self.times.get((cell, direction), {}).get(contender)
        return record if record and record["status"] == "ok" else None

    def time_us(self, cell: str, direction: str, contender: str) -> float | None:
        record = self.ok(cell, direction, contender)
        return record["time_us"]["median"] if record else None

    def before_us(self, cell: str, direction: str, contender: str) -> float | None:
        record = self.before.get((cell, direction, contender))
        return record["time_us"]["median"] if record else None

    def ratios(self, direction: str, contender: str, among=None) -> dict[str, float]:
        """{cell: the baseline's time over the contender's}: above 1 is faster than the baseline."""
        found = {cell: self.ok(cell, direction, contender) for cell in among or self.cells}
        return {cell: r["ratio"] for cell, r in found.items() if r and r["ratio"]}

    def contenders(self, direction: str) -> list[str]:
        return [name for name in PEERS if any(self.ok(cell, direction, name) for cell in self.cells)]

    def lead(self, direction: str, peers) -> dict[str, float]:
        """{cell: our speed over that of the fastest of these peers}."""
        found = {}
        for cell in self.cells:
            ours, theirs = self.time_us(cell, direction, OURS), [self.time_us(cell, direction, name) for name in peers]
            if ours and any(theirs):
                found[cell] = min(t for t in theirs if t) / ours
        return found

    def change(self, *key: str) -> float | None:
        """A (cell, direction, contender)'s time over that of the run before, minus 1; infinity where it has no time any more."""
        now, before = self.time_us(*key), self.before_us(*key)
        return None if before is None else now / before - 1 if now else math.inf

    def changes(self, contenders) -> dict[tuple[str, str, str], float]:
        return {key: self.change(*key) for key in self.before if key[2] in contenders}

    def measured(self, group: dict, quick: bool) -> list[str]:
        """The board's cells in which a run's records of one direction, {(cell, contender): record}, have ours and the baseline's time."""
        cells = (QUICK_BOARDS if quick else BOARDS)[self.board]
        timed = {cell for (cell, contender), r in group.items() if contender == self.baseline and r["status"] == "ok"}
        return [cell.name for cell in cells if cell in timed and (cell, self.ours[0]) in group]

    def choose(self, direction: str, groups: dict[str, dict], runs: dict[str, dict]) -> None:
        """Fills in one direction from {run: {(cell, contender): record}}, oldest run first."""
        measured = {run: self.measured(group, runs[run]["quick"]) for run, group in groups.items()}
        shown = max(groups, key=lambda run: (len(measured[run]), run))
        of_cell = dict.fromkeys((cell.name for cell, _ in groups[shown]), shown)
        for run in sorted(groups, reverse=True):
            if runs[run]["commit"] == runs[shown]["commit"]:
                of_cell = dict.fromkeys(measured[run], run) | of_cell
        self.left_out |= {(direction, run): cells for run, cells in measured.items() if run > shown and run not in of_cell.values()}
        for run in dict.fromkeys(of_cell.values()):
            for (cell, contender), record in groups[run].items():
                if of_cell.get(cell.name) == run:
                    self.cells[cell.name] = cell
                    self.times.setdefault((cell.name, direction), {})[contender] = record
                    for other, group in groups.items():
                        r = group.get((cell, contender))
                        if other < run and r and r["status"] == "ok" and r["clock"] == record.get("clock", r["clock"]):
                            self.before[cell.name, direction, contender] = r


def load(files, quick: bool = False) -> dict[str, dict[str, Results]]:
    """{kind of device: {board: its results}}, that with the newest run first, from JSON lines files; `quick`: from the runs of tiny
    cells, too."""
    records = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
    records.sort(key=lambda r: r["run"])
    runs = {r["run"]: r for r in records if r["kind"] == "run" and (quick or not r["quick"])}
    found = {}
    for device in dict.fromkeys(r["device"] for r in reversed(runs.values())):
        own = {run: r for run, r in runs.items() if r["device"] == device}
        found[device] = {board: _load(board, [r for r in records if r["run"] in own], own) for board in BOARDS}
    return found or {"": {board: Results(board) for board in BOARDS}}


def _load(board: str, records: list[dict], runs: dict[str, dict]) -> Results:
    results = Results(board)
    for direction in DIRECTIONS:
        groups = collections.defaultdict(dict)
        for r in records:
            # The first runs knew one board, and did not name it.
            if r["kind"] == "time" and r.get("board", "prefill") == board and r["direction"] == direction:
                groups[r["run"]][cell_of(board, r["cell"]), r["contender"]] = r
        if groups:
            results.choose(direction, groups, runs)
    if board == "prefill":
        for r in records:
            if r["kind"] == "memory" and r["status"] == "ok":
                results.memory.setdefault((r["contender"], r["direction"]), {})[r["cell"]["T"]] = r

    def used(groups):
        names = {r["run"] for group in groups.values() for r in group.values()}
        return {run: r for run, r in runs.items() if run in names}

    results.runs, results.memory_runs = used(results.times), used(results.memory)
    results.ceilings = {r["name"]: r for r in records if r["kind"] == "ceiling" and r["run"] in results.runs}
    places = {cell.name: place for place, cell in enumerate(BOARDS[board])}
    results.cells = dict(sorted(results.cells.items(), key=lambda item: places.get(item[0], len(places))))
    return results
