"""A tile, and the files whose rows say which one is the fastest: the package's (measured.json) and the user's own."""

import dataclasses
import functools
import json
import os
import warnings
from importlib import resources
from typing import NamedTuple

from flashcore_jax.errors import OptionError, check
from flashcore_jax.problem import SPLIT_UNIT
from flashcore_jax.tuning.gpus import Gpu, gpu_of


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile. `spills` says why a tile that spills registers is shipped all the same; "" promises none."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    heads_fastest: bool = True
    reason: str = ""
    spills: str = ""


@dataclasses.dataclass(frozen=True)
class Tiles:
    forward: Tile
    closing: Tile  # forward, where partial sums are closed and the total of the earlier ones needs registers too
    dkdv: Tile
    dq: Tile
    decode: Tile  # few queries: the rows of a whole group


KERNELS = tuple(field.name for field in dataclasses.fields(Tiles))
ON_THE_KEY_GRID = ("forward", "closing", "decode")  # they have the same bits, and therefore one block_k
HEAD_DIMS = (64, 128, 256)  # a bucket: the head dims up to it


class Row(NamedTuple):
    """A kernel's tile, and where it stands."""

    tile: Tile
    where: str


# {(compute capability, bits, head dim bucket): {kernel: {kind of GPU: the row measured there}}}
Rows = dict[tuple, dict[str, dict[str, Row]]]


@functools.cache
def measured_rows() -> Rows:
    return rows_of(resources.files("flashcore_jax.tuning").joinpath("measured.json").read_text(), "measured.json")


def rows_for(gpu: Gpu, bits: int, head_dim: int, user: Rows) -> dict[str, Row]:
    """{kernel: its row} of one bucket: the user's before the package's; in each the one of this very kind of GPU before others of its
    compute capability. (An H100 and an H200 run the same code, and wait differently long for their memory.)"""
    found = {}
    for rows in (measured_rows(), user):
        for kernel, kinds in rows.get((gpu.capability, bits, head_dim), {}).items():
            found[kernel] = kinds.get(gpu.kind) or next(iter(kinds.values()))
    return found


def user_file() -> str | None:
    """The file with this user's own rows: what FLASHCORE_TILES names (empty: none), else one in the platform's cache folder."""
    named = os.environ.get("FLASHCORE_TILES")
    if named is not None:
        return named or None
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "flashcore_jax", "tiles.json")


# Once per process, at the first call that needs a tile: what is traced later must have the bits of what was traced before.
# A file that is there and cannot be used raises, at that call. With the package's rows instead the call would run, but its
# `block_k`, and so its bits, might be others than last time: a warning about that is lost in the log of the job it matters to.
@functools.cache
def user_rows() -> Rows:
    path = user_file()
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        # Most who have no file in the cache folder never tuned; nor need they be allowed to look there (another user's home).
        if "FLASHCORE_TILES" in os.environ or isinstance(error, UnicodeDecodeError):
            raise OptionError(f"expected tiles in {path}; got {error}; {REMEDY}") from None
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            warnings.warn(f"the shipped tiles are taken: {error}", stacklevel=2)
        return {}
    return rows_of(text, path)


def origin() -> str:
    """Whose tiles this process takes, in words."""
    try:
        count = sum(len(kinds) for kernels in user_rows().values() for kinds in kernels.values())
    except OptionError as error:
        return f"none: {error}"
    return f"the package's, but for {count} of {user_file()}" if count else "the package's"


REMEDY = "mend it, delete it and run `python -m benchmarks.tune` again, or set FLASHCORE_TILES= for the shipped tiles"
_NUMBERS = ("block_q", "block_k", "num_warps", "num_stages")
_NEEDED = {"gpu", "bits", "head_dim", "kernel", *_NUMBERS, "reason"}
_OPTIONAL = {"capability", "heads_fastest", "spills"}


def rows_of(text: str, source: str) -> Rows:
    """The rows of a JSON file's text: a list of objects with the fields of `Tile` and of the bucket that it is for, whose GPU
    has its "capability" beside it where `gpus` does not list it. Raises `OptionError`."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"expected JSON in {source}; got {error}; {REMEDY}") from None
    check([(isinstance(listed, list), OptionError, f"a list of rows in {source}", type(listed).__name__, REMEDY)])
    found: Rows = {}
    for number, row in enumerate(listed, 1):
        where = f"{source}, row {number}"
        check((holds, OptionError, f"{expected} in {where}", got, REMEDY) for holds, expected, got in _rules(row))
        kind, *bucket, kernel = place_of(row)
        kinds = found.setdefault(tuple(bucket), {}).setdefault(kernel, {})
        check([(kind not in kinds, OptionError, "one row for each kernel of a GPU's bucket", f"a second one in {where}", REMEDY)])
        fields = {name: row[name] for name in (*_NUMBERS, "heads_fastest", "reason", "spills") if name in row}
        kinds[kind] = Row(Tile(**fields), where)
    return found


def place_of(row: dict) -> tuple:
    """What a file has one row for: a kind of GPU, its compute capability, bits, head dim bucket and kernel."""
    gpu = gpu_of(row["gpu"], row.get("capability"))
    return gpu.kind, gpu.capability, row["bits"], row["head_dim"], row["kernel"]


def _rules(row):
    """(holds, expected, got) of all that a row must keep; each may rely on those before it."""
    yield isinstance(row, dict), "an object", row
    yield row.keys() >= _NEEDED, f"the fields {', '.join(sorted(_NEEDED))}", f"no {', '.join(sorted(_NEEDED - row.keys()))}"
    unknown = row.keys() - _NEEDED - _OPTIONAL
    yield not unknown, f"no fields but {', '.join(sorted(_NEEDED | _OPTIONAL))}", ", ".join(sorted(unknown))
    texts = [row[name] for name in ("gpu", "kernel", "reason", "spills", "capability") if name in row]
    yield all(isinstance(text, str) for text in texts) and row["reason"] != "", "texts, and a reason", texts
    yield row["kernel"] in KERNELS, f"a kernel of {', '.join(KERNELS)}", row["kernel"]
    yield (
        row["bits"] in (16, 32) and row["head_dim"] in HEAD_DIMS,
        f"16 or 32 bits, head_dim of {HEAD_DIMS}",
        (row["bits"], row["head_dim"]),
    )
    numbers = {name: row[name] for name in _NUMBERS}
    yield all(type(number) is int and number > 0 for number in numbers.values()), "numbers above 0", numbers
    powers = [numbers[name] for name in ("block_q", "block_k", "num_warps")]
    yield all(number & (number - 1) == 0 for number in powers), "powers of two", numbers
    yield (
        row["kernel"] not in ON_THE_KEY_GRID or row["block_k"] <= SPLIT_UNIT,
        f"block_k of at most {SPLIT_UNIT}, so that a split ends with a block",
        row["block_k"],
    )
    yield isinstance(row.get("heads_fastest", True), bool), "heads_fastest true or false", row.get("heads_fastest")
    part = row.get("capability", "0.0").split(".")
    yield len(part) == 2 and all(map(str.isdecimal, part)), 'a capability such as "9.0"', row.get("capability")
    yield place_of(row)[1] > (0, 0), "the capability of a GPU that the package does not list", row["gpu"]
