"""The typed errors, and the one way in which a check speaks: what was expected, what came, what to do.

`ArgumentError` and its kinds are the caller's mistakes; `Unsupported` says that an implementation cannot run a call that
is right in itself. All are raised while JAX traces, before anything is computed, but for those that need numbers, outside `jit`:
`CacheOverflowError`, and a row or a layer that a cache does not have.
"""

from collections.abc import Iterable


class ArgumentError(ValueError):
    """An argument of a public function is wrong."""


class ShapeError(ArgumentError):
    """An array has the wrong number of axes, or sizes that do not fit together."""


class DtypeError(ArgumentError):
    """An array has a dtype that the function does not take."""


class OptionError(ArgumentError):
    """A static option (a number, a name, a window) has a value outside its range."""


class CacheOverflowError(ArgumentError):
    """A row of a `KVCache` has no room for the tokens that were to be appended. Nothing was written to it."""


class Unsupported(NotImplementedError):
    """The named implementation cannot run this call here; another one can."""


class InterpretWarning(UserWarning):
    """Implementation "triton" was named where there is no NVIDIA GPU: its kernels run in Pallas's interpreter, slowly."""


Check = tuple[bool, type[ArgumentError], str, object, str]


def check(rows: Iterable[Check]) -> None:
    """Raises for the first row whose condition is false. A row is (condition, error, expected, got, remedy)."""
    for holds, error, expected, got, remedy in rows:
        if not holds:
            raise error(f"expected {expected}; got {got}; {remedy}")
