"""What is read off a compiled program: the copies that it makes of a cache."""

import concurrent.futures
import functools
import multiprocessing

import jax
import jax.numpy as jnp
import pytest

from benchmarks import aot, hlo, loops, workloads

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
