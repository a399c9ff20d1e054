"""The implementations by name, loaded when first asked for: which can run a call, and which one `None` takes."""

import dataclasses
import importlib
import os
import sys
import warnings
from types import ModuleType

from flashcore_jax.errors import InterpretWarning, OptionError, Unsupported
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import target_gpu

# Best first. A module offers `unsupported(problem)`, `append`, and either `forward` and `backward` or a differentiable `attend`; one that
# leaves steps of some calls to another's kernels offers `handed_on(problem)`.
_MODULES = {
    "mosaic_gpu": "flashcore_jax.kernels.mosaic_gpu.implementation",
    "triton": "flashcore_jax.kernels.triton",
    "xla": "flashcore_jax.kernels.xla",
}
_NEEDS_GPU = {"mosaic_gpu", "triton"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes."""

    implementation: str
    reasons: dict[str, str | None]  # for each of the others why None does not take it; None: it would run if it were named
    handed_on: dict[str, str]  # "forward" and "backward", where "mosaic_gpu" leaves them to the Triton kernels, and why

    def __str__(self) -> str:
        rest = [f"{name}: {reason or 'would run if named'}" for name, reason in self.reasons.items() if name != self.implementation]
        steps = [f"{step} by the Triton kernels: {why}" for step, why in self.handed_on.items()]
        return "; ".join([f"takes {self.implementation}", *steps, *rest])


def module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def choose(implementation: str | None, problem: Problem | None) -> str:
    """The name to run: the named one if it can, else `Unsupported`; for None the best one that can. No problem: an append."""
    name = _decide(implementation, problem)
    if name in _NEEDS_GPU and target_gpu() is None:
        warnings.warn(
            f'implementation="{name}" runs in Pallas\'s interpreter, slowly: no NVIDIA GPU is in sight',
            InterpretWarning,
            stacklevel=_levels_to_the_caller(),
        )
    return name


def explain(problem: Problem, implementation: str | None = None) -> Explanation:
    """What `choose(implementation, problem)` decides, with the reasons. Raises what it raises."""
    name = _decide(implementation, problem)
    handed_on = getattr(module(name), "handed_on", None)
    reasons = {other: _declined(other, problem) for other in _MODULES}
    return Explanation(name, reasons, handed_on(problem) if handed_on else {})


def _decide(implementation: str | None, problem: Problem | None) -> str:
    if implementation is None:
        return next(name for name in _MODULES if _declined(name, problem) is None)
    if not isinstance(implementation, str) or implementation not in _MODULES:
        known = ", ".join(map(repr, _MODULES))
        raise OptionError(f"expected implementation to be None or one of {known}; got {implementation!r}; None takes the best one")
    if reason := module(implementation).unsupported(problem):
        raise Unsupported(
            f'implementation="{implementation}" cannot run this call: {reason}; pass implementation=None to take one that can'
        )
    return implementation


def _declined(name: str, problem: Problem | None) -> str | None:
    """Why `None` does not take this implementation. Without a GPU, nothing of those that need one is imported."""
    if name in _NEEDS_GPU and target_gpu() is None:
        return "no NVIDIA GPU is in sight" + (" (named, it runs interpreted)" if name == "triton" else "")
    return module(name).unsupported(problem)


def _levels_to_the_caller() -> int:
    """Of the stack, for a warning: to the first line of a file that is not the package's."""
    package, frame, level = os.path.dirname(__file__) + os.sep, sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level
