"""Arrays that carry their sharding in their type (the axes of `jax.make_mesh` are explicit by default): rows of the batch and
key/value heads are independent of each other, so every device computes its own, in a `shard_map`.

Where the program is partitioned for us (automatic axes), or we are in a `shard_map` already, there is nothing to do here.
"""

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh, and its axes that the batch and the heads are shared out over, or None."""

    mesh: object
    batch: object
    heads: object

    everywhere: ClassVar = PartitionSpec()

    def of_rows(self, layers: int | None = None) -> PartitionSpec:
        """[B]; with layers [L, B]."""
        return PartitionSpec(*[None] * (layers is not None), self.batch)

    def of_tokens(self, layers: int | None = None) -> PartitionSpec:
        """[B, T, heads, ...] and [B, T, N]; with layers [L, B, S, K, H]."""
        return PartitionSpec(*[None] * (layers is not None), self.batch, None, self.heads)

    def run(self, function, arrays, specs, out_specs):
        """function(*arrays), by every device on its part of them; an array may be None."""
        specs = [NamedSharding(self.mesh, spec) if x is not None else None for x, spec in zip(arrays, specs, strict=True)]

        @jax.jit  # within which arrays that are on no mesh yet can be laid out over this one
        def everyone(*arrays):
            arrays = jax.tree.map(jax.sharding.reshard, arrays, tuple(specs))
            in_specs = tuple(sharding and sharding.spec for sharding in specs)
            # Unchecked: Pallas's interpreter mixes values that vary over the mesh with those that do not.
            return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

        return everyone(*arrays)


def shards_of(tokens, heads: int) -> Shards | None:
    """From the first array of `tokens`, [B, T, heads, ...] or stacked, that says so. Heads are shared out where that leaves whole
    key/value heads, of which there are so many."""
    found = None
    for x in tokens:
        sharding = jax.typeof(x).sharding
        if not sharding.mesh.explicit_axes:
            continue
        batch, _, of_heads, _ = sharding.spec[-4:]
        found = found or Shards(sharding.mesh, None, None)
        found = dataclasses.replace(found, batch=found.batch or batch, heads=found.heads or of_heads)
    if found and heads % _devices(found.mesh, found.heads):
        found = dataclasses.replace(found, heads=None)
    return found


def _devices(mesh, axes) -> int:
    size = 1
    for axis in axes if isinstance(axes, tuple) else (axes,):
        size *= 1 if axis is None else mesh.shape[axis]
    return size
