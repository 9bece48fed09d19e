"""How the GPU kernels are launched: pure data from shapes and sizes, with nothing to import and nothing measured.

No bit of y or dx depends on it, since every sum over a row is in fp64. The chunks of rows that dw is summed over
come from M and N alone, never from the machine, so dw is the same on every GPU.

Where a threshold comes from a measurement, it is the best of those tried on an H200 (benchmarks/LOG.md).
"""

import functools
from dataclasses import dataclass

# Columns of a row that one program holds in registers: without spills to here (ptxas, sm_80 to sm_100).
FORWARD_WIDEST, BACKWARD_WIDEST = 16384, 16384
# Programs that share a wider row. All of them must run at once: 16 do on any GPU, also beside many other kernels.
MOST_PARTS = 16
# A row that is wider still is walked over in pieces of this many columns, 16 elements a thread.
PIECE = 8192
# Elements a program holds at once if the rows are narrow. With more rows, what is done once a row (an fp64 division,
# an address in 64 bits) fills the registers: 256 rows of 4 columns spill.
TILE, MOST_ROWS = 2048, 64
# Programs of the kernels that sum dw: two for each of the 132 multiprocessors of an H200, and the same elsewhere.
PROGRAMS = 264
# Numbers that one fp32 sum of dw adds up: its error grows with the root of them. The sums themselves add up in fp64.
LONGEST_SUM = 64
# Columns of the kernel that computes dw alone.
COLUMNS = 1024


@dataclass(frozen=True)
class Launch:
    """A program works on tiles of `rows` rows of `pieces` x `block_n` columns, over `chunk` consecutive rows.

    parts: programs that share a row; 0 means that one program walks over a row in pieces of block_n.
    """

    block_n: int
    warps: int
    rows: int = 1
    pieces: int = 1
    parts: int = 1
    stages: int = 1
    chunk: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """By the names that the kernels have for them."""
        return {"ROWS": self.rows, "PIECES": self.pieces, "BLOCK_N": self.block_n, "STAGES": self.stages}


@functools.lru_cache(4096)
def forward(N: int, itemsize: int) -> Launch:
    """Whole rows of up to four pieces, 16 bytes a thread and piece; wider ones shared between programs."""
    if N > FORWARD_WIDEST:
        for block_n, pieces, bytes_a_thread in ((1024, 4, 16), (2048, 4, 32), (2048, 8, 16)):
            parts = -(-N // (block_n * pieces))
            if parts <= MOST_PARTS:
                warps = _warps(block_n * itemsize, bytes_a_thread if itemsize == 2 else 16 * itemsize)
                return Launch(block_n, warps, pieces=pieces, parts=parts)
        return Launch(PIECE, 16, parts=0)
    if N <= 256:
        block_n, rows = _narrow(N)
        return Launch(block_n, _warps(rows * block_n, 16), rows)
    block_n = max(256, power_of_two(-(-N // 4)))
    rows = 4 if N <= 512 else 1
    return Launch(block_n, _warps(rows * block_n * itemsize, 32 if rows > 1 else 16), rows, pieces=-(-N // block_n))


@functools.lru_cache(4096)
def backward(M: int, N: int, itemsize: int, loaded: int, w_itemsize: int, with_dw: bool, shared: int) -> Launch:
    """As `forward`; with dw a program holds its share of dw over a chunk of many tiles.

    itemsize: bytes of one number of x; loaded: of one of each tensor of rows that is read; w_itemsize: of a weight.
    shared: bytes of shared memory that a program may have, where the loads of the next tiles arrive.
    """
    widest = BACKWARD_WIDEST // 2 if loaded > 8 else BACKWARD_WIDEST
    if widest < N:
        return Launch(PIECE, 16, parts=0)
    if N <= 512:
        block_n, rows = _narrow(N)
    else:
        block_n, rows = (512 if N <= 1536 else 1024 if N <= 7168 else 2048), (2 if N <= 2048 and N % 16 == 0 else 1)
    pieces = -(-N // block_n)
    warps = _warps(rows * block_n, 16) if N <= 512 else _warps(block_n * itemsize, 16)
    if not with_dw:
        return Launch(block_n, warps, rows, pieces, chunk=rows)
    programs = PROGRAMS if N <= 8192 else PROGRAMS // 2
    stages = 1  # what is not aligned cannot be loaded ahead into shared memory, only into registers that are not there
    if N % 16 == 0:
        # The weight is loaded ahead with each tile, and is held twice besides.
        w_bytes = pieces * block_n * w_itemsize
        tile_bytes = rows * pieces * block_n * loaded + w_bytes
        most = 4 if N <= 1536 else 3
        stages = _stages(tile_bytes, shared * PROGRAMS // programs // 2 - 2 * w_bytes, most)
        if stages == 1:  # rather one program at a time than no loads ahead
            stages = _stages(tile_bytes, shared - 2 * w_bytes, most)
    return Launch(block_n, warps, rows, pieces, stages=stages, chunk=_chunk(M, programs, rows))


@functools.lru_cache(4096)
def dw_alone(M: int, N: int, loaded: int, shared: int) -> Launch:
    """A program walks over a chunk of rows, block_n columns of it: any N, nothing is summed along the row."""
    block_n = min(power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    programs = max(1, 2 * PROGRAMS // -(-N // block_n))
    stages = _stages(rows * block_n * loaded, shared // 4, 3) if N % 16 == 0 else 1
    return Launch(block_n, 4, rows, stages=stages, chunk=_chunk(M, programs, rows))


@functools.lru_cache(4096)
def sum_partials(N: int) -> Launch:
    """Narrow columns, so that many programs share the reading; all chunks are one program's."""
    return Launch(min(power_of_two(N), 8), 4, rows=256)


def power_of_two(N: int) -> int:
    """The smallest that is not below N."""
    return 1 << (N - 1).bit_length()


def _narrow(N: int) -> tuple[int, int]:
    """Columns and rows of a tile of several rows."""
    block_n = power_of_two(N)
    return block_n, min(TILE // block_n, MOST_ROWS)


def _warps(size: int, a_thread: int) -> int:
    return min(max(1, size // (32 * a_thread)), 16)


def _stages(tile_bytes: int, shared: int, most: int) -> int:
    """How many tiles are under way at once: one in registers, the others in shared memory."""
    return min(most, 1 + max(0, shared - 1024) // tile_bytes)


def _chunk(M: int, programs: int, rows: int) -> int:
    """Rows a program walks over: whole tiles, so that no tile reaches into the next chunk.

    Where sums would become too long there are twice, thrice, … as many programs, so that all finish together.
    """
    tiles = -(-M // rows)
    turns = -(-tiles // (programs * LONGEST_SUM))
    return max(1, -(-tiles // (programs * turns))) * rows if M else rows
