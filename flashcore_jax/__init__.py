"""Attention kernels for JAX on NVIDIA GPUs: causal, grouped-query and windowed attention, differentiable, on CPU too."""

from flashcore_jax.attention import attention, explain
from flashcore_jax.errors import ArgumentError, DtypeError, InterpretWarning, OptionError, ShapeError, Unsupported
from flashcore_jax.problem import RESIDUAL_NAMES

__version__ = "0.1.0"

__all__ = [
    "RESIDUAL_NAMES",
    "ArgumentError",
    "DtypeError",
    "InterpretWarning",
    "OptionError",
    "ShapeError",
    "Unsupported",
    "attention",
    "explain",
]
