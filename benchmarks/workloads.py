"""The board: the cells that every claim about speed uses. Each is data; what a cell means is `flashcore_jax.attention`."""

import dataclasses
import functools
import math

import numpy as np

DIRECTIONS = ("fwd", "fwd+bwd")
TITLES = {"fwd": "Forward", "fwd+bwd": "Forward + backward"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attention problem. `window` is the number of keys seen to the left of the query's own.

    S None: self-attention, S = T. Else a cache: T new tokens, which are the last of each row's valid ones, on keys with room
    for S. All keys are valid; or, with `shortest`, a number of each row's own, log-uniform from `shortest` on, and without a cache as
    many queries: a padded batch.
    """

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = True
    window: int | None = None
    dtype: str = "bfloat16"
    S: int | None = None
    shortest: int | None = None

    @property
    def cached(self) -> bool:
        return self.S is not None

    @property
    def padded(self) -> bool:
        return not self.cached and self.shortest is not None

    @property
    def keys(self) -> int:
        return self.S if self.cached else self.T

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32[B]: the valid keys of each row."""
        if self.shortest is None:
            return np.full(self.B, self.keys, np.int32)
        drawn = np.random.default_rng(0).uniform(math.log(self.shortest), math.log(self.keys), self.B)
        return np.exp(drawn).astype(np.int32)

    @property
    def options(self) -> dict:
        """The cell's keyword arguments in `jax.nn.dot_product_attention`, which are ours too. Not for a cache: the causal masks of
        the two differ there."""
        assert not self.cached, self
        return {"is_causal": self.is_causal} | ({} if self.window is None else {"local_window_size": (self.window, 0)})

    @property
    def scale(self) -> float:
        return self.H**-0.5

    @property
    def query_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.N, self.H)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (self.B, self.keys, self.K, self.H)

    @property
    def visible_pairs(self) -> float:
        """(query, key) pairs of one head, per row. Causal counts T²/2, the field's convention; a window counts what it shows, and a
        padded row what is valid of it."""
        if self.cached:  # the last query sees all keys, each one before it a key less
            return self.T * (float(np.mean(self.lengths)) - (self.T - 1) / 2)
        if self.window is not None:
            return sum(min(i, self.window) + 1 for i in range(self.T))
        return float(np.mean(np.square(self.lengths, dtype=np.int64))) / (2 if self.is_causal else 1)

    def flops(self, direction: str) -> float:
        """Two products forward, five more backward, two operations each."""
        return 4 * self.B * self.N * self.visible_pairs * self.H * {"fwd": 1.0, "fwd+bwd": 3.5}[direction]

    @property
    def kv_bytes(self) -> int:
        """Of the valid keys and values, all in 16 bits."""
        return 2 * 2 * int(self.lengths.sum()) * self.K * self.H

    def __str__(self) -> str:
        heads = f"{self.N}/{self.K}, {self.H}"
        if self.cached:
            context = self.S if self.shortest is None else f"{self.shortest} to {self.S}"
            return f"{self.B} x {context}, {heads}" if self.T == 1 else f"{self.B} x {self.T} on {self.S - self.T}, {heads}"
        rows = f"{self.shortest} to {self.T}" if self.padded else self.T
        mask = f"window {self.window}" if self.window is not None else "causal" if self.is_causal else "full"
        return f"{self.B} x {rows}, {heads}, {mask}"


@dataclasses.dataclass(frozen=True)
class Loop:
    """A jitted loop with a donated `KVCache`: one new token per row, through `layers` layers or for `steps` steps. The last turn
    fills the cache. "scan" is the loop; "unrolled" is what it is compared with."""

    name: str
    B: int
    S: int
    N: int
    K: int
    H: int
    layers: int = 1
    steps: int = 1
    dtype: str = "bfloat16"

    @property
    def turns(self) -> int:
        return self.layers * self.steps

    @property
    def forms(self) -> dict[str, str]:
        if self.layers > 1:
            return {"scan": f"one loop over a stack of {self.layers} layers", "unrolled": f"{self.layers} caches, unrolled"}
        return {"scan": f"one scan of {self.steps} steps", "unrolled": f"{self.steps} calls of one step"}

    @property
    def layer_elements(self) -> int:
        """Of the keys of one layer."""
        return self.B * self.S * self.K * self.H

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * self.layers * self.layer_elements

    def __str__(self) -> str:
        return f"{self.B} x {self.S}, {self.N}/{self.K}, {self.H}"


PREFILL = (
    Cell("P1", 16, 1024, 16, 16, 128),
    Cell("P2", 4, 4096, 16, 16, 128),
    Cell("P3", 1, 16384, 16, 16, 128),
    Cell("P4", 4, 4096, 32, 8, 128),
    Cell("P5", 4, 4096, 32, 32, 64),
    Cell("P6", 4, 4096, 8, 8, 256),
    Cell("P7", 4, 4096, 16, 16, 128, is_causal=False),
    Cell("P8", 2, 8192, 64, 8, 128),
    Cell("P9", 1, 2048, 32, 8, 128),
    Cell("P10", 4, 4096, 32, 8, 128, window=1024),
)
DECODE = (
    Cell("D1", 64, 1, 32, 8, 128, S=8192),
    Cell("D2", 8, 1, 32, 8, 128, S=8192),
    Cell("D3", 1, 1, 32, 8, 128, S=131072),
    Cell("D4", 64, 1, 32, 8, 128, S=1024),
    Cell("D5", 64, 1, 32, 8, 128, S=8192, shortest=128),
    Cell("D6", 8, 1, 32, 32, 128, S=8192),
    Cell("D7", 1, 1, 32, 8, 128, S=2048),
    Cell("D8", 128, 1, 32, 8, 128, S=4096),
    Cell("D9", 32, 1, 64, 8, 128, S=8192),
    Cell("D10", 32, 1, 16, 1, 128, S=8192),
    Cell("D11", 16, 1, 32, 8, 64, S=8192),
    Cell("D12", 1, 1, 32, 8, 128, S=8192),
    Cell("C1", 8, 512, 32, 8, 128, S=8192),
)
# Speed against T, for each head dim: B·T = 16384 and N·H = 2048, as in P1, P2, P3, P5 and P6, whose cells complete these.
LENGTHS = (
    Cell("H64-512", 32, 512, 32, 32, 64),
    Cell("H64-1024", 16, 1024, 32, 32, 64),
    Cell("H64-16384", 1, 16384, 32, 32, 64),
    Cell("H128-512", 32, 512, 16, 16, 128),
    Cell("H256-512", 32, 512, 8, 8, 256),
    Cell("H256-1024", 16, 1024, 8, 8, 256),
    Cell("H256-16384", 1, 16384, 8, 8, 256),
)
# Padded batches, forward and backward: what training on rows of different length calls.
PADDED = (
    Cell("R1", 32, 1024, 16, 16, 128, shortest=128),
    Cell("R2", 8, 4096, 32, 8, 128, shortest=512),
    Cell("R3", 8, 4096, 16, 16, 128, is_causal=False, shortest=512),
    Cell("R4", 8, 4096, 32, 32, 64, shortest=512),
    Cell("R5", 8, 4096, 8, 8, 256, shortest=512),
)
LOOPS = (Loop("L1", 8, 8192, 32, 8, 128, layers=16), Loop("L2", 8, 8192, 32, 8, 128, steps=64))


def _latency(lengths, heads, dtype="float16", **sizes) -> tuple[Cell, ...]:
    """The last two rows of the table in cache-precision.md, in its float16: causal against full, and full by the number of heads."""
    pairs = [
        (f"{'causal' if c else 'full'}-{T}", dict(T=T, is_causal=c, N=sizes["N"], K=sizes["K"])) for T in lengths for c in (True, False)
    ]
    counts = [(f"heads-{n}", dict(T=lengths[0], is_causal=False, N=n, K=n)) for n in heads]
    return tuple(Cell(name, B=sizes["B"], H=sizes["H"], dtype=dtype, **facts) for name, facts in pairs + counts)


LATENCY = _latency((512, 2048), (8, 16, 32, 64, 96, 128), B=16, N=32, K=8, H=64)


def _in_both_dtypes(cells) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(cell, name=f"{cell.name}-{d}", dtype=d) for cell in cells for d in ("float32", "bfloat16"))


# What float32's accuracy costs: each cell beside itself in bfloat16.
FLOAT32 = _in_both_dtypes(cell for cell in PREFILL if cell.name in ("P1", "P2", "P5", "P6"))
BOARDS = {
    "prefill": PREFILL, "lengths": LENGTHS, "padded": PADDED, "decode": DECODE, "loops": LOOPS, "latency": LATENCY, "float32": FLOAT32
}  # fmt: skip
# The cells of a board's geometric mean. Chunked prefill is no decode.
SUMMARIES = {"prefill": tuple(f"P{i}" for i in range(1, 9)), "decode": tuple(f"D{i}" for i in range(1, 13))}

# The same kinds of cell, small enough for a CPU and Pallas's interpret mode.
QUICK_BOARDS = {
    "prefill": (Cell("P1", 2, 64, 2, 2, 32), Cell("P2", 1, 128, 2, 1, 32, window=48)),
    "lengths": (Cell("H16-64", 2, 64, 4, 4, 16), Cell("H32-128", 1, 128, 2, 2, 32)),
    # At least 64 valid rows: the mean of fewer errors is a sample.
    "padded": (Cell("R1", 3, 128, 2, 1, 32, shortest=64), Cell("R3", 3, 128, 2, 2, 32, is_causal=False, shortest=64)),
    "decode": (Cell("D5", 4, 1, 4, 2, 32, S=256, shortest=4), Cell("C1", 2, 32, 2, 1, 32, S=128)),
    "loops": (Loop("L1", 2, 128, 4, 2, 32, layers=2), Loop("L2", 2, 128, 4, 2, 32, steps=3)),
    "latency": _latency((64,), (2,), "bfloat16", B=1, N=2, K=1, H=32),
    "float32": _in_both_dtypes([Cell("P1", 1, 64, 2, 1, 32)]),
}

# Temp memory against T: one row of a long context, grouped heads.
MEMORY = tuple(Cell(f"M{t // 1024}k", 1, t, 32, 8, 128) for t in (1024 << i for i in range(7)))
QUICK_MEMORY = tuple(Cell(f"M{t}", 1, t, 2, 1, 32) for t in (64, 128))


def directions(board: str) -> tuple[str, ...]:
    return DIRECTIONS if board in ("prefill", "lengths", "padded", "float32") else DIRECTIONS[:1]


def cell_of(board: str, facts: dict) -> Cell | Loop:
    """A cell from its JSON."""
    return (Loop if board == "loops" else Cell)(**facts)
