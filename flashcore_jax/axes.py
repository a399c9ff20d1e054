"""The letters that name an axis, everywhere in this package, and the array types that they spell.

    B  batch                       K  key/value heads
    T  query length                G  group size, N // K
    S  key/value length            H  head dim of query and key (Hv: of value, where it differs)
    N  query heads                 L  layers

Arrays are laid out as in `jax.nn.dot_product_attention`: batch, length, heads, head dim.
"""

from jaxtyping import Array, Float, Int

Query = Float[Array, "B T N H"]
Key = Float[Array, "B S K H"]
Value = Float[Array, "B S K Hv"]
Output = Float[Array, "B T N Hv"]
LogSumExp = Float[Array, "B T N"]
Lengths = Int[Array, "B"]
