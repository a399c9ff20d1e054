"""How float32 matrices are multiplied on Hopper's tensor cores: by parts of 16 bits. No GPU is needed to see that it is right."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax.attention import attention
from flashcore_jax.kernels.triton import blocks, launch
from flashcore_jax.testing import Workload, assert_right, evaluate, inputs, oracle
from flashcore_jax.tuning.gpus import gpu_of


def exact_dot(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def numbers(shape, seed):
    """Of many sizes, with the neighbours of powers of two and the largest there is among them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * np.exp2(rng.integers(-40, 40, shape))).astype(np.float32)
    x.flat[:6] = 1.0, -(2.0 - 2.0**-23), 1.0 + 2.0**-23, np.finfo(np.float32).max, 0.0, -(2.0**-60)
    return x


def test_the_parts_of_a_number_add_up_to_it():
    x = numbers((64, 64), 0)
    parts = launch._parts(jnp.asarray(x))
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    first, second, third = (np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(first + second + third, x)
    # Cut, a part has eight bits of its number; what is left is smaller than the last of them.
    assert np.all(np.abs(second) < 2.0**-7 * np.abs(first) + (first == 0))
    assert np.all(np.abs(third) < 2.0**-7 * np.abs(second) + (second == 0))
    assert np.isnan(sum(np.asarray(part, np.float64) for part in launch._parts(jnp.float32(np.inf))))


@pytest.mark.parametrize("seed", [1, 2])
def test_six_products_of_parts_are_float32_accurate(seed):
    """What is left out, parts 1 x 2, 2 x 1 and 2 x 2, is below 2^-7 2^-15 of |a| |b| each of the first two, together 2^-21."""
    a, b = numbers((32, 48), seed), numbers((48, 16), seed + 10)
    products = []

    def dot(x, y):
        products.append(exact_dot(x, y))
        return products[-1]

    got = launch.product_of_parts(jnp.asarray(a), jnp.asarray(b), dot)
    bound = 2.0**-21 * exact_dot(np.abs(a), np.abs(b))
    assert np.all(np.abs(got - exact_dot(a, b)) <= bound)
    assert len(products) == 6
    for one in products:  # each is needed
        assert np.any(np.abs(got - one - exact_dot(a, b)) > bound)


def test_float32_products_go_by_parts_on_hopper_alone(monkeypatch):
    for kind, hopper in (("NVIDIA H100", True), ("NVIDIA H200", True), ("NVIDIA A100", False), ("NVIDIA B200", False)):
        monkeypatch.setattr(launch, "target_gpu", lambda kind=kind: gpu_of(kind))
        assert launch.by_parts("high") == hopper
        assert not any(map(launch.by_parts, ("native", "tf32", "float32")))


@pytest.mark.host
@pytest.mark.parametrize(("T", "head_dims"), [(70, (72, 136)), (3, (136, 72))], ids=["forward and backward", "decode"])
def test_attention_by_parts(monkeypatch, T, head_dims):
    """The kernels as Hopper gets them, columns in chunks of 64, interpreted."""
    for module in (launch, blocks):
        monkeypatch.setattr(module, "by_parts", lambda precision: precision == "high")
    w = Workload("by parts", 1, T, 150, 2, 1, *head_dims, "float32", is_causal=True, split_size=128)
    arrays = inputs(w)
    attend = functools.partial(attention, implementation="triton", split_size=w.split_size)
    assert_right(evaluate(attend, arrays, **w.options), oracle(arrays, **w.options))
