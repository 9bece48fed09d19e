"""How the GPU kernels are launched: pure data from shapes and sizes, with nothing to import and nothing measured.

No bit of y or dx depends on it, since every sum over a row is in fp64. The chunks of rows that dw is summed over
come from M, N and the dtype of x, so dw is the same on every GPU that has room for programs that share rows (`ROOM`).

Where a threshold comes from a measurement, it is the best of those tried on an H200 (benchmarks/LOG.md).
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

# Columns of a row that one program holds in registers without spills (ptxas, sm_80 to sm_100).
FORWARD_WIDEST, BACKWARD_WIDEST = 16384, 8192
# All programs that share a wider row must run at once, also beside other kernels that wait for theirs: only on a GPU
# with room for this many times as many. Elsewhere one program walks over a row that is wider.
ROOM = 4
PIECE = 8192  # columns that a walk takes at once, 16 elements a thread
# Elements a program holds at once if the rows are narrow. With more rows, what is done once a row (an fp64 division,
# an address in 64 bits) fills the registers: 256 rows of 4 columns spill.
TILE, MOST_ROWS = 2048, 64
# Programs of the kernels that sum dw: two for each of the 132 multiprocessors of an H200, and the same elsewhere.
PROGRAMS = 264
# Numbers that one fp32 sum of dw adds up: its error grows with the root of them. The sums themselves add up in fp64.
LONGEST_SUM = 64
# Columns of the kernel that computes dw alone.
COLUMNS = 1024
# How the backward pass holds whole rows, by the bytes of a number and the most columns: rows, block_n, warps.
_BACKWARD = {
    2: {
        1024: (2, 512, 2), 1280: (2, 256, 2), 1536: (2, 512, 4), 2048: (2, 1024, 4), 5120: (1, 1024, 4),
        8192: (1, 2048, 8),
    },
    4: {
        1024: (2, 512, 4), 1280: (2, 256, 2), 1536: (2, 512, 4), 2048: (2, 1024, 8), 3072: (1, 1024, 8),
        4096: (1, 2048, 16), 5120: (1, 1024, 8), 8192: (1, 2048, 16),
    },
}  # fmt: skip
# How programs share a row, by the same: pieces, block_n, warps. No row may have more than 32 programs, a warp:
# `gpu._whole` asks one lane of every warp for each share. First where the row waits in shared memory, in which case a
# program has the same columns backward whatever the dtype; dw is summed over chunks that follow from them (`SHARED`).
_FORWARD_STAGED = {2: {262144: (8, 1024, 4)}, 4: {65536: (4, 1024, 4), 262144: (8, 1024, 4)}}
_BACKWARD_STAGED = {2: {262144: (8, 1024, 4)}, 4: {262144: (8, 1024, 8)}}
SHARED, STAGES = 8192, 3
_FORWARD_SHARED = {
    2: {65536: (4, 1024, 4), 524288: (16, 1024, 4)},
    4: {65536: (4, 1024, 4), 262144: (8, 1024, 4)},
}
_BACKWARD_SHARED = {
    2: {65536: (4, 1024, 4), 262144: (4, 2048, 8)},
    4: {131072: (4, 1024, 4), 262144: (8, 1024, 8)},
}


class Gpu(NamedTuple):
    """What a launch depends on of a GPU; as it stands, of a typical one."""

    shared_memory: int = 99 << 10  # bytes that one program may have, where the loads of the next tiles arrive
    multiprocessors: int = 132
    capability: int = 9  # the first of its two numbers


@dataclass(frozen=True)
class Launch:
    """A program works on tiles of `rows` rows of `pieces` x `block_n` columns, over `chunk` consecutive rows.

    parts: programs that share a row; 0 means that one program walks over a row in pieces of block_n. staged: rows wait
    in shared memory, not in registers. overlap: a kernel of ours that follows may start before this one has ended.
    """

    block_n: int
    warps: int
    rows: int = 1
    pieces: int = 1
    parts: int = 1
    stages: int = 1
    chunk: int = 1
    staged: bool = False
    overlap: bool = False

    @property
    def constants(self) -> dict[str, int | bool]:
        """By the names that the kernels have for them."""
        return {
            "ROWS": self.rows,
            "PIECES": self.pieces,
            "BLOCK_N": self.block_n,
            "STAGES": self.stages,
            "OVERLAP": self.overlap,
        }


@functools.lru_cache(4096)
def forward(N: int, itemsize: int, with_residual: bool, aligned: bool, gpu: Gpu) -> Launch:
    """Whole rows of up to four pieces, 16 bytes a thread and piece; wider ones shared between programs.

    aligned: rows begin and end at multiples of 16 numbers.
    """
    widest = FORWARD_WIDEST * 3 // 4 if with_residual else FORWARD_WIDEST
    if widest < N:
        return _shared(N, _FORWARD_STAGED[itemsize], _FORWARD_SHARED[itemsize], itemsize, aligned, gpu)
    if N <= 256:
        block_n, rows = _narrow(N)
        return Launch(block_n, _warps(rows * block_n, 16), rows)
    block_n = max(256, power_of_two(-(-N // 4)))
    rows, a_thread = (1, 16) if N > 512 else (8, 32) if itemsize == 2 else (2, 64)
    return Launch(block_n, _warps(rows * block_n * itemsize, a_thread), rows, pieces=-(-N // block_n))


@functools.lru_cache(4096)
def backward(
    M: int, N: int, itemsize: int, dy_itemsize: int, with_ds: bool, with_dw: bool, aligned: bool, gpu: Gpu
) -> Launch:
    """As `forward`; with dw a program holds its share of dw over a chunk of many tiles.

    itemsize, dy_itemsize: bytes of one number of x and ds, and of dy.
    """
    overlap = gpu.capability >= 9
    if N > BACKWARD_WIDEST:
        # Beside the rows the weight, in 4 bytes at most, where there are more than 32 columns a thread.
        bytes_a_column = STAGES * (itemsize + dy_itemsize) + (4 if itemsize == 2 else 0)
        config = _shared(N, _BACKWARD_STAGED[itemsize], _BACKWARD_SHARED[itemsize], bytes_a_column, aligned, gpu)
        if config.parts == 0:
            return config
        # Whole rounds of the GPU, one program on each multiprocessor, so that no row waits for a program of the next.
        chunk = _chunk(M, max(1, 2 * (PROGRAMS // 2 // -(-N // SHARED))), 1)
        return replace(config, stages=STAGES if config.staged else 1, chunk=chunk, overlap=overlap)
    if N <= 256:
        block_n, rows = _narrow(N)
        warps = _warps(rows * block_n, 16)
    else:
        rows, block_n, warps = next(tile for widest, tile in _BACKWARD[itemsize].items() if widest >= N)
        rows = rows if N % 16 == 0 else 1
    pieces = -(-N // block_n)
    if not with_dw:
        return Launch(block_n, warps, rows, pieces, chunk=rows)
    # Eight warps of each multiprocessor of an H200.
    programs = PROGRAMS * 4 // min(max(warps, 2), 8)
    stages = 1  # what is not aligned cannot be loaded ahead into shared memory
    if N % 16 == 0:
        tile_bytes = rows * pieces * block_n * (dy_itemsize + itemsize * (2 if with_ds else 1))
        most = 4 if N <= 512 else 3
        stages = _stages(tile_bytes, gpu.shared_memory * PROGRAMS // programs // 2, most)
        if stages == 1:  # rather one program at a time than no loads ahead
            stages = _stages(tile_bytes, gpu.shared_memory, most)
    return Launch(block_n, warps, rows, pieces, stages=stages, chunk=_chunk(M, programs, rows), overlap=overlap)


@functools.lru_cache(4096)
def dw_alone(M: int, N: int, loaded: int, gpu: Gpu) -> Launch:
    """A program walks over a chunk of rows, block_n columns of it: any N, nothing is summed along the row."""
    block_n = min(power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    programs = max(1, 2 * PROGRAMS // -(-N // block_n))
    stages = _stages(rows * block_n * loaded, gpu.shared_memory // 4, 3) if N % 16 == 0 else 1
    return Launch(block_n, 4, rows, stages=stages, chunk=_chunk(M, programs, rows), overlap=gpu.capability >= 9)


@functools.lru_cache(4096)
def sum_partials(chunks: int, N: int, gpu: Gpu) -> Launch:
    """All chunks are one program's: of many chunks narrow columns, so that many programs share the reading."""
    rows = min(power_of_two(max(1, chunks)), 256)
    return Launch(min(power_of_two(N), 4096 // rows), 8, rows, overlap=gpu.capability >= 9)


def power_of_two(N: int) -> int:
    """The smallest that is not below N."""
    return 1 << (N - 1).bit_length()


def _shared(
    N: int,
    staged: dict[int, tuple[int, int, int]],
    tiles: dict[int, tuple[int, int, int]],
    bytes_a_column: int,
    aligned: bool,
    gpu: Gpu,
) -> Launch:
    """Of the first tiles for rows as wide that the GPU has room for, in shared memory if may be; a walk if none are."""
    for widest, (pieces, block_n, warps) in staged.items() if aligned and N % 16 == 0 else ():
        config = Launch(block_n, warps, 1, pieces, -(-N // (block_n * pieces)), staged=True)
        fits = pieces * block_n * bytes_a_column + 1024 <= gpu.shared_memory
        if widest >= N and fits and ROOM * config.parts <= gpu.multiprocessors:
            return config
    for widest, (pieces, block_n, warps) in tiles.items():
        parts = -(-N // (block_n * pieces))
        if widest >= N and ROOM * parts <= gpu.multiprocessors:
            if N % 16:  # narrow loads take more registers, and more threads cost them nothing
                warps *= 2
            if warps <= 8:
                return Launch(block_n, warps, 1, pieces, parts)
    return Launch(PIECE, 16, parts=0)


def _narrow(N: int) -> tuple[int, int]:
    """Columns and rows of a tile of several rows."""
    block_n = power_of_two(N)
    return block_n, min(TILE // block_n, MOST_ROWS)


def _warps(size: int, a_thread: int) -> int:
    return min(max(1, size // (32 * a_thread)), 16)


def _stages(tile_bytes: int, available: int, most: int) -> int:
    """How many tiles are under way at once: one in registers, the others in shared memory."""
    return min(most, 1 + max(0, available - 1024) // tile_bytes)


def _chunk(M: int, programs: int, rows: int) -> int:
    """Rows a program walks over: whole tiles, so that no tile reaches into the next chunk.

    Where sums would become too long there are twice, thrice, … as many programs, so that all finish together.
    """
    tiles = -(-M // rows)
    turns = -(-tiles // (programs * LONGEST_SUM))
    return max(1, -(-tiles // (programs * turns))) * rows if M else rows
