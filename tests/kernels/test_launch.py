"""The choice of tiles and launch parameters for the GPU, which needs neither a GPU nor Triton."""

import ast
import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch

from rmsnorm.kernels.gpu import tiling
from rmsnorm.kernels.gpu.tiling import Launch
from rmsnorm.kernels.rows import Walk, walk

WIDTHS = [
    *range(1, 1025),
    *(2**k + d for k in range(10, 20) for d in (-1, 0, 1)),
    1280,
    5120,
    7168,
    9999,
    10240,
    1000003,
]
ROWS = (1, 2, 5, 64, 263, 264, 265, 1000, 8192, 65536, 2**31 + 11)


H200 = tiling.Gpu(227 << 10, 132, 9)


def every_launch() -> list[tuple[int | None, int, int, Launch]]:
    """(M, or None if it has no influence; N; bytes of a number of dw; the launch)."""
    found: list[tuple[int | None, int, int, Launch]] = []
    for N in WIDTHS:
        for size, adds, staged in itertools.product((2, 4), (False, True), (False, N % 16 == 0)):
            found.append((None, N, 0, tiling.forward(N, size, adds, staged, H200)))
        found += [(None, N, 0, tiling.sum_partials(programs, N, H200)) for programs in (1, 8, 100, 264, 5000)]
        for M, itemsize in itertools.product(ROWS, (2, 4)):
            for of_dw, with_ds, aligned in itertools.product((0, 2, 4), (False, True), {False, N % 16 == 0}):
                found.append((M, N, of_dw, tiling.backward(M, N, itemsize, itemsize, of_dw, with_ds, aligned, H200)))
            found += [(M, N, of_dw, tiling.dw_alone(M, N, 2 * itemsize, of_dw, H200)) for of_dw in (2, 4)]
    return found


def test_module_imports_nothing_but_the_standard_library() -> None:
    tree = ast.parse(Path(tiling.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert names == {"dataclasses", "functools", "typing"}


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiling.forward(1280, 2, False, True, H200).warps = 2  # type: ignore[misc]


def test_tiles_are_powers_of_two_that_a_kernel_can_hold() -> None:
    for _, N, _, config in every_launch():
        for size in (config.rows, config.block_n, config.warps):
            assert size >= 1, (N, config)
            assert size & (size - 1) == 0, (N, config)
        width = config.pieces * config.block_n
        assert width < 2 * max(N, 256), (N, config)  # at most half a tile is idle
        assert config.rows * width <= 128 * 32 * config.warps, (N, config)  # 128 elements a thread
        assert config.warps <= 16
        assert 1 <= config.pieces <= 16


def test_a_row_is_held_by_one_program_or_shared_or_looped_over() -> None:
    for N, itemsize in itertools.product(WIDTHS, (2, 4)):
        forward = tiling.forward(N, itemsize, False, N % 16 == 0, H200)
        backward = tiling.backward(8192, N, itemsize, itemsize, itemsize, False, N % 16 == 0, H200)
        words = N % tiling.WORD[itemsize] == 0
        whole = tiling.BACKWARD_WIDEST[itemsize] if words else tiling.UNALIGNED_WIDEST
        for config, widest in ((forward, tiling.FORWARD_WIDEST), (backward, whole)):
            width = config.pieces * config.block_n
            if widest >= N:
                assert config.parts == 1
                # Another piece holds the ends of rows that are not whole words.
                assert width >= (N if config.apart == 1 else N - N % tiling.WORD[itemsize])
                assert config.for_any_strides(N).pieces * config.block_n >= N
            else:
                assert config.parts == 0 or (config.parts - 1) * width < N <= config.parts * width
                assert config.rows * config.parts <= tiling.MOST_PARTS  # sum_of_shares: one lane reads each share


def test_every_program_has_tiles_and_its_sums_are_short() -> None:
    for M, N, of_dw, config in every_launch():
        if M is None or config.parts == 0:
            continue
        tiles = config.tiles(M)
        assert tiles * config.rows >= M
        assert 1 <= config.programs <= tiles, (M, N, config)
        if config.programs == tiles:
            continue
        most = -(-tiles // config.programs)
        longest = tiling.LONGEST_SUM.get(of_dw, M)  # without dw there are no sums
        assert most <= longest, (M, N, config)
        # Fewer programs would take longer; if rows are not whole words, APART divides their number.
        assert (config.programs - config.apart) * most < tiles, (M, N, config)
        assert config.programs % config.apart == 0, (M, N, config)
        assert config.programs <= max(20 * tiling.MULTIPROCESSORS, tiles // longest * 4), (M, N, config)


def test_without_rows_no_program_is_launched() -> None:
    for N, itemsize, of_dw in itertools.product((1, 1280, 16384, 262144), (2, 4), (0, 2, 4)):
        assert tiling.backward(0, N, itemsize, itemsize, of_dw, False, True, H200).programs == 0
        assert of_dw == 0 or tiling.dw_alone(0, N, 2 * itemsize, of_dw, H200).programs == 0


def test_the_number_of_programs_does_not_depend_on_the_gpu() -> None:
    widths = (1, 64, 72, 97, 640, 1001, 1280, 1536, 3072, 8192, 10240, 16384, 16401, 131072)
    sizes = ((2, 2), (2, 4), (4, 4))  # of a number of x, and of dy
    for M, N, (of_x, of_dy), of_dw, with_ds in itertools.product(ROWS, widths, sizes, (2, 4), (False, True)):
        programs = {
            tiling.backward(M, N, of_x, of_dy, of_dw, with_ds, aligned, tiling.Gpu(*gpu)).programs
            for aligned in {False, N % 16 == 0}
            for gpu in itertools.product((99 << 10, 227 << 10), (64, 132, 148), (8, 9, 10))
        }
        assert len(programs) == 1
        assert len({tiling.dw_alone(M, N, loaded, of_dw, H200).programs for loaded in (4, 6, 8)}) == 1


def test_kernels_that_take_more_registers_run_in_fewer_programs() -> None:
    """A dy wider than x counts like a gradient through s; rows that are not whole words, like a whole multiprocessor."""
    for N in (1536, 3072, 16384, 65536, 131072):
        plain, wide, with_ds = (
            tiling.backward(8192, N, 2, of_dy, 2, with_ds, True, H200).programs
            for of_dy, with_ds in ((2, False), (4, False), (2, True))
        )
        assert wide == with_ds < plain, N
    for N in (8201, 32777):
        config = tiling.backward(8192, N, 2, 2, 2, False, False, H200)
        assert tiling.MULTIPROCESSORS // 2 < config.programs * config.parts <= tiling.MULTIPROCESSORS, N


def test_dx_alone_is_launched_as_with_dw_or_each_tile_gets_its_own_program() -> None:
    """As with dw, tiles are prefetched where that is faster."""
    for itemsize, widths in ((2, (64, 128, 512, 2880, 4096, 7168, 9216)), (4, (2560, 3072, 7168, 8192))):
        for N in widths:
            alone, with_dw = (
                tiling.backward(8192, N, itemsize, itemsize, of_dw, False, True, H200) for of_dw in (0, 4)
            )
            assert (alone.rows, alone.stages, alone.overlap) == (with_dw.rows, with_dw.stages, with_dw.overlap), N
            assert (alone.stages > 1) == (N not in (64, 128)), N
            assert alone.programs <= with_dw.programs, N  # with dw, sums of limited length may need more programs
    for itemsize, widths in ((2, (33, 256, 768)), (4, (128, 512, 1536, 4096, 5120))):
        for N in widths:
            config = tiling.backward(8192, N, itemsize, itemsize, 0, False, N % 16 == 0, H200)
            assert (config.stages, config.programs) == (1, -(-8192 // config.rows)), N


def test_programs_that_share_rows_fit_on_the_gpu_together() -> None:
    for N, itemsize, multiprocessors in itertools.product(WIDTHS, (2, 4), (1, 8, 16, 46, 63, 64, 132)):
        gpu = tiling.Gpu(227 << 10, multiprocessors, 9)
        for config in (
            tiling.forward(N, itemsize, True, N % 16 == 0, gpu),
            tiling.backward(8192, N, itemsize, itemsize, itemsize, False, N % 16 == 0, gpu),
        ):
            assert config.parts <= 1 or config.parts * tiling.ROOM <= multiprocessors


def test_prefetched_tiles_fit_into_shared_memory() -> None:
    for N, shared in itertools.product(WIDTHS, (99 << 10, 227 << 10)):
        config = tiling.backward(8192, N, 2, 2, 2, False, N % 16 == 0, tiling.Gpu(shared))
        tile = config.rows * (config.pieces + (config.apart > 1)) * config.block_n * 4
        assert (config.stages - (0 if config.staged else 1)) * tile <= shared
        assert config.stages == 1 or config.apart > 1 or N % tiling.WORD[2] == 0


def test_thousands_of_widths_share_few_kernels() -> None:
    assert len({tiling.forward(N, 2, False, N % 16 == 0, H200) for N in range(1, 40000)}) <= 90
    kernels = {
        tuple(tiling.backward(8192, N, 2, 2, 2, False, N % 16 == 0, H200).constants.values()) for N in range(1, 20000)
    }
    assert len(kernels) <= 64


def start(walked: Walk, tensor: int, m: int) -> int:
    """Where row m begins according to Walk's docstring."""
    outer, middle, inner = walked.steps[tensor]
    if not walked.strided:
        return m * inner
    i, j, k = m // (walked.sizes[0] * walked.sizes[1]), m // walked.sizes[1] % walked.sizes[0], m % walked.sizes[1]
    return i * outer + j * middle + k * inner


def test_walk_computes_the_address_of_every_row() -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(400):
        sizes = [draw.choice((1, 2, 3, 5)) for _ in range(draw.randint(0, 4))]
        N = draw.choice((1, 4, 7))
        tensors = []
        for _ in range(draw.randint(1, 3)):
            order = draw.sample(range(len(sizes)), len(sizes))
            base = torch.arange(1 << 14)[: 3 * N * torch.Size(sizes).numel()]
            base = base.reshape(*(sizes[axis] for axis in order), 3 * N)[..., :N]
            tensor = base.permute(*(order.index(axis) for axis in range(len(sizes))), len(sizes))
            if sizes and draw.random() < 0.2:
                tensor = tensor[:1].expand(sizes[0], *tensor.shape[1:])
            tensors.append(tensor)
        walked = walk(tensors[0].shape, *[t.stride() for t in tensors])
        if walked is None:
            continue
        seen.add((walked.strided, len(tensors)))
        assert torch.Size(sizes).numel() == walked.M
        assert walked.N == N
        for index, tensor in enumerate(tensors):
            firsts = tensor[..., 0].reshape(-1).tolist()  # each element holds its own address
            assert [start(walked, index, m) for m in range(walked.M)] == firsts
    assert seen == set(itertools.product((False, True), (1, 2, 3)))


def test_walk_returns_none_if_a_copy_is_needed() -> None:
    x = torch.empty(4, 6, 8)
    assert walk(x.transpose(1, 2).shape, x.transpose(1, 2).stride()) is None
    assert walk(x.shape, x.stride(), x[..., :1].expand(4, 6, 8).stride()) is None
    many = torch.empty(3, 2, 3, 2, 8)[:, :, :, :, :4].permute(3, 2, 1, 0, 4)
    assert walk(many.shape, many.stride()) is None


def test_walk_accepts_any_strides_if_there_are_no_rows() -> None:
    many = torch.empty(2, 0, 2, 0, 2, 0, 2, 8)
    for x in (torch.empty(0, 8), torch.empty(0, 1).expand(0, 8), many, torch.empty(8, 0).t()):
        walked = walk(x.shape, x.stride(), (0,) * x.dim())  # the second tensor is an expanded scalar gradient
        assert walked is not None
        assert (walked.M, walked.N, walked.strided) == (0, 8, False)


def test_rows_with_a_single_stride_need_no_division() -> None:
    x = torch.empty(4, 6, 576)
    for view in (x, x[..., :512], x[:, :, 64:], x.view(2, 2, 6, 576), x[0], x[0, 0], x[1:2]):
        walked = walk(view.shape, view.stride())
        assert walked is not None
        assert not walked.strided
    assert walk(x[:, :5].shape, x[:, :5].stride()).strided  # type: ignore[union-attr]
