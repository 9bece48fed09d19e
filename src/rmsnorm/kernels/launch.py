"""How the GPU kernels are launched: pure data from shapes and sizes, with nothing to import and nothing measured.

No bit of y or dx depends on it, since every sum over a row is in fp64. Which rows of dw one program sums comes from
M, N and the dtype of x, so dw is the same on every GPU that has room for programs that share rows (`ROOM`).

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
# Elements that a program holds at once if the rows are narrow; backward a program is one warp. With more rows, what is
# done once a row (an fp64 division, an address in 64 bits) fills the registers: 256 rows of 4 columns spill, and 16 of
# 32 in one warp.
TILE, MOST_ROWS = 2048, 64
# Programs of the backward kernels are so many for each multiprocessor of an H200, and as many elsewhere.
MULTIPROCESSORS = 132
# Numbers that one fp32 sum of dw adds up: its error grows with the root of them. The sums themselves add up in fp64.
LONGEST_SUM = 64
# Columns of the kernel that computes dw alone.
COLUMNS = 1024
# No row has more parts: `gpu._whole` asks one lane of a warp for each share.
MOST_PARTS = 32


class Tile(NamedTuple):
    """How the backward pass holds whole rows. programs: on a multiprocessor; stages: tiles under way and in work."""

    rows: int
    block_n: int
    warps: int
    programs: int
    stages: int = 3


# By the bytes of a number and the most columns.
_BACKWARD = {
    2: {
        512: Tile(2, 512, 2, 4, 5), 1024: Tile(2, 512, 2, 4), 1280: Tile(2, 256, 2, 4), 1536: Tile(2, 512, 4, 3),
        2048: Tile(1, 512, 2, 4), 3072: Tile(1, 1024, 4, 3), 5120: Tile(1, 1024, 4, 2), 7168: Tile(1, 2048, 8, 1, 4),
        8192: Tile(1, 2048, 8, 1),
    },
    4: {
        512: Tile(2, 512, 4, 2, 4), 1024: Tile(2, 512, 4, 2), 1280: Tile(2, 256, 2, 4), 1536: Tile(2, 512, 4, 2),
        2048: Tile(2, 1024, 8, 1), 3072: Tile(1, 1024, 8, 1), 4096: Tile(1, 2048, 16, 1), 5120: Tile(1, 1024, 8, 1),
        8192: Tile(1, 2048, 16, 1),
    },
}  # fmt: skip
# How programs share a row, by the same: pieces, block_n, warps. First where the row waits in shared memory, which
# forward is the same for all dtypes.
_FORWARD_STAGED = {262144: (2, 4096, 4)}
_BACKWARD_STAGED = {
    2: {65536: (4, 512, 2), 131072: (4, 1024, 4), 262144: (8, 1024, 4)},
    4: {262144: (8, 1024, 8)},
}
_FORWARD_SHARED = {
    2: {65536: (4, 1024, 4), 524288: (16, 1024, 4)},
    4: {65536: (4, 1024, 4), 262144: (8, 1024, 4)},
}
_BACKWARD_SHARED = {
    2: {65536: (4, 1024, 4), 262144: (4, 2048, 8)},
    4: {131072: (4, 1024, 4), 262144: (8, 1024, 8)},
}
STAGES = 3  # rows in shared memory backward
# Columns that all programs of a multiprocessor have of the rows that they share backward, by the bytes of a number:
# of so many rows at a time each program sums dw, whatever tile it has.
SHARED = {2: 16384, 4: 8192}


class Gpu(NamedTuple):
    """What a launch depends on of a GPU; as it stands, of a typical one."""

    shared_memory: int = 99 << 10  # bytes that one program may have, where the loads of the next tiles arrive
    multiprocessors: int = 132
    capability: int = 9  # the first of its two numbers


@dataclass(frozen=True)
class Launch:
    """A program works on tiles of `rows` rows of `pieces` x `block_n` columns.

    parts: programs that share a row; 0 means that one program walks over a row in pieces of block_n. programs: so many,
    or groups of so many parts, take turns at the tiles backward. staged: rows wait in shared memory, not in registers.
    overlap: kernels of ours may start before the one before has ended.
    """

    block_n: int
    warps: int
    rows: int = 1
    pieces: int = 1
    parts: int = 1
    stages: int = 1
    programs: int = 1
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
        config = _shared(N, _FORWARD_STAGED, _FORWARD_SHARED[itemsize], itemsize, aligned, gpu)
        return replace(config, overlap=config.parts > 0 and gpu.capability >= 9)
    if N <= 256:
        block_n, rows = _narrow(N, TILE)
        return Launch(block_n, _warps(rows * block_n, 16), rows)
    block_n = max(256, power_of_two(-(-N // 4)))
    rows, a_thread = (1, 16) if N > 512 else (2, 16 * itemsize)
    return Launch(block_n, _warps(rows * block_n * itemsize, a_thread), rows, pieces=-(-N // block_n))


@functools.lru_cache(4096)
def backward(
    M: int, N: int, itemsize: int, dy_itemsize: int, with_ds: bool, with_dw: bool, aligned: bool, gpu: Gpu
) -> Launch:
    """As `forward`; with dw a program holds its share of dw over many tiles.

    itemsize, dy_itemsize: bytes of one number of x and ds, and of dy.
    """
    overlap = gpu.capability >= 9
    if N > BACKWARD_WIDEST:
        # Beside the rows the weight, in 4 bytes at most, where there are more than 32 columns a thread.
        bytes_a_column = STAGES * (itemsize + dy_itemsize) + (4 if itemsize == 2 else 0)
        config = _shared(N, _BACKWARD_STAGED[itemsize], _BACKWARD_SHARED[itemsize], bytes_a_column, aligned, gpu)
        if config.parts == 0:
            return config
        # Whole rounds of the GPU, so that no row waits for a program of the next.
        programs = _programs(M, max(1, MULTIPROCESSORS * SHARED[itemsize] // (-(-N // PIECE) * PIECE)), 1)
        return replace(config, stages=STAGES if config.staged else 1, programs=programs, overlap=overlap)
    if N <= 256:
        block_n, rows = _narrow(N, 512 if N > 32 else 256)
        tile = Tile(rows, block_n, 1, 8)
    else:
        tile = next(tile for widest, tile in _BACKWARD[itemsize].items() if widest >= N)
        tile = tile._replace(rows=tile.rows if N % 16 == 0 else 1)
    rows, block_n, warps, programs, most = tile
    pieces = -(-N // block_n)
    if not with_dw:
        return Launch(block_n, warps, rows, pieces, programs=-(-M // rows))
    stages = 1  # what is not aligned cannot be loaded ahead into shared memory
    if N % 16 == 0:
        tile_bytes = rows * pieces * block_n * (dy_itemsize + itemsize * (2 if with_ds else 1))
        stages = _stages(tile_bytes, gpu.shared_memory // programs, most)
        if stages == 1:  # rather one program at a time than no loads ahead
            stages = _stages(tile_bytes, gpu.shared_memory, most)
    programs = _programs(M, MULTIPROCESSORS * programs, rows)
    return Launch(block_n, warps, rows, pieces, stages=stages, programs=programs, overlap=overlap)


@functools.lru_cache(4096)
def dw_alone(M: int, N: int, loaded: int, gpu: Gpu) -> Launch:
    """A program takes block_n columns of some of the rows: any N, nothing is summed along the row."""
    block_n = min(power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    programs = _programs(M, max(1, 4 * MULTIPROCESSORS // -(-N // block_n)), rows)
    stages = _stages(rows * block_n * loaded, gpu.shared_memory // 4, 3) if N % 16 == 0 else 1
    return Launch(block_n, 4, rows, stages=stages, programs=programs, overlap=gpu.capability >= 9)


@functools.lru_cache(4096)
def sum_partials(programs: int, N: int, gpu: Gpu) -> Launch:
    """All shares of a column are one program's: of many shares narrow columns, so that many programs read them."""
    rows = min(power_of_two(max(1, programs)), 512)
    return Launch(min(power_of_two(N), 4096 // rows), 8, rows, overlap=gpu.capability >= 9)


def no_shares_yet(gpu: Gpu) -> Launch:
    """The kernel that prepares what programs exchange about rows that they share."""
    return Launch(1024, 4, overlap=gpu.capability >= 9)


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


def _narrow(N: int, size: int) -> tuple[int, int]:
    """Columns and rows of a tile of several rows."""
    block_n = power_of_two(N)
    return block_n, min(size // block_n, MOST_ROWS)


def _warps(size: int, a_thread: int) -> int:
    return min(max(1, size // (32 * a_thread)), 16)


def _stages(tile_bytes: int, available: int, most: int) -> int:
    """How many tiles are under way at once: one in registers, the others in shared memory."""
    return min(most, 1 + max(0, available - 1024) // tile_bytes)


def _programs(M: int, most: int, rows: int) -> int:
    """Programs that take turns at tiles of so many rows: no more of them than are needed to end together.

    Where sums would become too long there are twice, thrice, … as many.
    """
    tiles = -(-M // rows)
    if tiles == 0:
        return 0
    turns = -(-tiles // (most * LONGEST_SUM))
    a_program = -(-tiles // (most * turns))
    return -(-tiles // a_program)
