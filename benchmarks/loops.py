"""Loops over a cache: what it costs to have the layers in one stack, or the steps in one loop, and what is copied for it.

Kernel time holds no memcpy, which is what XLA makes of a copy that it may not leave out. So the copies are read off the
optimized HLO, beside the temporary memory and the time on the host's clock.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo, timing
from benchmarks.peers import reason_of
from benchmarks.timing import say
from benchmarks.workloads import Loop
from flashcore_jax.testing import UNIT_ROUNDOFF

BASELINE = "unrolled"


class Wrong(Exception):
    """A form's results are not those of the other."""


def attend(x, cache, layer=None):
    """One layer and token. Its output is the next one's query, and heads of its query stand in for the projected key and value."""
    from flashcore_jax import attention_with_kv_cache

    K = cache.key.shape[-2]
    return attention_with_kv_cache(x, x[:, :, :K], x[:, :, -K:], cache, layer=layer)


def _cache(arrays, rows):
    from flashcore_jax import KVCache

    return KVCache(*arrays, *rows)


def _parts(cache):
    return (cache.key, cache.value), (cache.length, cache.overflowed)


def one_scan(cell: Loop, x, arrays, rows):
    """All turns: (x, arrays, rows) afterwards. `arrays` are the cache's key and value, `rows` its length and overflowed.

    A `fori_loop`, which is a scan over the counter it carries. Scanned over `jnp.arange(layers)`, JAX would fetch each number
    from memory: 3 µs a turn (results/tiles/h200-2026-11-22-layers.jsonl).
    """

    def visit(layer, carry):
        return attend(*carry, layer if cell.layers > 1 else None)

    x, cache = jax.lax.fori_loop(0, cell.turns, visit, (x, _cache(arrays, rows)))
    return x, *_parts(cache)


def unrolled_layers(cell: Loop, x, arrays, rows):
    """As `one_scan`, of a list of caches."""
    caches = []
    for one_layer in zip(arrays, rows, strict=True):
        x, cache = attend(x, _cache(*one_layer))
        caches.append(_parts(cache))
    return x, *map(list, zip(*caches, strict=True))


def one_step(cell: Loop, x, arrays, rows):
    x, cache = attend(x, _cache(arrays, rows))
    return x, *_parts(cache)


@dataclasses.dataclass(frozen=True)
class Form:
    """One of a loop's two forms: `calls` calls of a program (x, arrays, rows) -> (x, arrays, rows)."""

    program: object
    calls: int
    is_list: bool  # of caches, in place of one cache

    def inputs(self, cell: Loop, x, arrays, rows):
        """Its own copy of the inputs, for it consumes them; of the arrays of the cell's one cache."""
        if not self.is_list:
            return x, jax.tree.map(jnp.copy, arrays), rows
        return x, *([jax.tree.map(lambda a, at=at: a[at], arrays) for at in range(cell.layers)] for arrays in (arrays, rows))

    def lower(self, cell: Loop, inputs):
        return jax.jit(functools.partial(self.program, cell), donate_argnums=1).lower(*inputs)

    def run(self, compiled, x, rows, arrays):
        """-> (x, arrays). The rows start anew every time: the cache is filled once more."""
        for _ in range(self.calls):
            x, arrays, rows = compiled(x, arrays, rows)
        return x, arrays


def forms(cell: Loop) -> dict[str, Form]:
    by_layers = cell.layers > 1
    return {
        "scan": Form(one_scan, 1, is_list=False),
        BASELINE: Form(unrolled_layers, 1, is_list=True) if by_layers else Form(one_step, cell.steps, is_list=False),
    }


@functools.partial(jax.jit, static_argnums=0)
def inputs_of(cell: Loop, key):
    """(x, (key, value), (length, overflowed)): a cache with room for `steps` tokens."""
    stack = (cell.layers,) if cell.layers > 1 else ()
    shapes = (cell.B, 1, cell.N, cell.H), *[(*stack, cell.B, cell.S, cell.K, cell.H)] * 2
    x, *arrays = (jax.random.normal(k, shape).astype(cell.dtype) for k, shape in zip(jax.random.split(key, 3), shapes, strict=True))
    rows = (*stack, cell.B)
    return x, tuple(arrays), (jnp.full(rows, cell.S - cell.steps, jnp.int32), jnp.zeros(rows, bool))


def _written(cell: Loop, form: Form, x, arrays) -> list[np.ndarray]:
    """What a form has computed: x, and the tokens that were written, [L, B, steps, K, H] each."""
    if form.is_list:
        arrays = [jnp.stack([a[part][:, -cell.steps :] for a in arrays]) for part in (0, 1)]
    return [np.asarray(a, np.float64) for a in (x, *(a[..., -cell.steps :, :, :] for a in arrays))]


def _first_run(cell: Loop, form: Form, inputs):
    """Compiles a form and runs it once: (what its program is, what it wrote, the form to be timed)."""
    x, arrays, rows = form.inputs(cell, *inputs)
    compiled = form.lower(cell, (x, arrays, rows)).compile()
    memory = compiled.memory_analysis()
    facts = {
        "temp_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes, "cache_bytes": cell.cache_bytes,
        "copies": hlo.copies(compiled.as_text(), cell.layer_elements),
    }  # fmt: skip
    out, arrays = form.run(compiled, x, rows, arrays)
    return facts, _written(cell, form, out, arrays), timing.Carrying(functools.partial(form.run, compiled, x, rows), arrays)


def measure(cell: Loop, samples: int):
    """Yields one record for each form."""
    records = {name: {"kind": "time", "cell": dataclasses.asdict(cell), "direction": "fwd", "contender": name} for name in cell.forms}
    inputs = inputs_of(cell, jax.random.key(0))
    contenders, truth = {}, None

    def stop(name, error):
        status = "wrong" if isinstance(error, Wrong) else "failed"
        records[name] |= {"status": status, "reason": reason_of(error)}
        say(f"{cell.name} {name:10} {status}: {reason_of(error)}")

    for name, form in sorted(forms(cell).items(), key=lambda item: item[0] != BASELINE):  # the other is compared with it
        try:
            facts, results, carrying = _first_run(cell, form, inputs)
            records[name] |= facts
            truth = results if name == BASELINE else truth
            if truth is not None:
                difference = float(np.max([np.max(np.abs(a - b)) for a, b in zip(results, truth, strict=True)]))
                records[name]["max_diff"] = {"out": difference}
                if not difference <= 4 * UNIT_ROUNDOFF[cell.dtype] * max(np.max(np.abs(a)) for a in truth):  # NaN too
                    raise Wrong(f"differs from {BASELINE} by {difference:.3g}")
            contenders[name] = carrying
        except Exception as e:
            stop(name, e)
    del inputs

    for name, (clock, times) in timing.interleaved(contenders, samples, stop).items():
        records[name] |= timing.summary(contenders[name], clock, times)
    baseline = records[BASELINE].get("time_us", {}).get("median")
    for name, record in records.items():
        if record["status"] == "ok":
            median = record["time_us"]["median"]
            record |= {"turn_us": median / cell.turns, "ratio": baseline / median if baseline else None}
            say(
                f"{cell.name} {name:10} {median:9.1f} µs ({record['clock']}), {record['turn_us']:.1f} per turn, "
                f"{record['wall_us']:.0f} from Python, {record['temp_bytes'] / cell.cache_bytes:.2%} of the cache as temporary memory, "
                f"copies: {record['copies'] or 'none'}"
            )
        yield record
