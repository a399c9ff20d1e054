"""From query-key products to logits: the scale and the soft cap, and their slope.

    logit = scale * product                                 without a soft cap
    logit = cap * tanh(scale * product / cap)               with one

Kernels keep `scores`, which times the static `log2_scale > 0` are the logits in log2 units, so that the factor can be
folded into the multiply-add before exp2.
"""

import jax.numpy as jnp

from flashcore_jax.online_softmax import LOG2_E


def scores_of(products, scale: float, logits_soft_cap: float | None, tanh=jnp.tanh):
    """The float32 scores of float32 products of any shape, and log2_scale. `tanh` is the hardware's, where it has a faster one."""
    log2_scale = log2_scale_of(scale, logits_soft_cap)
    if logits_soft_cap is not None:
        return tanh(products * (scale / logits_soft_cap)), log2_scale
    # A negative (or zero) factor after the maximum would turn maxima into minima.
    return products if scale > 0 else products * (-1.0 if scale < 0 else 0.0), log2_scale


ROUGH_TANH = 2.0**-21  # the error of tanh by the GPU's approximations of exp2 and the reciprocal


def takes_rough_tanh(dtype: str, logits_soft_cap: float | None) -> bool:
    """Whether the error that it gives a logit, times the cap, is within the rounding of the inputs' dtype: of float16's 2^-11 for
    both 16-bit ones, and so for caps up to 1024. It is too much for float32."""
    return dtype != "float32" and (logits_soft_cap or 0.0) * ROUGH_TANH <= 2.0**-11


def log2_scale_of(scale: float, logits_soft_cap: float | None) -> float:
    """What makes logits in log2 units of scores."""
    return (abs(scale) or 1.0) * LOG2_E if logits_soft_cap is None else logits_soft_cap * LOG2_E


def times_slope(gradient, scores, logits_soft_cap: float | None):
    """The gradient of the logits carried back to the products, less the factor `scale`, which the caller applies once."""
    return gradient if logits_soft_cap is None else gradient * (1.0 - scores * scores)
