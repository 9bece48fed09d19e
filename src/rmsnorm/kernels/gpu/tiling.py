"""Chooses tile sizes and launch parameters of the GPU kernels from shapes and sizes; measures nothing at run time.

The choice does not change any bit of y or dx, because every sum over a row is in fp64. Which rows of dw one program
sums depends on M, N, the dtypes and whether a gradient arrives through s. So dw is the same on every GPU that has room
for programs that share rows (`ROOM`).

The figures beside tables and thresholds were measured on an H200. "1.16 to 1.06" means before and after a change
(benchmarks/LOG.md).
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

# The most columns that one program holds in registers; ptxas reports no spills except a few bytes in a few tiles.
# Sharing wider rows between programs: add and norm of 16,384 columns 324 to 268 us; fp32 backward of 10,240 columns
# 1.25 to 1.05 of a copy's time. Not sharing: 16-bit backward of 9216 columns 1.16 to 1.06; of 12,288 it would be 1.4.
FORWARD_WIDEST, ADD_WIDEST = 16384, 12288
BACKWARD_WIDEST = {2: 10240, 4: 8192}  # by itemsize
UNALIGNED_WIDEST = 8192  # backward, if rows are not whole words: narrow loads take more registers. Not measured alone
# Numbers in 16 bytes, the widest load (a word), by itemsize. If rows are not whole words but contiguous, words are
# loaded nevertheless, and a program takes rows that are APART rows apart: those begin at the same place within a word.
WORD = {2: 8, 4: 4}
APART = 8
SHIFTED_FROM = 64  # columns; narrower rows are loaded number by number. Not measured alone
# Wider rows are shared between programs, which wait for each other and so must all run at once, even beside other
# kernels that do the same. That requires a GPU with at least ROOM times as many multiprocessors as a row has programs.
# On a smaller GPU one program loops over the row. Neither is measured alone.
ROOM = 4
PIECE = 8192  # columns of one step of that loop, 16 elements a thread
# Elements of a tile of `dw_alone`, and the most rows of any tile: with more rows, the values held for each row (an fp64
# quotient, a 64-bit address) fill the registers. 256 rows of 4 columns spill. Not measured alone.
TILE, MOST_ROWS = 2048, 64
# Of an H200. The number of programs of a backward kernel is a multiple of it on every GPU, so that dw is the same.
MULTIPROCESSORS = 132
# The most numbers in one fp32 partial sum of dw, by the itemsize of dw; the partial sums are added in fp64. With random
# rounding errors the error grows with the square root of this, far below the rounding of a 16-bit result. At worst it
# grows in proportion, to half of that rounding in fp16. 64 to 1024: 16384 x 7168 1.106 to 1.070 of a copy's time.
LONGEST_SUM = {2: 1024, 4: 64}
# The most columns of a tile of `dw_alone`. Not measured alone.
COLUMNS = 1024
# The most programs that share a row: in `sum_of_shares` one lane of a warp reads each share.
# Reading the rows once, 262,144 columns backward: 498 to 420 us in bf16, 944 to 557 in fp32.
MOST_PARTS = 32


class Tile(NamedTuple):
    """How programs of the backward pass hold whole rows.

    programs: how many run on a multiprocessor at once. stages: tiles that are being loaded or processed. programs_more,
    stages_more: these two if a gradient arrives through s or dy is wider than x, which takes more registers; 0 if they
    do not change. alone: whether each tile gets its own program if dw is not needed.
    """

    rows: int
    block_n: int
    warps: int
    programs: int
    stages: int = 3
    programs_more: int = 0
    alone: bool = False
    stages_more: int = 0


class WholeRows(NamedTuple):
    """How the forward pass holds whole rows: rows of a program, and columns that it loads at once."""

    rows: int
    block_n: int
    warps: int


class NarrowRows(NamedTuple):
    """How the backward pass holds rows of few columns: elements: of a tile; the rest: as in `Tile`."""

    elements: int
    programs: int
    stages: int = 3
    programs_more: int = 0
    stages_more: int = 0


class Shared(NamedTuple):
    """How programs share a row. programs, programs_more: as in `Tile`."""

    pieces: int
    block_n: int
    warps: int
    programs: int = 0
    programs_more: int = 0

    def parts(self, N: int) -> int:
        """How many programs share a row of N columns."""
        return -(-N // (self.pieces * self.block_n))


# The tables below are keyed by itemsize and then by the most columns. The comment on a row is the time of the pass as a
# multiple of that of a copy of as many bytes, at the widths that the row serves, each in the latest run of
# benchmarks/results/tiles-cuda.json that timed this launch. Those of pieces, of shifted rows, of 16-bit narrow rows in
# the backward pass and of gated norms are from the sweeps in benchmarks/LOG.md.
_FORWARD = {
    2: {
        768: WholeRows(2, 256, 1),  # 0.99 to 1.03
        2048: WholeRows(1, 512, 2),  # 0.99 to 1.01
        4096: WholeRows(1, 1024, 4),  # 1.00 to 1.04
        5120: WholeRows(1, 2048, 4),  # 1.00 to 1.02
        8192: WholeRows(1, 2048, 8),  # 0.99 to 1.04
        12288: WholeRows(1, 4096, 8),  # 1.00 to 1.04
        16384: WholeRows(1, 8192, 16),  # 1.02 to 1.07
    },
    4: {
        512: WholeRows(2, 256, 1),  # 1.01
        1024: WholeRows(1, 256, 2),  # 0.98 to 1.00
        2048: WholeRows(1, 512, 4),  # 0.99 to 1.02
        4096: WholeRows(1, 1024, 8),  # 1.00 to 1.03
        8192: WholeRows(1, 2048, 16),  # 0.99 to 1.03
        12288: WholeRows(1, 4096, 16),  # 1.00 to 1.04
        16384: WholeRows(1, 4096, 8),  # 1.01 to 1.04
    },
}
# Rows of 65 to 256 columns that are whole words, but not a power of two of columns. Small pieces: few of their columns
# are idle, and few threads compute each rstd.
_FORWARD_PIECES = {
    2: {
        96: WholeRows(16, 32, 2),  # 0.97 to 1.08
        256: WholeRows(16, 64, 4),  # 0.98 to 1.02
    },
    4: {
        96: WholeRows(8, 32, 2),  # 0.98 to 1.01
        256: WholeRows(8, 64, 4),  # 1.00 to 1.01
    },
}
# Rows that are not whole words, but contiguous. The piece for their ends is as large as the others, so these are small.
_FORWARD_SHIFTED = {
    2: {
        96: WholeRows(8, 16, 1),  # 1.54 to 1.75. With a residual the tile for fp32 is used: 1.36
        128: WholeRows(8, 32, 1),  # 1.44
        256: WholeRows(8, 32, 2),  # 1.47
        512: WholeRows(2, 64, 1),  # 1.50
        1024: WholeRows(1, 128, 1),  # 1.24
        3328: WholeRows(1, 256, 2),  # 1.28
        6656: WholeRows(1, 512, 4),  # 1.46
        16384: WholeRows(1, 1024, 8),  # not measured alone
    },
    4: {
        256: WholeRows(8, 32, 2),  # 1.06 to 1.12
        512: WholeRows(2, 64, 1),  # 1.09
        2048: WholeRows(1, 256, 2),  # 1.03
        6656: WholeRows(1, 512, 4),  # 1.04
        16384: WholeRows(1, 1024, 8),  # not measured alone
    },
}
# Rows of up to 256 columns; a program of one warp takes several.
_BACKWARD_NARROW = {
    2: {
        32: NarrowRows(256, 20),  # not measured alone
        # Without dw not measured; at 128 columns with a gradient of the sum 1.15.
        128: NarrowRows(512, 20, 1, 16, 3),  # 1.14 to 1.15
        256: NarrowRows(512, 16),  # 1.11
    },
    4: {
        64: NarrowRows(256, 16),  # 1.15 to 1.49
        256: NarrowRows(512, 8),  # 1.08 to 1.25
    },
}
_BACKWARD = {
    2: {
        512: Tile(2, 512, 2, 4, 5),  # 1.07
        640: Tile(2, 256, 1, 8),  # 1.07 to 1.09
        768: Tile(2, 256, 1, 6, alone=True),  # 1.07
        1024: Tile(2, 512, 2, 4),  # 1.03
        1280: Tile(2, 256, 2, 4),  # 1.05
        1536: Tile(2, 512, 4, 3, 3, 2),  # 1.03
        2560: Tile(1, 512, 2, 4),  # 1.04 to 1.06
        3072: Tile(1, 1024, 4, 3, 3, 2),  # 1.04 to 1.05
        5120: Tile(1, 1024, 4, 2),  # 1.04 to 1.08
        7680: Tile(1, 2048, 8, 1, 4),  # 1.04 to 1.06
        10240: Tile(1, 2048, 8, 1),  # 1.03 to 1.05
    },
    4: {
        512: Tile(2, 512, 2, 2, alone=True),  # 1.07
        768: Tile(2, 256, 2, 4, alone=True),  # 1.05 to 1.08
        1024: Tile(2, 512, 2, 2, alone=True),  # 1.06
        1280: Tile(2, 256, 2, 4, alone=True),  # 1.04
        1536: Tile(2, 512, 4, 3, 2, alone=True),  # 1.04
        3072: Tile(2, 1024, 8, 1),  # 1.05 to 1.07
        4096: Tile(1, 2048, 16, 1, alone=True),  # 1.06 to 1.07
        5120: Tile(1, 1024, 8, 1, alone=True),  # 1.06
        8192: Tile(1, 2048, 16, 1),  # 1.07 to 1.10
    },
}
# As the tables for the forward pass with these names.
_BACKWARD_PIECES = {
    2: {
        80: Tile(4, 32, 1, 16, programs_more=12),  # 1.18; with a gradient of the sum 1.14
        128: Tile(4, 64, 1, 12),  # 1.15 to 1.22
        176: Tile(4, 64, 1, 12, alone=True),  # 1.08 to 1.09
        256: Tile(4, 64, 1, 8, alone=True),  # 1.13 to 1.16
    },
    4: {
        96: Tile(8, 32, 1, 12, alone=True),  # 1.08 to 1.10
        256: Tile(4, 64, 1, 16, 2, alone=True),  # 1.06 at 200 columns; 8 rows of 32 columns spill at 176 with a ds
    },
}
_BACKWARD_SHIFTED = {
    2: {
        64: Tile(8, 16, 1, 8),  # 1.51
        96: Tile(4, 32, 1, 12, programs_more=8),  # 1.41; with a gradient of the sum 1.40
        256: Tile(4, 32, 1, 16),  # 1.32 to 1.47
        512: Tile(2, 64, 1, 8),  # 1.24
        1024: Tile(1, 128, 1, 8),  # 1.11
        2048: Tile(1, 256, 2, 4),  # not measured alone
        4096: Tile(1, 512, 4, 2),  # 1.20
        8192: Tile(1, 1024, 8, 2),  # 1.46
    },
    4: {
        128: Tile(8, 32, 2, 12),  # 1.31
        256: Tile(8, 32, 2, 8, 2),  # 1.15
        512: Tile(2, 64, 1, 8),  # 1.18
        1024: Tile(2, 128, 4, 6),  # 1.08
        4096: Tile(1, 512, 4, 2),  # 1.15
        8192: Tile(1, 1024, 8, 2),  # not measured alone
    },
}
# Rows that programs share. The staged kernels hold a row in shared memory, the others in registers. In the backward
# pass both take the number of programs from the staged table.
_FORWARD_STAGED = {
    2: {
        20480: Shared(2, 2048, 4),  # 1.07
        131072: Shared(2, 4096, 4),  # 1.06 to 1.12
        204800: Shared(3, 4096, 4),  # 1.09 to 1.10
        262144: Shared(2, 8192, 4),  # 1.09
    },
    4: {
        262144: Shared(2, 4096, 4),  # 1.06 to 1.11
    },
}
_BACKWARD_STAGED = {
    2: {
        65536: Shared(4, 512, 2, 8, 6),  # 1.05 to 1.18
        131072: Shared(4, 1024, 4, 4, 3),  # 1.11 to 1.13
        262144: Shared(8, 1024, 4, 2),  # 1.27 to 1.29
    },
    4: {
        131072: Shared(4, 1024, 8, 2),  # 1.04 to 1.07
        262144: Shared(8, 1024, 8, 1),  # 1.04
    },
}
# These serve only rows that the staged kernels do not take, such as those that are not whole words.
_FORWARD_SHARED = {
    2: {
        65536: Shared(4, 1024, 4),  # not measured alone
        524288: Shared(
            16, 1024, 4
        ),  # 262,144 columns: 179 us, against 196 with a smaller part of the row for each program
    },
    4: {
        65536: Shared(4, 1024, 4),  # not measured alone
        262144: Shared(8, 1024, 4),  # not measured alone
    },
}
_BACKWARD_SHARED = {
    2: {
        65536: Shared(4, 1024, 4),  # not measured alone
        262144: Shared(4, 2048, 8),  # not measured alone
    },
    4: {
        131072: Shared(4, 1024, 4),  # not measured alone
        262144: Shared(8, 1024, 8),  # not measured alone
    },
}
# Gated norms, by the larger itemsize of x and the gate. The times are with a gate of the dtype of x that comes last,
# except in the tables for a gate that comes first. Over wider rows than these, one program loops.
GATED_FORWARD_WIDEST = 8192
GATED_BACKWARD_WIDEST = 8192
# The same for rows that are not whole words, by itemsize: wider ones of fp32 would spill up to 1512 bytes a thread.
_GATED_UNALIGNED_WIDEST = {2: 8192, 4: 4096}
GATED_NARROW = {2: 512, 4: 256}  # elements of a tile of at most 256 columns in the forward pass, for one warp
_GATED_FORWARD = {
    2: {
        512: WholeRows(1, 256, 1),  # 1.06
        1024: WholeRows(1, 512, 1),  # 1.06
        2048: WholeRows(1, 1024, 2),  # 1.06
        3072: WholeRows(1, 1024, 2),  # 1.03
        4096: WholeRows(1, 2048, 4),  # 0.98 to 1.11
        8192: WholeRows(1, 2048, 8),  # 1.13; 5120 columns 1.13
    },
    4: {
        512: WholeRows(1, 256, 1),  # 1.01 with the gate first
        1024: WholeRows(1, 512, 2),  # 1.01 with the gate first
        2048: WholeRows(1, 1024, 4),  # 1.07
        4096: WholeRows(1, 2048, 8),  # 0.98 to 1.06
        5120: WholeRows(1, 1024, 8),  # 1.01
        8192: WholeRows(1, 2048, 16),  # 1.07
    },
}
_GATE_LAST_NARROW_BACKWARD = {
    2: {
        128: NarrowRows(256, 24, 1),  # 1.10; 64 columns 1.13, 72 columns 1.54
        256: NarrowRows(256, 28, 1),  # 1.14
    },
    4: {
        256: NarrowRows(512, 12),  # 1.12; 128 columns 1.10
    },
}
_GATE_LAST_BACKWARD = {
    2: {
        512: Tile(1, 256, 1, 12),  # 1.19
        1024: Tile(1, 1024, 2, 6),  # 1.20
        1536: Tile(1, 512, 4, 4),  # 1.27
        2048: Tile(1, 2048, 4, 3),  # 1.24
        3072: Tile(1, 1024, 4, 3, 1),  # 1.30; 2560 columns 1.40
        4096: Tile(1, 2048, 8, 2, 1),  # 1.30
        5120: Tile(1, 1024, 4, 2, 1),  # 1.40
        6144: Tile(1, 2048, 16, 1, 1),  # 1.55
        8192: Tile(1, 4096, 16, 1, 1),  # 1.38 to 1.40
    },
    4: {
        512: Tile(1, 512, 1, 12),  # 1.12
        1024: Tile(1, 1024, 8, 3),  # 1.08
        1536: Tile(1, 512, 4, 3),  # 1.07
        2048: Tile(1, 2048, 8, 3),  # 1.10
        3072: Tile(1, 1024, 8, 2, 2),  # 1.20
        4096: Tile(1, 4096, 16, 1),  # 1.06
        6144: Tile(1, 2048, 16, 1, 2),  # 1.31; 5120 columns 1.45
        8192: Tile(1, 4096, 16, 1, 2),  # 1.23
    },
}
# With the gate first, dgate is computed after the sum over the row and needs more registers.
_GATE_FIRST_NARROW_BACKWARD = {
    2: {
        128: NarrowRows(256, 20, 1),  # 1.13
        256: NarrowRows(512, 16),  # 1.18
    },
    4: {
        32: NarrowRows(256, 12),  # not measured alone; of 512 elements 32 columns spill 60 bytes
        256: NarrowRows(512, 16),  # 128 columns 1.08
    },
}
_GATE_FIRST_BACKWARD = {
    2: {
        512: Tile(1, 256, 1, 12),  # 1.11
        1024: Tile(1, 1024, 2, 6),  # 1.14
        1536: Tile(1, 512, 4, 4, 1),  # 1.23
        2048: Tile(1, 2048, 4, 3),  # 1.23
        3072: Tile(1, 1024, 8, 2, 1),  # 1.29
        4096: Tile(1, 2048, 4, 2, 1),  # 1.30
        6144: Tile(1, 2048, 16, 1, 1),  # 1.40; 5120 columns 1.53
        8192: Tile(1, 4096, 8, 1, 1),  # 1.39
    },
    4: {
        512: Tile(1, 512, 1, 12),  # 1.06
        1024: Tile(1, 1024, 4, 3),  # 1.05
        1536: Tile(1, 512, 4, 3),  # 1.09
        2048: Tile(1, 2048, 8, 2),  # 1.34
        4096: Tile(1, 4096, 16, 1),  # 3072 columns 1.24
        6144: Tile(1, 2048, 16, 1, 2),  # 1.45; 5120 columns 1.62
        8192: Tile(1, 8192, 16, 1, 2),  # 1.54, although it spills 384 bytes; by the loop 2.57
    },
}
# With at least so many gates of 16 bits, a table of their functions is computed first. It costs a launch; with it the
# forward pass with the gate first takes 1.08 to 1.14 of a copy's time, without it 1.7 to 2.1.
TABLE_LEAST = 1 << 22
TABLE_PIECE = 256  # entries that one program computes
GATED_PIECE = 4096  # columns of one step of the loop over wide rows, 8 elements a thread
# The most tiles of two forward passes that are launched together. More keep the GPU busy for longer than a launch. Not
# measured alone.
MOST_TILES_OF_TWO = 8 * MULTIPROCESSORS
STAGES = 3  # rows that a staged backward program has in shared memory; with 4 or 5 it takes 1.6 to 1.7 of a copy's time

AnyTile = TypeVar("AnyTile")


class Gpu(NamedTuple):
    """The properties of a GPU that a launch depends on; the defaults describe a typical one."""

    shared_memory: int = 99 << 10  # bytes that one program may use
    multiprocessors: int = 132
    capability: int = 9  # the major number of the compute capability


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel: each program processes tiles of `rows` rows and `pieces` x `block_n` columns.

    parts: how many programs share a row; 0 means that one program loops over a row in steps of block_n columns.
    programs: how many programs (or groups of `parts` programs) the backward pass distributes its tiles over.
    apart: how many rows a program's rows are apart, so that all of them begin at the same place within a word, or have
    the same weight. heads: how many weights there are; if more than one, `apart` is this number.
    staged: whether rows are held in shared memory instead of registers. overlap: whether one of our kernels may start
    before the previous one has ended.
    """

    block_n: int
    warps: int
    rows: int = 1
    pieces: int = 1
    parts: int = 1
    stages: int = 1
    programs: int = 1
    apart: int = 1
    heads: int = 1
    staged: bool = False
    overlap: bool = False

    def for_any_strides(self, N: int) -> "Launch":
        """The launch for rows of N columns of which no word is loaded at once."""
        return self if self.apart == 1 or self.parts != 1 else replace(self, pieces=-(-N // self.block_n))

    def tiles(self, M: int) -> int:
        """How many tiles M rows have; the last ones can be empty."""
        return _tiles(M, self.rows, self.apart)

    @property
    def constants(self) -> dict[str, int | bool]:
        """The compile-time constants of the kernels, by name."""
        return {
            "ROWS": self.rows,
            "APART": self.apart,
            "PIECES": self.pieces,
            "BLOCK_N": self.block_n,
            "HEADS": self.heads,
            "STAGES": self.stages,
            "OVERLAP": self.overlap,
        }


@functools.lru_cache(4096)
def forward(N: int, itemsize: int, with_residual: bool, aligned: bool, gpu: Gpu, heads: int = 1) -> Launch:
    """The launch of the forward pass: whole rows, or for wide rows several programs that share each.

    aligned: whether rows begin and end at multiples of 16 bytes. heads: as in `Launch`.
    """
    body, apart = (_body(N, itemsize), _apart(N, itemsize)) if heads == 1 else (N, heads)
    if (ADD_WIDEST if with_residual else FORWARD_WIDEST) < N:
        if heads > 1:
            return _looping(heads)
        staged = _FORWARD_STAGED[4 if with_residual else itemsize]  # with a residual the tiles for fp32 are faster
        config = _shared(N, staged, _FORWARD_SHARED[itemsize], itemsize, aligned, gpu)
        return replace(config, apart=apart, overlap=config.parts > 0 and gpu.capability >= 9)
    tile = _forward_tile(N, itemsize, with_residual)
    return Launch(tile.block_n, tile.warps, tile.rows, pieces=-(-body // tile.block_n), apart=apart, heads=heads)


def backward_is_wide(N: int, itemsize: int) -> bool:
    """Whether rows of N numbers of x are too wide for a backward program, so that programs share a row or loop over it.

    The kernels for such rows take only one dy, because shared memory has no room for more.
    """
    return _exceeds(N, itemsize, BACKWARD_WIDEST[itemsize], UNALIGNED_WIDEST)


def _exceeds(N: int, itemsize: int, widest: int, unaligned_widest: int) -> bool:
    """Whether rows are wider than `widest`, or than `unaligned_widest` if they are not whole words."""
    return (widest if _is_whole_words(N, itemsize) else min(widest, unaligned_widest)) < N


def sum_gradients(N: int) -> Launch:
    """The launch of the kernel `sum_gradients`, which adds several gradients of y if rows are wide."""
    return Launch(4096, 8, parts=-(-N // 4096))


@functools.lru_cache(4096)
def backward(
    M: int, N: int, itemsize: int, dy_itemsize: int, dw_itemsize: int, with_ds: bool, aligned: bool, gpu: Gpu,
    dys: int = 1, ds_apart: bool = False, heads: int = 1,
) -> Launch:  # fmt: skip
    """The launch of the backward pass: a program processes many tiles and accumulates its share of dw over them.

    itemsize, dy_itemsize, dw_itemsize: bytes of one number of x and ds, of dy, and of dw (0 if dw is not needed).
    dys: how many gradients the kernel adds to get dy. ds_apart: whether adding ds replaces a separate addition after
    the backward pass; dw must then have the bits that it has without ds. heads: as in `Launch`.
    """
    more = (with_ds and not (ds_apart and dw_itemsize > 0)) or dy_itemsize > itemsize
    if backward_is_wide(N, itemsize):
        if heads > 1:
            return _looping(heads)
        overlap, apart, longest = gpu.capability >= 9, _apart(N, itemsize), LONGEST_SUM.get(dw_itemsize, M)
        # The rows, and with more than 32 columns a thread also the weight, of at most 4 bytes a number.
        bytes_a_column = STAGES * (itemsize + dy_itemsize) + (4 if itemsize == 2 else 0)
        staged, shared = _BACKWARD_STAGED[itemsize], _BACKWARD_SHARED[itemsize]
        config = _shared(N, staged, shared, bytes_a_column, aligned, gpu)
        if config.parts == 0:
            return config
        # All programs run at once, so that none waits for one that has not started. Rows that are not whole words need
        # narrow loads at their ends, which take more registers, so only one program fits on a multiprocessor.
        like = _narrowest(staged, N)
        at_once = MULTIPROCESSORS * (_at_once(like, more) if apart == 1 else 1) // like.parts(N)
        if at_once < apart:  # one program of each lead does not fit
            apart = 1
        programs = _programs(M, max(1, at_once), longest, apart)
        return replace(
            config, stages=STAGES if config.staged else 1, programs=programs, apart=apart, overlap=overlap
        )  # fmt: skip
    return _backward_of_whole_rows(M, N, itemsize, dy_itemsize, dw_itemsize, with_ds, gpu, dys, more, heads=heads)


def _backward_of_whole_rows(
    M: int, N: int, itemsize: int, dy_itemsize: int, dw_itemsize: int, with_ds: bool, gpu: Gpu, dys: int, more: bool,
    parts: int = 1, heads: int = 1,
) -> Launch:  # fmt: skip
    """As `backward`, for rows that one program holds, or one of their `parts` of N columns. more: see `_at_once`."""
    overlap = gpu.capability >= 9
    longest = LONGEST_SUM.get(dw_itemsize, M)
    body, apart = (_body(N, itemsize), _apart(N, itemsize)) if heads == 1 else (N, heads)
    tile = _backward_tile(N, itemsize)
    narrow_loads = (apart == 1 or heads > 1) and not _is_whole_words(N, itemsize)
    rows, block_n, warps = tile.rows, tile.block_n, tile.warps
    most, programs = (more and tile.stages_more) or tile.stages, _at_once(tile, more)
    pieces = -(-body // block_n)
    tiles = _tiles(M, rows, apart)
    if dw_itemsize == 0 and (tile.alone or narrow_loads):
        return Launch(block_n, warps, rows, pieces, parts, programs=tiles, apart=apart, heads=heads)
    stages = 1  # narrow loads cannot be prefetched into shared memory
    if not narrow_loads:
        loaded = dys * dy_itemsize + itemsize * (2 if with_ds else 1)
        tile_bytes = rows * (pieces + (apart > 1 and heads == 1)) * block_n * loaded
        stages = _stages(tile_bytes, gpu.shared_memory // programs, most)
        if stages == 1:  # prefetching is worth more than several programs at once
            stages = _stages(tile_bytes, gpu.shared_memory, most)
    programs = _programs(tiles, max(1, MULTIPROCESSORS * programs // parts), longest, apart)
    return Launch(
        block_n, warps, rows, pieces, parts, stages, programs, apart, heads=heads, overlap=overlap
    )  # fmt: skip


# The columns that a program takes of parts of rows that are too wide for one program. Not measured alone.
WIDTH_OF_WIDE = 4096


@functools.lru_cache(4096)
def parts_forward(N: int, itemsize: int, with_dy: bool = False) -> Launch:
    """The launch of the kernels that begin and finish a forward pass of parts of rows of N columns.

    with_dy: the launch of the kernel that begins a backward pass. It reads two tensors and so takes the tiles for fp32,
    also if a thread then loads 8 bytes at a time; with those for 16 bits, 1280 and 10,240 columns spill.
    """
    of_tile, widest = (4, BACKWARD_WIDEST[4]) if with_dy else (itemsize, FORWARD_WIDEST)
    if widest < N:
        width = WIDTH_OF_WIDE // 2 if with_dy else WIDTH_OF_WIDE
        tile = _forward_tile(width, of_tile)
        return Launch(tile.block_n, tile.warps, tile.rows, width // tile.block_n, -(-N // width))
    tile = _forward_tile(N, of_tile)
    return Launch(
        tile.block_n, tile.warps, tile.rows, -(-_body(N, itemsize) // tile.block_n), apart=_apart(N, itemsize)
    )  # fmt: skip


@functools.lru_cache(4096)
def parts_backward(
    M: int, N: int, itemsize: int, dy_itemsize: int, dw_itemsize: int, with_ds: bool, gpu: Gpu
) -> Launch:  # fmt: skip
    """The launch of the kernel that finishes a backward pass of parts of rows of N columns."""
    more = with_ds or dy_itemsize > itemsize
    width, parts = (WIDTH_OF_WIDE, -(-N // WIDTH_OF_WIDE)) if backward_is_wide(N, itemsize) else (N, 1)
    config = _backward_of_whole_rows(M, width, itemsize, dy_itemsize, dw_itemsize, with_ds, gpu, 1, more, parts)
    return config if parts == 1 or _is_whole_words(N, itemsize) else replace(config, stages=1)


@functools.lru_cache(4096)
def gated_forward(N: int, itemsize: int, gpu: Gpu) -> Launch:
    """The launch of the forward pass of a gated norm. itemsize: the larger of those of x and the gate."""
    overlap = gpu.capability >= 9
    if N > GATED_FORWARD_WIDEST:
        return Launch(GATED_PIECE, 16, parts=0, overlap=overlap)
    if N <= 256:
        block_n, rows = _narrow(N, GATED_NARROW[itemsize])
        return Launch(block_n, 1, rows, overlap=overlap)
    tile = _narrowest(_GATED_FORWARD[itemsize], N)
    return Launch(tile.block_n, tile.warps, tile.rows, pieces=-(-N // tile.block_n), overlap=overlap)


def tabulate(elements: int, gate_itemsize: int, gpu: Gpu) -> Launch | None:
    """The launch of the kernel that tabulates the functions of all gates; None if the others compute them faster."""
    if gate_itemsize != 2 or elements < TABLE_LEAST:
        return None
    return Launch(TABLE_PIECE, 4, overlap=gpu.capability >= 9)


@functools.lru_cache(4096)
def gated_backward(
    M: int, N: int, groups: int, first: bool, itemsize: int, loaded: int, dw_itemsize: int, gpu: Gpu
) -> Launch:
    """The launch of the backward pass of a gated norm: as `backward`, but each program takes rows of one group only.

    M: rows of each group. N: columns of a group. first: whether the gate comes first. itemsize: the larger of those of
    x and the gate. loaded: bytes of one number of dy, x and the gate together. dw_itemsize: 0 if dw is not needed.
    """
    overlap = gpu.capability >= 9
    if _exceeds(N, itemsize, GATED_BACKWARD_WIDEST, _GATED_UNALIGNED_WIDEST[itemsize]):
        return Launch(GATED_PIECE, 16, parts=0, overlap=overlap)
    if N <= 256:
        tile = _narrow_tile((_GATE_FIRST_NARROW_BACKWARD if first else _GATE_LAST_NARROW_BACKWARD)[itemsize], N)
    else:
        tile = _narrowest((_GATE_FIRST_BACKWARD if first else _GATE_LAST_BACKWARD)[itemsize], N)
    pieces = -(-N // tile.block_n)
    tile_bytes = tile.rows * pieces * tile.block_n * loaded
    stages = _stages(tile_bytes, gpu.shared_memory // tile.programs, tile.stages) if N % WORD[2] == 0 else 1
    most = max(1, MULTIPROCESSORS * tile.programs // groups)
    programs = _programs(_tiles(M, tile.rows), most, LONGEST_SUM.get(dw_itemsize, max(1, M)))
    return Launch(tile.block_n, tile.warps, tile.rows, pieces, stages=stages, programs=programs, overlap=overlap)


@functools.lru_cache(4096)
def gated_dw_alone(M: int, N: int, groups: int, loaded: int, dw_itemsize: int, gpu: Gpu) -> Launch:
    """As `dw_alone`, for M rows of each group of N columns."""
    config = dw_alone(M, N, loaded, dw_itemsize, gpu)
    most = max(1, 4 * MULTIPROCESSORS // (groups * -(-N // config.block_n)))
    return replace(config, programs=_programs(_tiles(M, config.rows), most, LONGEST_SUM[dw_itemsize]))


@functools.lru_cache(4096)
def dw_alone(M: int, N: int, loaded: int, dw_itemsize: int, gpu: Gpu, heads: int = 1) -> Launch:
    """The launch of `dw_alone`: a program processes block_n columns of some of the rows, for any N."""
    block_n = min(power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    most = max(1, 4 * MULTIPROCESSORS // -(-N // block_n))
    programs = _programs(_tiles(M, rows, heads), most, LONGEST_SUM[dw_itemsize], heads)
    stages = _stages(rows * block_n * loaded, gpu.shared_memory // 4, 3) if N % WORD[2] == 0 else 1
    overlap = gpu.capability >= 9
    return Launch(block_n, 4, rows, stages=stages, programs=programs, apart=heads, heads=heads, overlap=overlap)


@functools.lru_cache(4096)
def sum_partials(programs: int, N: int, gpu: Gpu) -> Launch:
    """The launch of `sum_partials`: one program adds all shares of its columns.

    The more shares there are, the fewer columns a program takes, so that enough programs read them.
    """
    # 1024 numbers and 4 warps instead of 4096 and 8: 512 shares 0.3 us less of 3, 256 shares 0.7 us less, 66 to 175
    # shares 2 to 3 us less. For few wide shares, 4096 and 8 instead: 262,144 columns 414 to 377 us.
    rows = min(max(power_of_two(max(1, programs)) // 4, 8), 128)
    size, warps = (4096, 8) if rows == 8 else (1024, 4)
    return Launch(min(power_of_two(N), size // rows), warps, rows, overlap=gpu.capability >= 9)


def _looping(heads: int) -> Launch:
    """The launch for wide rows if each head has its own weight: one program loops over each row. Not measured."""
    return Launch(PIECE, 16, parts=0, apart=heads, heads=heads)


def no_shares_yet(gpu: Gpu) -> Launch:
    """The launch of the kernel that initializes the memory in which programs exchange their sums."""
    return Launch(1024, 4, overlap=gpu.capability >= 9)


def power_of_two(N: int) -> int:
    """The smallest power of two that is at least N."""
    return 1 << (N - 1).bit_length()


def _shared(
    N: int,
    staged: dict[int, Shared],
    tiles: dict[int, Shared],
    bytes_a_column: int,
    aligned: bool,
    gpu: Gpu,
) -> Launch:
    """The launch for rows that programs share: the first tile that is wide enough and fits the GPU.

    Prefers rows in shared memory. If no tile fits, one program loops over each row.
    """
    for widest, tile in staged.items() if aligned else ():
        parts = tile.parts(N)
        fits = tile.pieces * tile.block_n * bytes_a_column + 1024 <= gpu.shared_memory
        if widest >= N and fits and ROOM * parts <= gpu.multiprocessors:
            return Launch(tile.block_n, tile.warps, 1, tile.pieces, parts, staged=True)
    for widest, tile in tiles.items():
        parts = tile.parts(N)
        if widest >= N and ROOM * parts <= gpu.multiprocessors:
            # Rows that are not whole words take more registers, and more threads cost them nothing.
            warps = tile.warps if N % WORD[2] == 0 else 2 * tile.warps
            if warps <= 8:
                return Launch(tile.block_n, warps, 1, tile.pieces, parts)
    return Launch(PIECE, 16, parts=0)


def _forward_tile(N: int, itemsize: int, with_residual: bool = False) -> WholeRows:
    """The tile of the forward pass for whole rows of N columns.

    With a residual, 16-bit rows of 65 to 103 columns use the tiles for fp32, which are faster: 1.04 instead of 1.12 of
    a copy's time at 72 columns, 1.36 instead of 1.96 at 97.
    """
    body = _body(N, itemsize)
    of_pieces = 4 if with_residual and body <= 96 else itemsize
    if _apart(N, itemsize) > 1:
        return _narrowest(_FORWARD_SHIFTED[of_pieces], body)
    if N > 256:
        return _narrowest(_FORWARD[itemsize], N)
    if _takes_pieces(N):
        return _narrowest(_FORWARD_PIECES[of_pieces], N)
    block_n, rows = _narrow(N, 4096 // itemsize)
    # 4096 bytes for two warps instead of 2048 numbers for four: 128 columns 1.07 to 1.02 of a copy's time, fp32
    # 1.04 to 1.01.
    narrow_loads = itemsize == 2 and not _is_whole_words(N, itemsize)  # which take more registers
    return WholeRows(rows, block_n, max(1, rows * block_n * itemsize // (1024 if narrow_loads else 2048)))


def _backward_tile(N: int, itemsize: int) -> Tile:
    """The tile of the backward pass for whole rows of N columns."""
    if _apart(N, itemsize) > 1:
        return _narrowest(_BACKWARD_SHIFTED[itemsize], _body(N, itemsize))
    if N > 256:
        return _narrowest(_BACKWARD[itemsize], N)
    if _takes_pieces(N):
        return _narrowest(_BACKWARD_PIECES[itemsize], N)
    return _narrow_tile(_BACKWARD_NARROW[itemsize], N, alone=itemsize == 4 or N > 128)


def _narrow_tile(tiles: dict[int, NarrowRows], N: int, alone: bool = False) -> Tile:
    """The tile of the backward pass for one warp that takes several rows of N columns."""
    narrow = _narrowest(tiles, N)
    block_n, rows = _narrow(N, narrow.elements)
    return Tile(
        rows, block_n, 1, narrow.programs, narrow.stages, narrow.programs_more, alone, narrow.stages_more
    )  # fmt: skip


def _takes_pieces(N: int) -> bool:
    """Whether a tile of one piece would have many idle columns, for rows of at most 256 columns."""
    return N > 64 and power_of_two(N) > N


def _narrow(N: int, size: int) -> tuple[int, int]:
    """The columns and rows of a tile of `size` elements that holds several rows."""
    block_n = power_of_two(N)
    return block_n, min(size // block_n, MOST_ROWS)


def _narrowest(tiles: dict[int, AnyTile], N: int) -> AnyTile:
    """The first tile for rows of at least N columns."""
    return next(tile for widest, tile in tiles.items() if widest >= N)


def _at_once(tile: Tile | Shared, more: bool) -> int:
    """How many programs run on a multiprocessor at once. more: whether they take more registers (see `Tile`)."""
    return (more and tile.programs_more) or tile.programs


def _stages(tile_bytes: int, available: int, most: int) -> int:
    """How many tiles a program holds at once: one in registers, the others being loaded into shared memory."""
    return min(most, 1 + max(0, available - 1024) // tile_bytes)


def _programs(tiles: int, most: int, longest: int, apart: int = 1) -> int:
    """How many programs process the tiles: at most `most`, and no more than finish together.

    If a program's sums would be over more than `longest` tiles, a multiple of `most` is allowed. If the rows of a tile
    are `apart` rows apart, all tiles of a program have the same remainder modulo `apart`.
    """
    if tiles == 0:
        return 0
    most = max(1, most // apart) * apart
    turns = -(-tiles // (most * longest))
    a_program = -(-tiles // (most * turns))
    programs = -(-tiles // a_program)
    return programs if a_program == 1 else -(-programs // apart) * apart


def _tiles(M: int, rows: int, apart: int = 1) -> int:
    return M if rows == 1 else -(-M // (rows * apart)) * apart


def _is_whole_words(N: int, itemsize: int) -> bool:
    """Whether rows of N numbers, one after the other, all begin and end at multiples of 16 bytes."""
    return N % WORD[itemsize] == 0


def _apart(N: int, itemsize: int) -> int:
    """`Launch.apart`, for rows that may begin anywhere within a word if they are contiguous."""
    return 1 if N < SHIFTED_FROM or _is_whole_words(N, itemsize) else APART


def _body(N: int, itemsize: int) -> int:
    """How many columns the pieces of a tile hold: at most those in whole words, if rows begin anywhere within one."""
    return N if _apart(N, itemsize) == 1 else N // WORD[itemsize] * WORD[itemsize]
