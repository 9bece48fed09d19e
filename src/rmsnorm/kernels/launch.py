"""How the GPU kernels are launched: pure data from shapes and strides, with nothing to import and nothing measured.

No bit of y or dx depends on it, since every sum over a row is in fp64. The chunks of rows that dw is summed over
come from M and N alone, never from the machine, so dw is the same on every GPU.
"""

from dataclasses import dataclass

# Above this many columns a row no longer fits the registers of one program without spills (ptxas, sm_80 to sm_100).
FORWARD_BLOCK, BACKWARD_BLOCK = 16384, 8192
# A wider row is walked over in pieces of this many columns, 16 elements a thread.
PIECE = 8192
# Elements a program holds at once if the rows are narrow. With more rows, what is done once a row (an fp64 division,
# an address in 64 bits) fills the registers: 256 rows of 4 columns spill.
TILE, MOST_ROWS = 2048, 64
# Programs of the kernels that sum dw: two for each of the 132 multiprocessors of an H200, and the same elsewhere.
PROGRAMS = 264
# Columns of the kernel that computes dw alone.
COLUMNS = 1024
# Bytes of a row tile up to which the loads of three iterations may be in flight within 99 KiB of shared memory.
PIPELINED_BYTES = 8192


@dataclass(frozen=True)
class Launch:
    """A program works on tiles of `rows` x `block_n` elements, over `chunk` consecutive rows."""

    rows: int
    block_n: int
    warps: int
    stages: int
    chunk: int


def forward(N: int) -> Launch:
    """One tile a program; block_n < N means that the row is walked over in pieces."""
    block_n, rows = _tile(N, FORWARD_BLOCK)
    return Launch(rows, block_n, _warps(rows * block_n, 16), stages=1, chunk=rows)


def backward(M: int, N: int, itemsize: int, with_dw: bool) -> Launch:
    """As `forward`; with dw, and unless block_n < N, a program holds its share of dw over a chunk of many tiles.

    Of several rows at once a thread holds half as many elements as in the forward: with 16 it spills, and with tiles
    of 8 rows even so.
    """
    block_n, rows = _tile(N, BACKWARD_BLOCK)
    rows = 4 if rows == 8 else rows
    warps = _warps(rows * block_n, 8 if rows > 1 else 16)
    if not with_dw or block_n < N:
        return Launch(rows, block_n, warps, stages=1, chunk=rows)
    return Launch(rows, block_n, warps, _stages(rows * block_n * itemsize), _chunk(M, PROGRAMS, rows))


def dw_alone(M: int, N: int, itemsize: int) -> Launch:
    """A program walks over a chunk of rows, block_n columns of it: any N, nothing is summed along the row."""
    block_n = min(_power_of_two(N), COLUMNS)
    rows = min(TILE // block_n, MOST_ROWS)
    programs = max(1, 2 * PROGRAMS // -(-N // block_n))
    return Launch(rows, block_n, 4, _stages(rows * block_n * itemsize), _chunk(M, programs, rows))


def sum_partials(N: int) -> Launch:
    """Narrow columns, so that many programs share the reading; all chunks are one program's."""
    return Launch(rows=32, block_n=min(_power_of_two(N), 32), warps=4, stages=1, chunk=0)


def _tile(N: int, widest: int) -> tuple[int, int]:
    """Columns and rows."""
    block_n = _power_of_two(N)
    return (PIECE, 1) if block_n > widest else (block_n, min(max(1, TILE // block_n), MOST_ROWS))


def _warps(elements: int, per_thread: int) -> int:
    return min(max(1, elements // (32 * per_thread)), 16)


def _stages(tile_bytes: int) -> int:
    return 3 if tile_bytes <= PIPELINED_BYTES else 1


def _chunk(M: int, programs: int, rows: int) -> int:
    """Rows a program walks over: whole tiles, so that no tile reaches into the next chunk."""
    return max(1, -(-M // (programs * rows))) * rows


def _power_of_two(N: int) -> int:
    return 1 << (N - 1).bit_length()
