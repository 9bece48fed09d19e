"""How the GPU kernels are launched: pure data from shapes and sizes, with nothing to import and nothing measured.

No bit of y or dx depends on it, since every sum over a row is in fp64. Which rows of dw one program sums comes from
M, N, the dtypes and whether a gradient comes through s, so dw is the same on every GPU that has room for programs that
share rows (`ROOM`).

Where a threshold comes from a measurement, it is the best of those tried on an H200 (benchmarks/LOG.md).
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

# Columns of a row that one program holds in registers, without spills but for a few bytes in a few tiles (ptxas).
FORWARD_WIDEST, ADD_WIDEST = 16384, 12288
BACKWARD_WIDEST = {2: 10240, 4: 8192}  # by the bytes of a number
UNALIGNED_WIDEST = 8192  # backward, if 16 does not divide the width: narrow loads take more registers
# All programs that share a wider row must run at once, also beside other kernels that wait for theirs: only on a GPU
# with room for this many times as many. Elsewhere one program walks over a row that is wider.
ROOM = 4
PIECE = 8192  # columns that a walk takes at once, 16 elements a thread
# Elements of a tile of the kernel that computes dw alone, and rows of any tile: with more, what is done once a row (an
# fp64 division, an address in 64 bits) fills the registers. 256 rows of 4 columns spill.
TILE, MOST_ROWS = 2048, 64
# Programs of the backward kernels are so many for each multiprocessor of an H200, and as many elsewhere.
MULTIPROCESSORS = 132
# Numbers that one fp32 sum of dw adds up, by the bytes of a number of dw. Where they are as random as rounding is, the
# error grows with their root, far below what 16 bits round off; at worst it grows with their number, to half of that in
# fp16. The sums themselves add up in fp64.
LONGEST_SUM = {2: 1024, 4: 64}
# Columns of the kernel that computes dw alone.
COLUMNS = 1024
# No row has more parts: `sum_of_shares` asks one lane of a warp for each share.
MOST_PARTS = 32


class Tile(NamedTuple):
    """How the backward pass holds whole rows.

    programs: on a multiprocessor at once; programs_more: with a gradient through s or a dy wider than x, which take
    more registers, if not as many. stages: tiles under way and in work. alone: without dw each tile is a program's own.
    """

    rows: int
    block_n: int
    warps: int
    programs: int
    stages: int = 3
    programs_more: int = 0
    alone: bool = False


class Shared(NamedTuple):
    """How programs share a row. programs, programs_more: as of a `Tile`."""

    pieces: int
    block_n: int
    warps: int
    programs: int = 0
    programs_more: int = 0

    def parts(self, N: int) -> int:
        """How many share a row of N columns."""
        return -(-N // (self.pieces * self.block_n))


# By the bytes of a number and the most columns. Forward: rows, block_n, warps.
_FORWARD = {
    2: {
        768: (2, 256, 1), 1024: (1, 512, 2), 2048: (1, 512, 2), 4096: (1, 1024, 4), 5120: (1, 2048, 4),
        8192: (1, 2048, 8), 12288: (1, 4096, 8), 16384: (1, 8192, 16),
    },
    4: {
        512: (2, 256, 1), 1024: (1, 256, 2), 2048: (1, 512, 4), 4096: (1, 1024, 8), 8192: (1, 2048, 16),
        12288: (1, 4096, 16), 16384: (1, 4096, 8),
    },
}  # fmt: skip
# Rows of up to 256 columns, several to a program of one warp: elements and programs, as above.
_BACKWARD_NARROW = {2: {64: (256, 20), 256: (512, 16)}, 4: {64: (256, 16), 256: (512, 8)}}
_BACKWARD = {
    2: {
        512: Tile(2, 512, 2, 4, 5), 640: Tile(2, 256, 1, 8), 768: Tile(2, 256, 1, 6, alone=True),
        1024: Tile(2, 512, 2, 4), 1280: Tile(2, 256, 2, 4), 1536: Tile(2, 512, 4, 3, 3, 2),
        2560: Tile(1, 512, 2, 4), 3072: Tile(1, 1024, 4, 3, 3, 2), 5120: Tile(1, 1024, 4, 2),
        7680: Tile(1, 2048, 8, 1, 4), 10240: Tile(1, 2048, 8, 1),
    },
    4: {
        512: Tile(2, 512, 2, 2, alone=True), 768: Tile(2, 256, 2, 4, alone=True), 1024: Tile(2, 512, 2, 2, alone=True),
        1280: Tile(2, 256, 2, 4, alone=True), 1536: Tile(2, 512, 4, 3, 2, alone=True), 3072: Tile(2, 1024, 8, 1),
        4096: Tile(1, 2048, 16, 1, alone=True), 5120: Tile(1, 1024, 8, 1, alone=True), 8192: Tile(1, 2048, 16, 1),
    },
}  # fmt: skip
# By the same. First where the row waits in shared memory; what others do backward goes by the programs of these too.
_FORWARD_STAGED = {
    2: {20480: Shared(2, 2048, 4), 131072: Shared(2, 4096, 4), 204800: Shared(3, 4096, 4), 262144: Shared(2, 8192, 4)},
    4: {262144: Shared(2, 4096, 4)},
}
_BACKWARD_STAGED = {
    2: {65536: Shared(4, 512, 2, 8, 6), 131072: Shared(4, 1024, 4, 4, 3), 262144: Shared(8, 1024, 4, 2)},
    4: {131072: Shared(4, 1024, 8, 2), 262144: Shared(8, 1024, 8, 1)},
}
_FORWARD_SHARED = {
    2: {65536: Shared(4, 1024, 4), 524288: Shared(16, 1024, 4)},
    4: {65536: Shared(4, 1024, 4), 262144: Shared(8, 1024, 4)},
}
_BACKWARD_SHARED = {
    2: {65536: Shared(4, 1024, 4), 262144: Shared(4, 2048, 8)},
    4: {131072: Shared(4, 1024, 4), 262144: Shared(8, 1024, 8)},
}
STAGES = 3  # rows in shared memory backward

AnyTile = TypeVar("AnyTile")


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
    """Whole rows in pieces; wider ones shared between programs.

    aligned: rows begin and end at multiples of 16 numbers.
    """
    if (ADD_WIDEST if with_residual else FORWARD_WIDEST) < N:
        staged = _FORWARD_STAGED[4 if with_residual else itemsize]  # with a residual the tiles of fp32 are the faster
        config = _shared(N, staged, _FORWARD_SHARED[itemsize], itemsize, aligned, gpu)
        return replace(config, overlap=config.parts > 0 and gpu.capability >= 9)
    if N <= 256:
        block_n, rows = _narrow(N, 4096 // itemsize)
        narrow_loads = itemsize == 2 and N % 16 != 0  # which take more registers
        warps = max(1, rows * block_n * itemsize // (1024 if narrow_loads else 2048))
        return Launch(block_n, warps, rows)
    rows, block_n, warps = _narrowest(_FORWARD[itemsize], N)
    return Launch(block_n, warps, rows, pieces=-(-N // block_n))


@functools.lru_cache(4096)
def backward(
    M: int, N: int, itemsize: int, dy_itemsize: int, dw_itemsize: int, with_ds: bool, aligned: bool, gpu: Gpu
) -> Launch:
    """As `forward`; a program takes many tiles, over which it holds its share of dw, if that is asked for.

    itemsize, dy_itemsize, dw_itemsize: bytes of one number of x and ds, of dy, and of dw or 0 without it.
    """
    overlap = gpu.capability >= 9
    longest = LONGEST_SUM.get(dw_itemsize, M)
    more = with_ds or dy_itemsize > itemsize
    if (BACKWARD_WIDEST[itemsize] if N % 16 == 0 else min(BACKWARD_WIDEST[itemsize], UNALIGNED_WIDEST)) < N:
        # Beside the rows the weight, in 4 bytes at most, where there are more than 32 columns a thread.
        bytes_a_column = STAGES * (itemsize + dy_itemsize) + (4 if itemsize == 2 else 0)
        config = _shared(N, _BACKWARD_STAGED[itemsize], _BACKWARD_SHARED[itemsize], bytes_a_column, aligned, gpu)
        if config.parts == 0:
            return config
        # One round of the GPU, so that no row waits for a program of the next; one program a multiprocessor where loads
        # are narrow, which take more registers.
        like = _narrowest(_BACKWARD_STAGED[itemsize], N)
        at_once = MULTIPROCESSORS * (_at_once(like, more) if N % 16 == 0 else 1) // like.parts(N)
        programs = _programs(M, max(1, at_once), 1, longest)
        return replace(config, stages=STAGES if config.staged else 1, programs=programs, overlap=overlap)
    if N <= 256:
        elements, programs = _narrowest(_BACKWARD_NARROW[itemsize], N)
        block_n, rows = _narrow(N, elements)
        tile = Tile(rows, block_n, 1, programs, alone=itemsize == 4 or N > 128)
    else:
        tile = _narrowest(_BACKWARD[itemsize], N)
        tile = tile._replace(rows=tile.rows if N % 16 == 0 else 1)
    rows, block_n, warps, most = tile.rows, tile.block_n, tile.warps, tile.stages
    programs = _at_once(tile, more)
    pieces = -(-N // block_n)
    if dw_itemsize == 0 and (tile.alone or N % 16 != 0):
        return Launch(block_n, warps, rows, pieces, programs=-(-M // rows))
    stages = 1  # what is not aligned cannot be loaded ahead into shared memory
    if N % 16 == 0:
        tile_bytes = rows * pieces * block_n * (dy_itemsize + itemsize * (2 if with_ds else 1))
        stages = _stages(tile_bytes, gpu.shared_memory // programs, most)
        if stages == 1:  # rather one program at a time than no loads ahead
            stages = _stages(tile_bytes, gpu.shared_memory, most)
    programs = _programs(M, MULTIPROCESSORS * programs, rows, longest)
    return Launch(block_n, warps, rows, pieces, stages=stages, programs=programs, overlap=overlap)


@functools.lru_cache(4096)
def dw_alone(M: int, N: int, loaded: int, dw_itemsize: int, gpu: Gpu) -> Launch:
    """A program takes block_n columns of some of the rows: any N, nothing is summed along the row."""
    block_n = min(power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    programs = _programs(M, max(1, 4 * MULTIPROCESSORS // -(-N // block_n)), rows, LONGEST_SUM[dw_itemsize])
    stages = _stages(rows * block_n * loaded, gpu.shared_memory // 4, 3) if N % 16 == 0 else 1
    return Launch(block_n, 4, rows, stages=stages, programs=programs, overlap=gpu.capability >= 9)


@functools.lru_cache(4096)
def sum_partials(programs: int, N: int, gpu: Gpu) -> Launch:
    """All shares of a column are one program's: of many shares narrow columns, so that many programs read them."""
    rows = min(max(power_of_two(max(1, programs)) // 4, 8), 128)
    size, warps = (4096, 8) if rows == 8 else (1024, 4)
    return Launch(min(power_of_two(N), size // rows), warps, rows, overlap=gpu.capability >= 9)


def no_shares_yet(gpu: Gpu) -> Launch:
    """The kernel that prepares what programs exchange about rows that they share."""
    return Launch(1024, 4, overlap=gpu.capability >= 9)


def power_of_two(N: int) -> int:
    """The smallest that is not below N."""
    return 1 << (N - 1).bit_length()


def _shared(
    N: int,
    staged: dict[int, Shared],
    tiles: dict[int, Shared],
    bytes_a_column: int,
    aligned: bool,
    gpu: Gpu,
) -> Launch:
    """Of the first tiles for rows as wide that the GPU has room for, in shared memory if may be; a walk if none are."""
    for widest, tile in staged.items() if aligned and N % 16 == 0 else ():
        parts = tile.parts(N)
        fits = tile.pieces * tile.block_n * bytes_a_column + 1024 <= gpu.shared_memory
        if widest >= N and fits and ROOM * parts <= gpu.multiprocessors:
            return Launch(tile.block_n, tile.warps, 1, tile.pieces, parts, staged=True)
    for widest, tile in tiles.items():
        parts = tile.parts(N)
        if widest >= N and ROOM * parts <= gpu.multiprocessors:
            # Narrow loads take more registers, and more threads cost them nothing.
            warps = tile.warps if N % 16 == 0 else 2 * tile.warps
            if warps <= 8:
                return Launch(tile.block_n, warps, 1, tile.pieces, parts)
    return Launch(PIECE, 16, parts=0)


def _narrow(N: int, size: int) -> tuple[int, int]:
    """Columns and rows of a tile of several rows."""
    block_n = power_of_two(N)
    return block_n, min(size // block_n, MOST_ROWS)


def _narrowest(tiles: dict[int, AnyTile], N: int) -> AnyTile:
    """Of those for rows as wide or wider."""
    return next(tile for widest, tile in tiles.items() if widest >= N)


def _at_once(tile: Tile | Shared, more: bool) -> int:
    """The programs of a multiprocessor; `more`: that take more registers."""
    return (more and tile.programs_more) or tile.programs


def _stages(tile_bytes: int, available: int, most: int) -> int:
    """How many tiles are under way at once: one in registers, the others in shared memory."""
    return min(most, 1 + max(0, available - 1024) // tile_bytes)


def _programs(M: int, most: int, rows: int, longest: int) -> int:
    """Programs that take turns at tiles of so many rows: no more of them than are needed to end together.

    Where sums would become longer than the longest there are twice, thrice, … as many.
    """
    tiles = -(-M // rows)
    if tiles == 0:
        return 0
    turns = -(-tiles // (most * longest))
    a_program = -(-tiles // (most * turns))
    return -(-tiles // a_program)
