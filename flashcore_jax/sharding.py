"""Several devices. Rows of the batch and key/value heads are independent of each other: every device computes its own.

On a mesh of explicit axes (the default of `jax.make_mesh`) an array's type says how it is shared out, and `shards_of` makes a `shard_map`
of a call. On automatic axes XLA decides that when it compiles: `partitioned` tells it how a kernel's arrays hang together. In a
`shard_map` of the caller's there is nothing to do.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh, and its axes that the batch and the heads are shared out over, or None."""

    mesh: object
    batch: object
    heads: object

    def spec(self, axes: str) -> PartitionSpec:
        """Of an array with these axes, one letter each: b is the batch, n are query heads, k key/value heads."""
        return PartitionSpec(*({"b": self.batch, "n": self.heads, "k": self.heads}.get(axis) for axis in axes))

    def run(self, function, static: tuple, arrays, of_arrays, of_results):
        """function(*static, *arrays), by every device on its part of the arrays, whose axes are given as strings; one of them may be
        None. The rest is hashable."""
        specs = tuple(None if x is None else self.spec(axes) for x, axes in zip(arrays, of_arrays, strict=True))
        return _by_everyone(function, static, self.mesh, specs, tuple(map(self.spec, of_results)), *arrays)


# Jitted, because only there can arrays that are on no mesh yet be laid out over this one.
@functools.partial(jax.jit, static_argnums=range(5))
def _by_everyone(function, static: tuple, mesh, specs, out_specs, *arrays):
    arrays = (x if spec is None else jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))
    part = functools.partial(function, *static)
    # Unchecked: Pallas's interpreter mixes values that vary over the mesh with those that do not.
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def shards_of(tokens, heads: int) -> Shards | None:
    """From the arrays of `tokens`, [B, T, heads, ...] or stacked, that say so, the first ones before the others. Heads are shared out
    where that leaves whole key/value heads, of which there are so many."""
    found = [sharding for sharding in (jax.typeof(x).sharding for x in tokens) if sharding.mesh.explicit_axes]
    mesh, specs = found[0].mesh if found else jax.sharding.get_abstract_mesh(), [sharding.spec[-4:] for sharding in found]
    if not mesh.explicit_axes:
        return None
    return _shards(mesh, [spec[0] for spec in specs], [spec[2] for spec in specs], 0, heads)


def laid_out_as(old, new):
    """new, over the mesh as old is, if old is on one of explicit axes."""
    sharding = jax.typeof(old).sharding
    return jax.sharding.reshard(new, sharding) if sharding.mesh.explicit_axes and jax.typeof(new).sharding != sharding else new


def _shards(mesh, batch: list, heads: list, rows: int, kv_heads: int) -> Shards:
    """Of the mesh axes that arrays are laid out over, the first for each, as far as that leaves whole rows and key/value heads."""
    batch = next((axes for axes in batch if axes and rows % _devices(mesh, axes) == 0), None)
    free = (axes for axes in heads if axes and not {*_names(axes)} & {*_names(batch)})
    heads = next((axes for axes in free if kv_heads % _devices(mesh, axes) == 0), None)
    return Shards(mesh, batch, heads)


def _names(axes) -> tuple:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _devices(mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in _names(axes))


def varying_axes(x) -> frozenset:
    """The axes of the `shard_map`s around that an array is known to vary over."""
    aval = jax.typeof(x)
    return frozenset(aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma)  # jax 0.11, jax 0.10


def varying_together(arrays):
    """The arrays, said to vary over all axes that one of them varies over: what JAX does for the operands of its own operations, and
    of a `custom_vjp` asks of the caller. (Its transpose is the sum over devices that the gradient of what is the same on all needs.)"""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def partitioned(step, axes):
    """step(arrays, *static), of which XLA knows how to share it out over devices, so that it need not gather the arrays.

    axes(arrays, *static) gives the axes of the arrays and of the results, as trees of strings in the letters of `Shards.spec`. What is
    computed of a device's part has other sizes: `step` takes them from its arrays. A program for one device is what it was.
    """

    def run(arrays, *static):
        mesh = jax.sharding.get_abstract_mesh()
        if not (mesh.empty or mesh.auto_axes):  # it is left to us
            return step(arrays, *static)
        of_arrays, of_results = axes(arrays, *static)
        leaves = zip(jax.tree.leaves(of_arrays), jax.tree.leaves(arrays), strict=True)
        sizes = {letter: size for letters, x in leaves for letter, size in zip(letters, x.shape, strict=True)}

        def of_a_part(arrays):
            return step(arrays, *static)

        def infer(mesh, arrays, results):
            return _shardings(_laid_out(mesh, *arrays, of_arrays, sizes), of_results)

        def partition(mesh, arrays, results):
            shards = _laid_out(mesh, *arrays, of_arrays, sizes)
            return shards.mesh, of_a_part, _shardings(shards, of_results), (_shardings(shards, of_arrays),)

        told = custom_partitioning(of_a_part)
        told.def_partition(partition, infer, **_rule(of_arrays, of_results, sizes))
        call = jax.custom_batching.custom_vmap(told)

        @call.def_vmap
        def mapped(size, is_mapped, arrays):
            results = jax.vmap(of_a_part, jax.tree.map(lambda mapped: 0 if mapped else None, is_mapped), axis_size=size)(arrays)
            return results, jax.tree.map(lambda _: True, results)

        return call(arrays)

    return run


def _laid_out(mesh, arrays, of_arrays, sizes: dict) -> Shards:
    """How XLA has laid the arrays out, as far as their rows and heads go."""
    if mesh.empty:  # none that JAX knows: no array's sharding has a spec
        devices = jax.tree.leaves(arrays)[0].sharding.device_set
        mesh = Mesh(np.array(sorted(devices, key=lambda device: device.id)), "x")
    axes = {letter: [] for letter in "bnk"}
    for letters, x in zip(jax.tree.leaves(of_arrays), jax.tree.leaves(arrays), strict=True):
        for letter, of_mesh in zip(letters, getattr(x.sharding, "spec", ()), strict=False):
            axes.get(letter, []).append(of_mesh)
    return _shards(mesh, axes["b"], axes["n"] + axes["k"], sizes["b"], sizes["k"])


def _shardings(shards: Shards, axes):
    return jax.tree.map(lambda letters: NamedSharding(shards.mesh, shards.spec(letters)), axes)


def _rule(of_arrays, of_results, sizes: dict) -> dict:
    """The same for Shardy: query heads are groups of key/value heads, and what is neither these nor the batch is not shared out."""
    group = sizes.get("n", sizes["k"]) // sizes["k"]

    def side(axes):
        return ", ".join(" ".join(letters).replace("n", "(k g)" if group > 1 else "k") for letters in jax.tree.leaves(axes))

    rule = f"{side(of_arrays)} -> {side(of_results)}"
    whole = tuple(dict.fromkeys(letter for letter in rule if letter.isalpha() and letter not in "bk"))  # as they come: it asks for that
    return {"sharding_rule": rule, "need_replication_factors": whole} | ({"g": group} if group > 1 else {})
