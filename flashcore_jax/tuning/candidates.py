"""The tiles of a kernel that are worth compiling on a GPU: a small grid, by rules with reasons. `benchmarks.tune` measures them."""

from flashcore_jax.tuning.gpus import Gpu
from flashcore_jax.tuning.tile_rows import ON_THE_KEY_GRID, Tile

REGISTERS = 192  # of a thread's 255, for accumulators and scores: the others hold operands, addresses, maxima and sums


def candidates(gpu: Gpu, bits: int, head_dim: int, kernel: str, block_k: int) -> list[Tile]:
    """`block_k` is that of forward, closing and decode; the backward's is free."""
    short, on_key_grid = bits == 16, kernel in ON_THE_KEY_GRID
    # The tensor cores of Hopper and of Blackwell's data centre kinds take 64 rows and the 4 warps of a group at once, others 16
    # rows and a warp. Of float32 Hopper multiplies parts of 16 bits; 3xTF32 holds operands twice over. Decode has the few rows of a group.
    by_parts = not short and gpu.has_wgmma
    wide = by_parts or (short and 9 <= gpu.capability[0] < 12)
    held = (16, 32, 64) if kernel == "decode" or not (short or wide) else (64, 128, 256) if wide else (32, 64, 128)
    walked = (block_k,) if on_key_grid else (32, 64, 128) if short or wide else (16, 32, 64)
    # More stages hide more of the memory's latency; with 99 KiB of shared memory, or halves of float32, few have room.
    stages = (1, 2) if not short else (2, 3, 4) if gpu.shared_memory >= 160 * 1024 else (1, 2, 3)

    def fits(rows, block, warps, depth) -> bool:
        # Float32 words of a program: dkdv has two accumulators and two score tiles, dq one and two, the others one each.
        words = rows * {"dkdv": 2 * head_dim + 2 * block, "dq": head_dim + 2 * block}.get(kernel, head_dim + block)
        buffers = depth * 2 * block * head_dim * bits // 8  # of the loop; what stays beside them the compiler knows
        return 16 <= words / (32 * warps) <= (REGISTERS if short or by_parts else REGISTERS // 2) and buffers <= gpu.shared_memory

    def suits_tensor_cores(rows, warps) -> bool:
        if wide and rows >= 64 and warps < 4:
            return False
        # A warp with fewer than 16 rows shares them with another, and the two exchange maxima and sums in every block.
        return not short or kernel in ("dkdv", "decode") or rows >= 16 * warps

    return [
        Tile(*((block, rows) if kernel == "dkdv" else (rows, block)), warps, depth)
        for rows in held
        for block in walked
        for warps in ((1, 2, 4) if kernel == "decode" else (4, 8))
        for depth in stages
        if fits(rows, block, warps, depth) and suits_tensor_cores(rows, warps)
    ]
