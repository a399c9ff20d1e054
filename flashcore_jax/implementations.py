"""The implementations by name, loaded when first asked for: which can run a call, and which one `None` takes."""

import dataclasses
import importlib
import warnings
from types import ModuleType

from flashcore_jax.errors import InterpretWarning, OptionError, Unsupported
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import target_gpu

# Best first. A module offers `unsupported(problem)`, `append`, and either `forward` and `backward` or a differentiable `attend`.
_MODULES = {
    "mosaic_gpu": "flashcore_jax.kernels.mosaic_gpu.implementation",
    "triton": "flashcore_jax.kernels.triton",
    "xla": "flashcore_jax.kernels.xla",
}
_NEEDS_GPU = {"mosaic_gpu", "triton"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and for each of the others why not (None: it would run if it were named)."""

    implementation: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        rest = [f"{name}: {reason or 'would run if named'}" for name, reason in self.reasons.items() if name != self.implementation]
        return "; ".join([f"takes {self.implementation}", *rest])


def module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def choose(implementation: str | None, problem: Problem | None) -> str:
    """The name to run: the named one if it can, else `Unsupported`; for None the best one that can. No problem: an append."""
    if implementation is None:
        return explain(problem).implementation
    if implementation not in _MODULES:
        known = ", ".join(map(repr, _MODULES))
        raise OptionError(f"expected implementation to be None or one of {known}; got {implementation!r}; None takes the best one")
    reason = module(implementation).unsupported(problem)
    if reason is not None:
        raise Unsupported(
            f'implementation="{implementation}" cannot run this call: {reason}; pass implementation=None to take one that can'
        )
    if implementation in _NEEDS_GPU and target_gpu() is None:
        warnings.warn(
            f'implementation="{implementation}" runs in Pallas\'s interpreter, slowly: no NVIDIA GPU is in sight',
            InterpretWarning,
            stacklevel=3,
        )
    return implementation


def explain(problem: Problem | None) -> Explanation:
    """What `choose(None, problem)` decides, with the reasons."""
    reasons = {}
    for name in _MODULES:
        without_gpu = name in _NEEDS_GPU and target_gpu() is None  # then nothing of it is imported
        interpreted = " (named, it runs interpreted)" if name == "triton" else ""
        reasons[name] = f"no NVIDIA GPU is in sight{interpreted}" if without_gpu else module(name).unsupported(problem)
    return Explanation(next(name for name, reason in reasons.items() if reason is None), reasons)
