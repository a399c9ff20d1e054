"""The board: the cells that every claim about speed uses. Each is data; what a cell means is `flashcore_jax.attention`."""

import dataclasses

DIRECTIONS = ("fwd", "fwd+bwd")
TITLES = {"fwd": "Forward", "fwd+bwd": "Forward + backward"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One self-attention problem, S = T. `window` is the number of keys seen to the left of the query's own."""

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = True
    window: int | None = None
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict:
        """The cell's keyword arguments in `jax.nn.dot_product_attention`, which are ours too."""
        return {"is_causal": self.is_causal} | ({} if self.window is None else {"local_window_size": (self.window, 0)})

    @property
    def scale(self) -> float:
        return self.H**-0.5

    @property
    def query_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.N, self.H)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.K, self.H)

    @property
    def visible_pairs(self) -> float:
        """(query, key) pairs of one head. Causal counts T²/2, the field's convention; a window counts what it shows."""
        if self.window is not None:
            return sum(min(i, self.window) + 1 for i in range(self.T))
        return self.T * self.T / (2 if self.is_causal else 1)

    def flops(self, direction: str) -> float:
        """Two products forward, five more backward, two operations each."""
        return 4 * self.B * self.N * self.visible_pairs * self.H * {"fwd": 1.0, "fwd+bwd": 3.5}[direction]

    def __str__(self) -> str:
        mask = f"window {self.window}" if self.window is not None else "causal" if self.is_causal else "full"
        return f"{self.B} x {self.T}, {self.N}/{self.K}, {self.H}, {mask}"


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
SUMMARY = tuple(f"P{i}" for i in range(1, 9))  # the cells of a geometric mean

BOARDS = {"prefill": PREFILL}
# The same kinds of cell, small enough for a CPU and Pallas's interpret mode.
QUICK_BOARDS = {"prefill": (Cell("P1", 2, 64, 2, 2, 32), Cell("P2", 1, 128, 2, 1, 32, window=48))}

# Temp memory against T: one row of a long context, grouped heads.
MEMORY = tuple(Cell(f"M{t // 1024}k", 1, t, 32, 8, 128) for t in (1024 << i for i in range(7)))
QUICK_MEMORY = tuple(Cell(f"M{t}", 1, t, 2, 1, 32) for t in (64, 128))
