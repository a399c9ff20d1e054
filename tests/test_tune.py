"""The tuner on a CPU: two tiles of a kernel go the whole way, wrong ones never reach the file, and the package takes what is in it."""

import dataclasses
import json
import math
import os
import pathlib
from types import SimpleNamespace

import jax
import pytest

from benchmarks import aot, kernels, tune
from benchmarks.kernels import Job, gpu_here
from flashcore_jax.errors import OptionError
from flashcore_jax.problem import problem_of
from flashcore_jax.tuning import tile_rows
from flashcore_jax.tuning.gpus import gpu_of
from flashcore_jax.tuning.tiles import bucket_tiles, tiles_for

H200, HERE = gpu_of("NVIDIA H200"), gpu_here()
SHIPPED = bucket_tiles(H200, 16, 64, {})


def bucket(**fields):
    return dataclasses.replace(tune.Bucket(H200, "bfloat16", 64, SHIPPED, quick=True), **fields)


def row(kernel="dq", block_k=64, head_dim=64, **fields):
    about = {"gpu": HERE.kind, "bits": 16, "head_dim": head_dim, "kernel": kernel}
    return about | {"block_q": 32, "block_k": block_k, "num_warps": 4, "num_stages": 1, "reason": "measured"} | fields


def in_file(file):
    return {(r["bits"], r["head_dim"], r["kernel"]): r for r in json.loads(file.read_text())}


def taken(file, monkeypatch, head_dim=64):
    """The tiles that a fresh process would take with this user's file."""
    monkeypatch.setenv("FLASHCORE_TILES", str(file))
    tile_rows.user_rows.cache_clear()
    try:
        query = jax.ShapeDtypeStruct((1, 8, 2, head_dim), "float16")
        return tiles_for(HERE, problem_of(query, query, query, is_causal=True))
    finally:
        tile_rows.user_rows.cache_clear()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    file = folder / "new" / "tiles.json"
    file.parent.mkdir()
    file.write_text(json.dumps([row(), row(head_dim=128)]))
    arguments = ["--quick", "--head-dim", "64", "--kernel", "decode", "dq", "--out", str(file), "--all", str(folder / "all.jsonl")]
    assert tune.main(arguments) == 0
    return file, [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]


def test_a_quick_run_writes_rows_that_the_package_takes(quick_run, monkeypatch):
    file, _ = quick_run
    found = in_file(file)
    assert set(found) == {(16, 64, "decode"), (16, 64, "dq"), (16, 128, "dq")}
    assert found[16, 128, "dq"] == row(head_dim=128)
    tiles = taken(file, monkeypatch)
    for kernel in ("decode", "dq"):
        r = found[16, 64, kernel]
        tile = getattr(tiles, kernel)
        assert (tile.block_q, tile.block_k, tile.num_warps, tile.reason) == (r["block_q"], r["block_k"], r["num_warps"], r["reason"])
        assert tile.reason.startswith("ragged ")
        assert all(word in tile.reason for word in (" us", "%", jax.__version__))
    shipped = bucket_tiles(HERE, 16, 64, {})
    assert tiles.decode.block_k == shipped.decode.block_k
    assert (tiles.forward, tiles.closing, tiles.dkdv) == (shipped.forward, shipped.closing, shipped.dkdv)
    assert list(file.parent.iterdir()) == [file]


def test_every_measurement_is_kept(quick_run):
    _, (about, *records) = quick_run
    assert about["kind"] == "run"
    assert about["command"].startswith("python -m benchmarks.tune --quick")
    assert [r["kernel"] for r in records] == ["dq"] * 3 + ["decode"] * 2 or [r["kernel"] for r in records] == ["decode"] * 2 + ["dq"] * 3
    assert all(r["status"] == "ok" and r["us"]["ragged"] > 0 and r["run"] == about["run"] for r in records)
    assert [r.get("heads_fastest") for r in records if r["kernel"] == "dq"] == [None, None, False]  # the best one's programs turned round


def test_a_wrong_candidate_is_loud_and_never_written(tmp_path, monkeypatch, capsys):
    here = bucket(gpu=HERE, tiles=bucket_tiles(HERE, 16, 64, {}))
    (right, wrong), call = here.candidates("dq"), Job.call

    def five_percent_too_much(self, *operands):
        found = call(self, *operands)
        return found if self.tile == right else tuple(x * 1.05 for x in found)

    monkeypatch.setattr(Job, "call", five_percent_too_much)
    file, measurements = tmp_path / "tiles.json", tmp_path / "all.jsonl"
    arguments = ["--quick", "--head-dim", "64", "--kernel", "dq", "--out", str(file), "--all", str(measurements)]
    assert tune.main(arguments) == 1
    printed = capsys.readouterr().err
    assert f"WRONG 16 bits, head dim 64: dq ragged {kernels.name_of(wrong)}: dquery at " in printed
    assert "of its gate" in printed
    (written,) = in_file(file).values()
    assert [written[name] for name in ("block_q", "block_k", "num_warps", "num_stages")] == list(dataclasses.astuple(right)[:4])
    assert not any("us" in r and r["us"] for r in map(json.loads, measurements.read_text().splitlines()) if r.get("status") == "wrong")


def test_other_bits_are_a_fault():
    job = Job("dq", bucket().ragged("dq"), bucket().in_force("dq"))
    program, verifier = job.compile(), tune.Verifier(bucket(), "dq")
    assert verifier.reference is None  # on a CPU no bits are promised
    (gradient,) = program(*verifier.operands)
    verifier.reference = (gradient,)
    assert verifier.fault(program) == ""
    verifier.reference = (gradient.at[1, 0, 0, 0].add(1e-2),)
    assert verifier.fault(program) == "not the bits of the tile in force"


@pytest.fixture
def contest(monkeypatch):
    """`contest(kernel, times)`: a `tune.Contest` in which {(tile number, cell): µs}, else 100 and a little more for each tile, is measured."""
    timed = []

    def make(kernel, times, facts=None):
        whole = bucket(quick=False, head_dim=128, tiles=bucket_tiles(H200, 16, 128, {}))
        tiles = whole.candidates(kernel)
        cells = [w.name for w in whole.cells(kernel)]

        def measure(_, programs, samples, on_error):
            timed.extend((job.tile, job.workload.name, samples) for job in programs)
            number = {tile: i for i, tile in enumerate(tiles)}
            return {
                job: times.get((number.get(job.tile), cells.index(job.workload.name)), 100.0 + number.get(job.tile, 99)) for job in programs
            }

        monkeypatch.setattr(tune, "measure", measure)
        monkeypatch.setattr(tune, "Verifier", lambda *_: SimpleNamespace(fault=lambda program: ""))
        monkeypatch.setattr(tune.run, "compile_all", lambda jobs, threads: dict.fromkeys(jobs))
        return tune.Contest(whole, kernel, {tile: {} for tile in tiles} | (facts or {}), 1), tiles, timed

    return make


def test_the_best_few_meet_on_every_cell(contest):
    """The tile in force, number 0, is slow; 5 is the best in the first cell, 7 over all of them."""
    found, tiles, timed = contest("dq", {(0, 0): 200.0, (5, 0): 80.0, (7, 0): 90.0, (5, 1): 120.0, (7, 1): 70.0})
    row = found.best(12)
    assert [row[name] for name in ("block_q", "block_k", "num_warps", "num_stages")] == list(dataclasses.astuple(tiles[7])[:4])
    assert row["reason"].startswith("P2 90 us, P4 70 us, P1 107 us; ")
    assert {tile for tile, cell, _ in timed if cell == "P2"} > set(tiles)
    turned = dataclasses.replace(tiles[5], heads_fastest=False)
    assert {tile for tile, cell, _ in timed if cell == "P4"} == {tiles[0], tiles[5], tiles[7], tiles[1], tiles[2], turned}
    assert {samples for _, cell, samples in timed if cell == "P4"} == {12}


def test_the_tile_in_force_stays_unless_beaten_by_a_percent(contest):
    for us, stays in ((99.5, True), (98.0, False)):
        found, tiles, _ = contest("decode", {(3, cell): us for cell in range(3)})
        row = found.best(12)
        assert (found.winner == tiles[0]) is stays
        assert "heads_fastest" not in row
        assert all(tile.heads_fastest for tile in found.records)  # decode's programs have one order


def test_a_pruned_tile_is_not_timed_and_spills_are_written_down(contest):
    whole = bucket(head_dim=128, tiles=bucket_tiles(H200, 16, 128, {}), quick=False)
    mine, other, *_ = whole.candidates("dkdv")
    found, _, timed = contest("dkdv", {}, {mine: {"registers": 255, "spills": 116}, other: {"reason": "spills 3000 bytes"}})
    row = found.best(12)
    assert row["spills"].startswith("116 bytes in P2")
    assert other not in {tile for tile, _, _ in timed}
    assert found.records[other]["status"] == "pruned"


class Measured:
    """In the place of `tune.Contest`: the tile in force is the best, but for the kernels that find none."""

    fails = ()

    def __init__(self, bucket, kernel, facts, threads):
        self.winner, self.records = bucket.in_force(kernel), {}
        self.about = {
            "gpu": HERE.kind,
            "capability": "{}.{}".format(*HERE.capability),
            "bits": bucket.bits,
            "head_dim": bucket.head_dim,
            "kernel": kernel,
        }
        self.job = None

    def best(self, samples):
        if self.about["kernel"] in self.fails:
            return None
        return self.about | tune.fields_of(self.winner) | {"reason": "measured"}


@pytest.mark.parametrize("fails", ["", "decode"])
def test_another_block_k_is_for_all_three_kernels_or_for_none(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(tune, "Contest", Measured)
    monkeypatch.setattr(Measured, "fails", (fails,))
    file = tmp_path / "tiles.json"
    assert tune.main(["--quick", "--head-dim", "64", "--kernel", "forward", "dq", "--block-k", "128", "--out", str(file)]) == 0
    tiles = taken(file, monkeypatch)
    expected = 64 if fails else 128
    assert [tiles.forward.block_k, tiles.closing.block_k, tiles.decode.block_k] == [expected] * 3
    assert tiles.dq.reason == "measured"
    assert len(in_file(file)) == (1 if fails else 4)


def test_without_a_block_k_it_stays_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "Contest", Measured)
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps([row(kernel, block_k=32) for kernel in tile_rows.ON_THE_KEY_GRID]))
    assert tune.main(["--quick", "--head-dim", "64", "--kernel", "forward", "--out", str(file)]) == 0
    assert {r["block_k"] for r in in_file(file).values()} == {32}


def test_rows_that_the_package_would_refuse_are_not_written(tmp_path):
    file = tmp_path / "tiles.json"
    tune.merge(file, [row()])
    before = file.read_text()
    for bad in ([row("forward", block_k=128)], [row(block_q=48)], [row(head_dim=80)]):
        with pytest.raises(OptionError, match=str(file)):
            tune.merge(file, bad)
    assert file.read_text() == before
    file.write_text("gone wrong")
    with pytest.raises(OptionError, match=str(file)):
        tune.merge(file, [row()])
    assert file.read_text() == "gone wrong"


def test_merging_keeps_other_rows_and_is_one_step(tmp_path, monkeypatch):
    file = tmp_path / "tiles.json"
    tune.merge(
        file,
        [
            row(gpu="NVIDIA H200"),
            row(gpu="NVIDIA H200", head_dim=256),
            row(gpu="NVIDIA L4"),
            row(gpu="NVIDIA of tomorrow", capability="13.0"),
        ],
    )
    # An H100 is of the same architecture as an H200, with a row of its own.
    tune.merge(file, [row(gpu="NVIDIA H200", block_q=64), row(block_q=128, gpu="NVIDIA H100")])
    listed = json.loads(file.read_text())
    assert [(r["gpu"], r["head_dim"], r["block_q"]) for r in listed] == [
        ("NVIDIA H200", 64, 64), ("NVIDIA H200", 256, 32), ("NVIDIA L4", 64, 32), ("NVIDIA of tomorrow", 64, 32), ("NVIDIA H100", 64, 128),
    ]  # fmt: skip
    before = file.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.merge(file, [row(block_q=128)])
    assert file.read_text() == before


class Aborting(Job):
    def call(self, *operands):
        os.abort()


@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_what_does_not_compile_is_pruned_with_its_reason(monkeypatch):
    whole = bucket(quick=False)
    (shape, *_), (tile, *_) = whole.cells("dq"), whole.candidates("dq")
    large = dataclasses.replace(tile, num_stages=16)
    jobs = [Job("dq", shape, tile), Job("dq", shape, large), Aborting("dq", shape, tile)]
    monkeypatch.setattr(tune, "target_gpu", lambda: H200)
    fine, too_large, aborted = tune.prune(whole, jobs, 2).values()
    assert "reason" not in fine
    assert fine["registers"] > 0
    assert fine["spills"] == 0
    assert "Shared memory" in too_large["reason"]
    assert aborted["reason"] == aot.ABORTED


def test_where_nothing_compiles_nothing_is_pruned(monkeypatch):
    jobs = [Job("dq", bucket().ragged("dq"), tile) for tile in bucket().candidates("dq")]
    monkeypatch.setattr(tune, "target_gpu", lambda: H200)
    monkeypatch.setattr(aot, "unavailable", lambda: None)
    monkeypatch.setattr(aot, "in_processes", lambda work, jobs, workers: ((job, {"reason": "no ptxas"}) for job in jobs))
    assert tune.prune(bucket(), jobs, 1) == {job: {} for job in jobs}


def test_heavy_spills_prune_all_but_the_tile_in_force(monkeypatch):
    jobs = [Job("dq", bucket().ragged("dq"), tile) for tile in bucket().candidates("dq")]
    facts = {"registers": 255, "spills": tune.SPILLED + 4}
    monkeypatch.setattr(tune, "target_gpu", lambda: H200)
    monkeypatch.setattr(aot, "unavailable", lambda: None)
    monkeypatch.setattr(aot, "in_processes", lambda work, jobs, workers: ((job, dict(facts)) for job in jobs))
    first, other = tune.prune(bucket(), jobs, 1).values()
    assert first == facts
    assert other["reason"] == f"spills {facts['spills']} bytes"
    assert all("reason" not in found for found in tune.prune(bucket(dtype="float32"), jobs, 1).values())


def test_cells_keep_the_width_of_the_boards_models():
    for head_dim, N in ((64, 32), (128, 16), (256, 8)):
        w = bucket(quick=False, head_dim=head_dim).cells("closing")[0]
        assert (w.B, w.T, w.S, w.N, w.K, w.H, w.split_size) == (4, 4096, 4096, N, N, head_dim, 2048)
        assert w.name == ("P2" if head_dim == 128 else f"P2 at {head_dim}")
    for kernel in tile_rows.KERNELS:
        for w in bucket(quick=False).cells(kernel):
            assert (w.S > (w.split_size or w.S)) == (kernel in ("closing", "decode")) or kernel in ("dkdv", "dq")
            assert len(Job(kernel, w, bucket().in_force(kernel)).operands) == {"dkdv": 6, "dq": 6, "decode": 5}.get(kernel, 3)


def test_no_step_begins_that_may_outlast_the_budget(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(tune.time, "perf_counter", lambda: now)
    budget, allowed = tune.Budget(24), []
    for now in (1.0, 11.0, 16.0):  # the second step took 10 s: a third may end at 26
        allowed.append(budget.allows(f"at {now:g}"))
    assert allowed == [True, True, False]
    assert "at 16: left out" in capsys.readouterr().err
    assert tune.Budget(math.inf).allows("any")


@pytest.mark.parametrize(("arguments", "says"), [(["--quick"], "--out"), ([], "no NVIDIA GPU here")])
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tunes in earnest")
def test_no_row_comes_from_a_machine_without_a_gpu_unasked(capsys, arguments, says):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert says in capsys.readouterr().err
