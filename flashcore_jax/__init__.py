"""Attention kernels for JAX on NVIDIA GPUs: causal, grouped-query, windowed and cached attention, differentiable, on CPU too."""

from flashcore_jax.attention import attention, explain
from flashcore_jax.cache import KVCache
from flashcore_jax.errors import ArgumentError, CacheOverflowError, DtypeError, InterpretWarning, OptionError, ShapeError, Unsupported
from flashcore_jax.kv_attention import attention_with_kv_cache, explain_with_kv_cache
from flashcore_jax.problem import RESIDUAL_NAMES

__version__ = "0.1.0"

__all__ = [
    "RESIDUAL_NAMES",
    "ArgumentError",
    "CacheOverflowError",
    "DtypeError",
    "InterpretWarning",
    "KVCache",
    "OptionError",
    "ShapeError",
    "Unsupported",
    "attention",
    "attention_with_kv_cache",
    "explain",
    "explain_with_kv_cache",
]
