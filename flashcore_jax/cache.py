"""`KVCache`: the keys and values of a batch of sequences, each row with a length of its own, of one layer or of a stack of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flashcore_jax import implementations, rows
from flashcore_jax.errors import ArgumentError, CacheOverflowError, DtypeError, OptionError, ShapeError, Unsupported, check
from flashcore_jax.problem import DTYPES, check_head_dims, is_int
from flashcore_jax.rows import int32
from flashcore_jax.sharding import laid_out_as, partitioned, shards_of, varying_together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """A pytree of four arrays; every method returns a new cache and leaves this one as it is.

    Under `jax.jit` with the cache donated (`donate_argnames`), and in a loop that carries it, updates are in place: no copy of
    the cache is made. Outside `jit` each append copies.

    Attributes:
      key: [B, S, K, H] where S is the capacity; with layers [L, B, S, K, H]. What lies beyond a row's length is never read.
      value: [B, S, K, Hv], with layers [L, B, S, K, Hv].
      length: int32[B], with layers [L, B]: the valid tokens of each row, the first ones.
      overflowed: bool of length's shape: the row had no room for tokens that were to be appended. They were dropped, all of
        that call's, and so is what would have followed them; `attention_with_kv_cache` gives NaN for such a row, until
        `reset`, or `truncate` to what the row does hold.

    Example:
      >>> cache = KVCache.create(batch=8, capacity=8192, kv_heads=8, head_dim=128)
      >>> out, cache = attention_with_kv_cache(query, key, value, cache)
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    overflowed: jax.Array

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        layers: int | None = None,
        dtype=jnp.bfloat16,
    ) -> "KVCache":
        """An empty cache.

        Args:
          batch: rows, B.
          capacity: tokens that each row has room for, S. On Hopper a multiple of 8 from 128 on, or a slower kernel runs the prompts.
          kv_heads: key/value heads, K.
          head_dim: H, a multiple of 8 from 8 to 256.
          value_head_dim: Hv; default head_dim.
          layers: L, for one stack of caches that a scan over layers indexes with `layer=`; default: no such axis.
          dtype: float16, bfloat16 or float32.

        Raises:
          ArgumentError: a size below 1, a head dim or a dtype that `attention` does not take.
        """
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "layers": 1 if layers is None else layers}
        check(
            (is_int(size) and size >= 1, OptionError, f"{name} to be an int >= 1", size, "the sizes are static")
            for name, size in sizes.items()
        )
        check_head_dims({"head_dim": head_dim, "value_head_dim": value_head_dim})
        name = _dtype_name(dtype)
        check([(name in DTYPES, DtypeError, f"dtype {', '.join(DTYPES)}", name, "pass one of them")])
        stack = () if layers is None else (layers,)
        key, value = (jnp.zeros((*stack, batch, capacity, kv_heads, size), dtype) for size in (head_dim, value_head_dim))
        return cls(key, value, jnp.zeros((*stack, batch), jnp.int32), jnp.zeros((*stack, batch), bool))

    @property
    def capacity(self) -> int:
        return self.key.shape[-3]

    @property
    def layers(self) -> int | None:
        return self.key.shape[0] if self.key.ndim == 5 else None

    def append(self, key, value, *, layer=None, query_seq_lengths=None, implementation: str | None = None) -> "KVCache":
        """Writes new tokens behind those of each row.

        Args:
          key: [B, T, K, H] in the cache's dtype.
          value: [B, T, K, Hv].
          layer: of a stacked cache, the layer to append to: an int or an int32 scalar from -L to L - 1. A traced one, which nothing
            can check, is clamped to them.
          query_seq_lengths: int32[B]: only so many tokens of each row are real, the first ones; default T.
          implementation: as in `attention`.

        A row is appended to as a whole or not at all. Where the tokens of a row do not fit, under `jit` they are dropped and
        `overflowed` is set for it; the other rows are not concerned.

        Raises:
          CacheOverflowError: outside `jit`, before anything is written, if a row has no room or has overflowed before.
          ArgumentError: shapes or dtypes that do not fit the cache.
        """
        T = self._check(key, value, query_seq_lengths)
        layer, count = layer_index(self, layer), int32(query_seq_lengths)
        state = self.length, self.overflowed, count, layer
        if _is_known(*state):
            length, overflowed, known_count, known_layer = jax.device_get(state)
            _, _, overflowed = rows.append_to_layer(length, overflowed, known_count, T, self.capacity, known_layer)
            expected = f"room for up to {T} more tokens in every row of a cache of capacity {self.capacity}"
            _raise_if(overflowed, expected, "have none, or have overflowed before")
        name = implementations.choose(implementation, None)
        arrays = (self.key, self.value, self.length, self.overflowed, key, value, count, layer)
        # A cache that lies on the mesh keeps its layout, which a loop's carry must; another one takes that of its first tokens.
        if shards := shards_of((self.key,), self.key.shape[-2]) or shards_of((key, value), self.key.shape[-2]):
            after = shards.run(_append, (name,), arrays, *_axes(arrays, name))
            return KVCache(*(laid_out_as(old, new) for old, new in zip(arrays, after, strict=False)))
        return KVCache(*_append(name, *arrays))

    def truncate(self, length) -> "KVCache":
        """Forgets each row's tokens from `length` on: an int, int32[B], or int32[L, B]. A row that is shorter stays as it is.

        An overflowed row that holds all of those tokens is whole again. A length below 0 counts as 0.
        """
        length = length if isinstance(length, jax.Array) else np.asarray(length)
        shape = self.length.shape
        check([
            (jnp.issubdtype(length.dtype, jnp.integer), DtypeError, "length to be an int or an int32 array", length.dtype, "pass int32"),
            (length.shape in ((), shape[-1:], shape), ShapeError, f"length of shape (), [B] = {shape[-1:]}, or that of the cache's {shape}", length.shape, "give one length per row"),
        ])  # fmt: skip
        length = jnp.broadcast_to(jnp.maximum(int32(length), 0), shape)
        return dataclasses.replace(self, length=jnp.minimum(self.length, length), overflowed=self.overflowed & (length > self.length))

    def reset(self, rows=slice(None)) -> "KVCache":
        """Empties rows, in all layers: an index, a slice, an array of indices, or a mask bool[B]; default all of them.

        An index is from -B to B - 1. Outside `jit` another one raises `OptionError`; under `jit`, where nothing can, it is ignored.
        """
        if not isinstance(rows, slice):
            rows = rows if isinstance(rows, jax.Array) else np.asarray(rows, np.int32 if np.shape(rows) == (0,) else None)  # as `[]`
            if rows.dtype == bool:  # a traced mask is no index
                B = self.length.shape[-1]
                check([(rows.shape == (B,), ShapeError, f"a mask of shape [B] = ({B},)", rows.shape, "give one bool per row")])
                return self._emptied(jnp.asarray(rows))
            self._check_indices(rows)
            rows = int32(rows)
        return self._emptied(jnp.zeros(self.length.shape[-1], bool).at[rows].set(True))

    def _emptied(self, mask) -> "KVCache":
        mask = jnp.broadcast_to(mask, self.length.shape)
        return dataclasses.replace(self, length=jnp.where(mask, 0, self.length), overflowed=self.overflowed & ~mask)

    def check(self) -> None:
        """Raises `CacheOverflowError` if a row has overflowed. Waits for the cache to be computed; not for use under `jit`."""
        if isinstance(self.overflowed, jax.core.Tracer):
            raise ArgumentError("expected a concrete cache; got a traced one; call check() outside jit, or read cache.overflowed")
        _raise_if(self.overflowed, f"every row within the capacity of {self.capacity}", "have overflowed")

    def _check_indices(self, rows) -> None:
        B = self.length.shape[-1]
        check([(jnp.issubdtype(rows.dtype, jnp.integer), DtypeError, "rows as ints, or as a mask", rows.dtype, "pass int32 or bool")])
        if not isinstance(rows, jax.core.Tracer):
            rows = np.ravel(rows).astype(object)  # as Python's integers, which no comparison wraps
            missing = rows[(rows < -B) | (rows >= B)].tolist()
            check([(not missing, OptionError, f"rows from {-B} to {B - 1}", missing, "the cache has no such rows")])

    def _check(self, key, value, query_seq_lengths) -> int:
        *_, B, _, K, H = self.key.shape
        Hv = self.value.shape[-1]
        for name, new, size in (("key", key, H), ("value", value, Hv)):
            shape = tuple(getattr(new, "shape", ()))
            check([
                (len(shape) == 4 and (shape[0], *shape[2:]) == (B, K, size), ShapeError, f"{name} of shape [B, T, K, {'H' if name == 'key' else 'Hv'}] = ({B}, T, {K}, {size}), as the cache", shape, "append what the cache was created for"),
                (getattr(new, "dtype", None) == self.key.dtype, DtypeError, f"{name} of the cache's dtype {self.key.dtype}", getattr(new, "dtype", type(new).__name__), "cast it, or create the cache with this dtype"),
            ])  # fmt: skip
        T = key.shape[1]
        lengths = query_seq_lengths
        check([
            (value.shape[1] == T and T >= 1, ShapeError, "key and value with the same T >= 1", (T, value.shape[1]), "append one value for each key"),
            (lengths is None or (hasattr(lengths, "dtype") and jnp.issubdtype(lengths.dtype, jnp.integer)), DtypeError, "query_seq_lengths to be an int32 array", getattr(lengths, "dtype", type(lengths).__name__), "pass jnp.asarray(lengths, jnp.int32)"),
            (lengths is None or getattr(lengths, "shape", None) == (B,), ShapeError, f"query_seq_lengths int32[B] = ({B},)", getattr(lengths, "shape", None), "give one length per row of the batch"),
        ])  # fmt: skip
        return T


def layer_index(cache: KVCache, layer):
    """int32[1] for a stacked cache, None for another. What is concrete is checked; a traced one counts as `rows.layer_within` has it."""
    L = cache.layers
    if L is None:
        check([(layer is None, OptionError, "no layer, for a cache without layers", layer, "create it with layers=")])
        return None
    is_number = is_int(layer)
    is_array = hasattr(layer, "dtype") and jnp.issubdtype(layer.dtype, jnp.integer) and layer.shape == ()
    is_one, is_known = is_number or is_array, not isinstance(layer, jax.core.Tracer)
    if is_one:
        layer = int(layer) if is_known else int32(layer)
    check([
        (is_one, OptionError, "layer to be an int or an int32 scalar, for a stacked cache", layer, "pass layer="),
        (not (is_one and is_known) or -L <= layer < L, OptionError, f"layer from {-L} to {L - 1}", layer, "the cache has no such layer"),
    ])  # fmt: skip
    return jnp.asarray(layer % L if is_known else layer, jnp.int32).reshape(1)


def _is_known(*arrays) -> bool:
    """Whether one may look at their numbers: none is traced, and what is computed of them is not either (in a trace, everything is)."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays) and not isinstance(jax.lax.full((), 0), jax.core.Tracer)


def _dtype_name(dtype) -> str:
    """What is no dtype keeps the name that it was given."""
    try:
        return str(jnp.dtype(dtype))
    except TypeError:
        return repr(dtype)


def _raise_if(overflowed, expected: str, found: str) -> None:
    full = np.unique(np.argwhere(overflowed)[:, -1]).tolist()
    if full:
        raise CacheOverflowError(f"expected {expected}; rows {full} {found}; create a larger cache, or truncate() or reset() these rows")


def _append(name: str, *arrays):
    """Through "xla" differentiable as it is, in every mode; a kernel's derivative is written down below."""
    arrays = varying_together(arrays)
    if name == "xla":
        return implementations.module(name).append(*arrays)
    try:
        return _append_by_kernel(*arrays, name)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise Unsupported(
            f'implementation="{name}" has no forward-mode differentiation; pass implementation="xla", which has every mode and order'
        ) from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
@functools.partial(jax.jit, static_argnums=(8,))
def _append_by_kernel(key_cache, value_cache, length, overflowed, key, value, count, layer, name: str):
    arrays = key_cache, value_cache, length, overflowed, key, value, count, layer
    return partitioned(_append_a_part, _axes)(arrays, name)


def _append_a_part(arrays, name: str):
    return tuple(implementations.module(name).append(*arrays))


def _axes(arrays, name: str):
    *_, count, layer = arrays
    layers = "" if layer is None else "l"
    of_cache = f"{layers}bskh", f"{layers}bskv", f"{layers}b", f"{layers}b"
    return (*of_cache, "btkh", "btkv", None if count is None else "b", None if layer is None else "o"), of_cache


def _append_fwd(key_cache, value_cache, length, overflowed, key, value, count, layer, name: str):
    after = _append_by_kernel(key_cache, value_cache, length, overflowed, key, value, count, layer, name)
    return after, (length, overflowed, count, layer, key.shape[1])


def _append_bwd(name: str, residuals, cotangents):
    """Linear, whoever computes it. What was written has its gradient from where it was written, what it replaced has none."""
    length, overflowed, count, layer, T = residuals
    caches = cotangents[:2]
    caches, tokens = varying_together((caches, tuple(jnp.zeros((x.shape[-4], T, *x.shape[-2:]), x.dtype) for x in caches)))

    def append(key_cache, value_cache, key, value):
        return implementations.module("xla").append(key_cache, value_cache, length, overflowed, key, value, count, layer)[:2]

    *of_caches, of_key, of_value = jax.linear_transpose(append, *caches, *tokens)(tuple(caches))
    return *of_caches, None, None, of_key, of_value, None, None


_append_by_kernel.defvjp(_append_fwd, _append_bwd)
