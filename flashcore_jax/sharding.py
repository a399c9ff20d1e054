"""Arrays that carry their sharding in their type (the axes of `jax.make_mesh` are explicit by default): rows of the batch and
key/value heads are independent of each other, so every device computes its own, in a `shard_map`.

Where the program is partitioned for us (automatic axes), or we are in a `shard_map` already, there is nothing to do here.
"""

import dataclasses
import functools
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

    def run(self, function, static: tuple, arrays, specs, out_specs):
        """function(*static, *arrays), by every device on its part of the arrays; one of them may be None. The rest is hashable."""
        specs = tuple(None if x is None else spec for x, spec in zip(arrays, specs, strict=True))
        return _by_everyone(function, static, self.mesh, specs, out_specs, *arrays)


# Jitted, because only there can arrays that are on no mesh yet be laid out over this one.
@functools.partial(jax.jit, static_argnums=range(5))
def _by_everyone(function, static: tuple, mesh, specs, out_specs, *arrays):
    arrays = (x if spec is None else jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))
    part = functools.partial(function, *static)
    # Unchecked: Pallas's interpreter mixes values that vary over the mesh with those that do not.
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


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
