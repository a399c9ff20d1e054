"""Breaks the package on purpose, one line at a time, and requires that the tests that should notice go red.

    python tests/mutations.py                 every mutation
    python tests/mutations.py NAME...         some of them

Each mutation edits a copy of the package in a temporary directory and runs the named tests there: all of them must fail, by
a wrong number (AssertionError) or a hazard that the simulator of Hopper kernels meets, and not by a crash. The same tests must pass in an unedited copy.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Edit(NamedTuple):
    file: str  # under flashcore_jax/
    old: str  # occurs exactly once
    new: str


class Mutation(NamedTuple):
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def _contract(*workloads: str) -> tuple[str, ...]:
    return tuple(f"tests/test_contract.py::test_forward_lse_and_gradients[triton-{name}]" for name in workloads)


def _simulated(case: str) -> str:
    return f"tests/test_mosaic_simulated.py::test_output_log_sum_exp_and_gradients[{case}]"


def _clusters(case: str) -> str:
    return f"tests/test_mosaic_simulated.py::test_decode[{case}]"


def _by_splits(case: str) -> str:
    return f"tests/test_mosaic_simulated.py::test_decode_by_splits[{case}]"


def _sharing(case: str) -> str:
    return f"{_CACHED}::test_programs_that_share_a_split_change_nothing[{case}]"


_PLAIN, _CAUSAL, _RATIO = "head dim 40", "two splits, causal, more keys", "head dim 64, causal, 7:1"
_ONES = "tests/test_semantics.py::test_ones_stay_ones[triton--30-17-100-False-bfloat16]"
_NOBODY = "tests/test_semantics.py::test_a_row_that_sees_nothing[triton-more queries than keys]"
_HEADS = "tests/test_semantics.py::test_every_query_head_reads_its_groups_key_value_head[triton-8-2]"
_POISON = "tests/test_semantics.py::test_poison_beyond_the_lengths_changes_nothing[triton-lengths, causal-nan]"
_CACHED = "tests/test_cached_attention.py"
_CHUNKS = f"{_CACHED}::test_prefill_and_decode_is_the_whole[triton]"
_FORWARD, _BACKWARD = "kernels/triton/forward.py", "kernels/triton/backward.py"
_HOPPER, _HOPPER_BACKWARD = "kernels/mosaic_gpu/forward.py", "kernels/mosaic_gpu/backward.py"
_CLUSTERS, _SPLITS = "kernels/mosaic_gpu/clusters.py", "kernels/mosaic_gpu/splits.py"
_DECODE, _APPEND, _LAUNCH = "kernels/triton/decode.py", "kernels/triton/append.py", "kernels/triton/launch.py"
_BY_PARTS = "tests/test_products.py::test_attention_by_parts"

MUTATIONS = {
    "a product of two parts is left out": Mutation(
        (Edit(_LAUNCH, "(0, 1), (1, 0), (0, 0))", "(0, 1), (0, 0))"),),
        (f"{_BY_PARTS}[decode]", "tests/test_products.py::test_six_products_of_parts_are_float32_accurate[1]"),
    ),
    "the third part holds the second again": Mutation(
        (Edit(_LAUNCH, "(first, second, rest - second)", "(first, second, rest)"),),
        (f"{_BY_PARTS}[forward and backward]", "tests/test_products.py::test_the_parts_of_a_number_add_up_to_it"),
    ),
    "no mask of key columns": Mutation(
        (Edit("masks.py", "seen = (i < query_length) & (j < key_length)", "seen = (i < query_length) & (j >= 0)"),),
        (*_contract(_PLAIN, "lengths"), _ONES),
    ),
    "top-left alignment": Mutation(
        (Edit("masks.py", "seen = (i < query_length) & (j < key_length)", "seen, p = (i < query_length) & (j < key_length), i + 0 * j"),),
        _contract(_CAUSAL, "window (16, 0)"),
    ),
    "query position shifted by one": Mutation(
        (Edit("masks.py", "seen = (i < query_length) & (j < key_length)", "seen, p = (i < query_length) & (j < key_length), p + 1"),),
        _contract(_CAUSAL, "window 0"),
    ),
    "no left bound of the window": Mutation(
        (Edit("masks.py", "seen &= j >= p - band.left", "seen &= j >= 0"),),
        _contract("window (16, 0)", "everything"),
    ),
    "one key block too few": Mutation(
        (
            Edit(
                "masks.py",
                "stop = jnp.maximum(first, quotient(jnp.maximum(hi, 0) + (block - 1), block))",
                "stop = jnp.maximum(first, hi // block)",
            ),
        ),
        _contract(_PLAIN, _CAUSAL),
    ),
    "interleaved heads": Mutation(
        (Edit(_FORWARD, "lambda t, n: (quotient(n, p.G), 0)", "lambda t, n: (lax.rem(n, p.K), 0)"),),
        _contract(_CAUSAL, "lengths, causal"),  # more than 16 queries: fewer are decode's
    ),
    "no rescale": Mutation(
        (Edit("online_softmax.py", "partial.row_sum * rescale[..., None, None]", "partial.row_sum"),),
        _contract("schedule's own splits", "window 100, causal"),
    ),
    "no rescale between splits": Mutation(
        (Edit("online_softmax.py", "for x in (old, one.running_max))", "for x in (new, one.running_max))"),),
        _contract("three splits, float32", "three splits, causal"),
    ),
    "the first split is left out": Mutation(
        (Edit(_FORWARD, "close, close(first, nothing))", "close, nothing)"),),
        _contract("three splits, float32", "three splits, causal"),
    ),
    "the lse's cotangent forgotten": Mutation(
        (Edit(_BACKWARD, ".swapaxes(1, 2) - dlse", ".swapaxes(1, 2)"),),
        _contract(_PLAIN, _RATIO),
    ),
    "one head of the group in dK and dV": Mutation(
        (Edit(_BACKWARD, "lax.fori_loop(jnp.int32(0), jnp.int32(problem.G),", "lax.fori_loop(jnp.int32(0), jnp.int32(1),"),),
        (*_contract(_PLAIN, _RATIO), _HEADS),
    ),
    "no slope of the soft cap": Mutation(
        (Edit("logits.py", "gradient * (1.0 - scores * scores)", "gradient"),),
        _contract("soft cap 2, causal", "everything"),
    ),
    "cotangents of empty rows let in": Mutation(
        (
            Edit(
                _BACKWARD,
                "is_row = sees_any(queries, query_length, key_length, problem.band) if masked else None",
                "is_row = queries < problem.T if masked else None",
            ),
        ),
        (_NOBODY, _POISON),
    ),
    "interleaved heads in decode": Mutation(
        (
            Edit(
                _DECODE,
                "queries < row.lengths[0], queries * p.N + kv_head * p.G + head\n",
                "queries < row.lengths[0], queries * p.N + head * p.K + kv_head\n",
            ),
        ),
        (*_contract("one query, causal, three splits"), _HEADS),
    ),
    "the last split not merged": Mutation(
        (Edit(_DECODE, "(first <= split) & (split < end)", "(first <= split) & (split < end - 1)"),),
        (*_contract("one query, causal, three splits"), _CHUNKS),
    ),
    "splits before the window merged": Mutation(
        (Edit(_DECODE, "(first <= split) & (split < end)", "(split < end)"),),
        (_sharing("lengths, window, soft cap"),),
    ),
    "the last of many splits not merged": Mutation(
        (Edit(_DECODE, "exist & (split < end), (b", "exist & (split < end - 1), (b"),),
        ("tests/test_cached_semantics.py::test_more_splits_than_are_merged_at_once[triton]",),
    ),
    "scores computed first without a mask": Mutation(
        (Edit(_DECODE, "(block, masked=True)", "(block, masked=False)"),),
        (_sharing("one query, three splits"), _sharing("lengths, window, soft cap")),
    ),
    "every part of value's columns in the first one's place": Mutation(
        (Edit(_DECODE, "start=c.start + part * c.width", "start=c.start + 0 * part"),),
        (_sharing("one split"),),
    ),
    "rows of one length have one place": Mutation(
        (Edit(_DECODE, "lengths * size + (size - 1 - rows)", "lengths * size"),),
        tuple(f"{_CACHED}::test_{test}" for test in ("the_order_of_the_rows_changes_nothing[3-3]", "rows_are_taken_by_their_lengths")),
    ),
    "the shortest rows first": Mutation(
        (Edit(_DECODE, "numbers[:, None] > numbers[None, :]", "numbers[:, None] < numbers[None, :]"),),
        (f"{_CACHED}::test_rows_are_taken_by_their_lengths",),
    ),
    "every layer's rows are the first one's": Mutation(
        (Edit("kernels/triton/blocks.py", "every == layer[0]", "every == 0"),),
        (
            f"{_CACHED}::test_a_scan_over_layers_is_separate_caches[triton-1]",
            "tests/test_cache.py::test_append_to_a_layer_leaves_the_others[triton-traced]",
        ),
    ),
    "appended one slot late": Mutation(
        (Edit(_APPEND, "pl.ds(start + first, tile.block_q)", "pl.ds(start + first + 1, tile.block_q)"),),
        ("tests/test_cache.py::test_append_writes_behind_each_row_and_nowhere_else[triton-5-float16]", _CHUNKS),
    ),
    "appended to the first layer": Mutation(
        (Edit(_APPEND, "(rows.layer_within(more_refs[-1][0], layers),)", "(0 * more_refs[-1][0],)"),),
        ("tests/test_cache.py::test_append_to_a_layer_leaves_the_others[triton-traced]",),
    ),
    "the second load of splits is the first again": Mutation(
        (Edit(_DECODE, "partial(first + group * at_once + i)", "partial(first + 0 * group + i)"),),
        ("tests/test_cached_semantics.py::test_more_splits_than_are_merged_at_once[triton]",),
    ),
    "every program of a row writes the first tokens": Mutation(
        (Edit(_APPEND, "written = first + lax.iota", "written = 0 * first + lax.iota"),),
        ("tests/test_cache.py::test_an_append_of_several_programs_a_row[triton-None]",),
    ),
    "a layer below 0 is the first": Mutation(
        (Edit("rows.py", "jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)", "jnp.clip(layer, 0, layers - 1)"),),
        tuple(f"tests/test_cache.py::test_a_traced_layer_counts_from_the_end_and_is_clamped[{name}--1-2-1]" for name in ("triton", "xla")),
    ),
    "the maximum not rounded up": Mutation(
        (Edit("online_softmax.py", "jnp.ceil(jnp.max(scores, axis=-1) * log2_scale)", "jnp.max(scores, axis=-1) * log2_scale"),),
        (
            "tests/test_online_softmax.py::test_the_maximum_is_an_integer_and_above_every_score[3.0]",
            "tests/test_online_softmax.py::test_rescaling_changes_no_bit_but_the_exponent",
        ),
    ),
    "sums never closed": Mutation(
        (Edit(_FORWARD, "closes = p.split_size is not None and p.S > p.split_size", "closes = False"),),
        ("tests/test_semantics.py::test_every_split_size_has_its_own_bits[triton-33]",),
    ),
    "a window without bound from S on": Mutation(
        (Edit("problem.py", "None if side >= T + S else int(side)", "None if side >= S else int(side)"),),
        _contract("window (30, 70), more queries than keys"),
    ),
    "the scale's sign lost under a soft cap": Mutation(
        (Edit("logits.py", "tanh(products * (scale / logits_soft_cap))", "tanh(products * (abs(scale) / logits_soft_cap))"),),
        _contract("scale below 0, soft cap 5"),
    ),
    "room is not checked": Mutation(
        (Edit("rows.py", "overflowed | (count > capacity - length)", "overflowed | (count > 9 * capacity)"),),
        ("tests/test_cached_errors.py::test_overflow_under_jit_is_nan_for_that_row_and_only_it[triton-7]",),
    ),
    "the new tokens are not counted": Mutation(
        (Edit("kv_attention.py", "cache.length, cache.overflowed", "cache.length - query.shape[1], cache.overflowed"),),
        (_CHUNKS,),
    ),
    # Of the Hopper kernels what no product of right numbers shows on every machine: who waits for whom.
    "Hopper: values are let go before they were multiplied": Mutation(
        (
            Edit(
                _HOPPER,
                "            wait_for_values(block - 1)\n",
                "            wait_for_values(block - 1)\n            leave_values(block - 1)\n",
            ),
            Edit(
                _HOPPER,
                "                registers.in_use(before)\n                leave_values(block - 1)\n",
                "",
            ),
        ),
        (_simulated("causal-fetching first"),),
    ),
    "Hopper: the output is overwritten while it is copied": Mutation(
        (
            Edit(
                _HOPPER,
                "                plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n                if closes",
                "                if closes",
            ),
        ),
        (_simulated("full, head dim 128-fetching first"),),
    ),
    "Hopper: a split is parked on the output": Mutation(
        (Edit(_HOPPER, "                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last", "                pass  # the last"),),
        (_simulated("splits, head dim 128-fetching first"),),
    ),
    "Hopper: blocks that others see are not let go": Mutation(
        (Edit(_HOPPER, "                    leave(free)(block)\n", ""),),
        (_simulated("causal-at random"),),
    ),
    "Hopper: warpgroups that a piece does not use write": Mutation(
        (Edit(_HOPPER, "@pl.when(first_query < schedule.rows)", "@pl.when(first_query >= 0)"),),
        ("tests/test_mosaic_simulated.py::test_pieces_of_tiles_have_the_same_bits[{}]",),
    ),
    "Hopper: no tile breaks into pieces": Mutation(
        (Edit("kernels/mosaic_gpu/schedule.py", "_CLOSE = 1.01", "_CLOSE = 2"),),
        ("tests/test_mosaic.py::test_the_longest_program_of_a_cell[P7]", "tests/test_mosaic.py::test_the_longest_program_of_a_cell[P9]"),
    ),
    "Hopper: every program begins a group with its longest tile": Mutation(
        (Edit("kernels/mosaic_gpu/schedule.py", "turned = p.band.left is None or p.band.right is None", "turned = False"),),
        ("tests/test_mosaic.py::test_programs_begin_a_group_at_different_tiles",),
    ),
    "Hopper: tiles far apart share a window": Mutation(
        (Edit("kernels/mosaic_gpu/schedule.py", "turned = p.band.left is None or p.band.right is None", "turned = True"),),
        ("tests/test_mosaic.py::test_programs_begin_a_group_at_different_tiles",),
    ),
    "Hopper: the next tile's queries take this one's place": Mutation(
        (
            Edit(
                _HOPPER,
                "return remainder(turn, plan.places) * plan.computing + warpgroup if plan.places > 1 else warpgroup",
                "return warpgroup",
            ),
        ),
        (_simulated("causal-fetching first"),),
    ),
    "Hopper: queries are let go before the last block's scores": Mutation(
        (
            Edit(_HOPPER, "    leave_queries()\n\n    def last", "    def last"),
            Edit(
                _HOPPER,
                "    no_acc, lowest, no_sum = nothing_yet(p)\n",
                "    leave_queries()\n    no_acc, lowest, no_sum = nothing_yet(p)\n",
            ),
        ),
        (
            _simulated("causal-fetching first"),
            _simulated("everything but lengths-fetching first"),
        ),
    ),
    "Hopper: a tile without blocks keeps its queries": Mutation(
        (Edit(_HOPPER, "pl.when(any_block == 0)(leave", "pl.when(any_block < 0)(leave"),),
        (_simulated("splits, head dim 128-at random"),),
    ),
    "Hopper backward: blocks that were fetched ahead are fetched again": Mutation(
        (Edit(_HOPPER_BACKWARD, "start = jnp.where(g == 0, ahead, blocks.start)", "start = blocks.start"),),
        (_simulated("causal-at random"),),
    ),
    "Hopper: any way to end earlier is worth it": Mutation(
        (Edit("kernels/mosaic_gpu/schedule.py", "_WORTH = 0.98", "_WORTH = 1.0"),),
        ("tests/test_mosaic.py::test_programs_have_as_many_tiles_where_no_other_way_is_worth_it",),
    ),
    "Hopper backward: its own rows are let go too early": Mutation(
        (
            Edit(
                _HOPPER_BACKWARD,
                "            plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n            plgpu.barrier_arrive(own_free.at[own])",
                "            plgpu.barrier_arrive(own_free.at[own])\n            plgpu.wait_smem_to_gmem(0, wait_read_only=True)",
            ),
        ),
        (_simulated("full, head dim 128-fetching first"),),
    ),
    "Hopper backward: values are let go while they are multiplied": Mutation(
        (
            Edit(_HOPPER_BACKWARD, "                plgpu.barrier_arrive(v_free.at[of_value])\n\n", ""),
            Edit(
                _HOPPER_BACKWARD,
                "                _, ds = _ds_of",
                "                plgpu.barrier_arrive(v_free.at[of_value])\n                _, ds = _ds_of",
            ),
        ),
        (_simulated("head dim 256, splits-fetching first"),),
    ),
    "Hopper backward: vectors are not padded": Mutation(
        (Edit(_HOPPER_BACKWARD, "(0, -p.T % ROWS + ROWS)", "(0, 0)"),),
        (_simulated("causal-at random"),),
    ),
    "Hopper backward: queries beyond the length are multiplied": Mutation(
        (Edit(_HOPPER_BACKWARD, "                if masked and _may_see_no_key(p):\n", "                if False:\n"),),
        (_simulated("lengths-at random"), _simulated("head dim 256, more queries than keys, causal-at random")),
    ),
    "Hopper: rows beyond the length become 0 for threads alone": Mutation(
        (
            Edit(
                "kernels/mosaic_gpu/registers.py",
                "            clear_rows(tile, first, stop)\n        plgpu.commit_smem()",
                "            clear_rows(tile, first, stop)",
            ),
        ),
        (_simulated("keys' lengths alone, causal-at random"), _simulated("lengths-at random")),
    ),
    "Hopper backward: the sums of keys beyond the length are theirs": Mutation(
        (Edit(_HOPPER_BACKWARD, "registers.only((0, keys), first_key, x * factor) if p.key_lengths else x * factor", "x * factor"),),
        (_simulated("lengths, head dim 256-at random"),),
    ),
    "Hopper backward: deltas of queries that see no key": Mutation(
        (Edit(_HOPPER_BACKWARD, "jnp.where(lse == -jnp.inf, 0.0, delta)", "delta"),),
        (_simulated("more queries than keys, causal-at random"),),
    ),
    "Hopper backward: probabilities are read before they are handed on": Mutation(
        (Edit(_HOPPER_BACKWARD, "        plgpu.barrier_wait(p_full.at[place])\n", ""),),
        (_simulated("head dim 256, splits-fetching first"),),
    ),
    "clusters: weights are read before all have met": Mutation(
        (Edit(_CLUSTERS, "        )  # fmt: skip\n        fragments.meet()\n", "        )  # fmt: skip\n"),),
        (_clusters("a row-at random"),),
    ),
    "clusters: values beyond the length are multiplied": Mutation(
        (Edit(_CLUSTERS, "                if p.key_lengths:  # 0 times", "                if False:  # 0 times"),),
        (_clusters("rows of other length-fetching first"),),
    ),
    "clusters: keys are let go while they are multiplied": Mutation(
        (Edit(_CLUSTERS, "k_smem.at[slot, of_keys]), wait_n=0)", "k_smem.at[slot, of_keys]), wait_n=1)"),),
        (_clusters("a row-fetching first"),),
    ),
    "clusters: values take places that nobody has left": Mutation(
        (Edit(_CLUSTERS, "            @pl.when(number >= stages)\n", "            @pl.when((number >= stages) & (number < keys))\n"),),
        (_clusters("splits, lengths, a window-at random"),),
    ),
    "clusters: a query of the group is another's": Mutation(
        (Edit(_CLUSTERS, "lengths, p.band, p.G)\n", "lengths, p.band, 1)\n"),),
        (_clusters("splits-fetching first"),),
    ),
    "splits: a block is left out": Mutation(
        (Edit(_SPLITS, "fetch(block - 1 + _STAGES, ref", "fetch(block + _STAGES, ref"),),
        (_by_splits("splits"),),
    ),
    "splits: a block more is fetched": Mutation(
        (Edit(_SPLITS, "(block - 1 + _STAGES < count)", "(block - 1 + _STAGES <= count)"),),
        (_by_splits("splits"),),
    ),
    "splits: a query of the group is another's": Mutation(
        (Edit(_SPLITS, "group=p.G, real_rows", "group=1, real_rows"),),
        (_by_splits("a window that ends within a split, soft cap"),),
    ),
    "splits: eight rows are real": Mutation(
        (Edit(_SPLITS, "real_rows=p.G", "real_rows=8"),),
        (_by_splits("every row of the tile is real"),),
    ),
    "splits: all first splits are of the longest row": Mutation(
        (Edit(_SPLITS, "(lengths_ref, order_smem, b)", "(lengths_ref, order_smem, 0 * b)"),),
        (_by_splits("rows of other length"),),
    ),
    "splits: rows' numbers are those of another layer": Mutation(
        (Edit(_SPLITS, "range(1, layers), ref[0, b]", "range(2, layers), ref[0, b]"),),
        ("tests/test_mosaic_simulated.py::test_decode_by_splits_of_a_stacked_cache[3]",),
    ),
}


def run_tests(edits: tuple[Edit, ...], tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Runs `tests` in a copy of the package with `edits` made."""
    with tempfile.TemporaryDirectory() as copy:
        copy = pathlib.Path(copy)
        for folder in ("flashcore_jax", "tests", "benchmarks"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for edit in edits:
            path = copy / "flashcore_jax" / edit.file
            text = path.read_text()
            if text.count(edit.old) != 1:
                raise LookupError(f"{edit.old!r} occurs {text.count(edit.old)} times in {edit.file}: bring the mutation up to date")
            path.write_text(text.replace(edit.old, edit.new))
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def survives(name: str) -> str | None:
    """None if every test of the mutation fails by an assertion; else what pytest printed."""
    mutation = MUTATIONS[name]
    ran = run_tests(*mutation)
    failed = re.findall(r"^FAILED .*$", ran.stdout, re.MULTILINE)
    by_a_number = all(re.search(r" - (AssertionError|assert |hopper_simulator\.Hazard)", line) for line in failed)
    noticed = ran.returncode == 1 and len(failed) == len(mutation.tests) and by_a_number
    return None if noticed else ran.stdout + ran.stderr


def main(names: list[str]) -> int:
    names = names or list(MUTATIONS)
    tests = tuple(dict.fromkeys(test for name in names for test in MUTATIONS[name].tests))
    unedited = run_tests((), tests)
    if unedited.returncode != 0:
        print("the tests fail without any mutation:", unedited.stdout, unedited.stderr, sep="\n")
        return 1
    print(f"{'no mutation':40} green")
    survivors = 0
    for name in names:
        output = survives(name)
        survivors += output is not None
        print(f"{name:40} {'red' if output is None else 'NOT NOTICED by all of its tests' + chr(10) + output}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
