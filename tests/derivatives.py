"""What the tests of derivatives share: a loss, the derivatives beyond its first reverse one, and how near two of them are."""

import jax
import jax.numpy as jnp
import numpy as np

from flashcore_jax.testing import GRADIENT_GATE


def loss_of(attention):
    """A scalar with distinct cotangents for out and lse everywhere; rows that see nothing add 0."""

    def loss(*arguments, **options):
        out, lse = attention(*arguments, return_lse=True, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(jnp.isneginf(lse), jnp.pi / 2, lse)))

    return loss


BEYOND = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "jacfwd": lambda f, x: jax.jacfwd(lambda s: f(x * s))(jnp.float32(1.1)),
    "reverse of reverse": lambda f, x: jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(f)(x))))(x),
    "forward of reverse": lambda f, x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
}


def assert_close(got, expected, calls=1):
    """Both are right to the gate, or better, and the errors of calls one after the other add up."""
    for a, b in zip(*(jax.tree.leaves(jax.device_get(x)) for x in (got, expected)), strict=True):
        assert a.shape == b.shape
        a, b, gate = a.astype(np.float64), b.astype(np.float64), GRADIENT_GATE[str(a.dtype)]
        assert _root_mean_square(a - b) <= 2 * calls * gate * _root_mean_square(b)


def _root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))
