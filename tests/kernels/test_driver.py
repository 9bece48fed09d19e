"""Launches through the CUDA driver, tested without a GPU: real compiled kernels, and a fake driver that records calls."""

import copy
import ctypes
import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel to launch")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from planned import planning  # noqa: E402
from rmsnorm import functional  # noqa: E402
from rmsnorm.kernels.gpu import driver, kernels  # noqa: E402
from rmsnorm.kernels.host import loader as host  # noqa: E402

POINTER = ctypes.sizeof(ctypes.c_void_p)


class Driver:
    """A fake driver that records launches of a kernel whose parameters have these sizes in bytes."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.launched, self.status, self.takes_seconds = sizes, [], 0, 0.0

    def cuLaunchKernelEx(self, by_reference: Any, function: Any, parameters: Any, extra: Any) -> int:
        time.sleep(self.takes_seconds)  # other threads run meanwhile
        configuration = by_reference._obj
        assert extra is None
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
        grid, block = tuple(configuration.grid), tuple(configuration.block)
        early = [
            (configuration.attributes[i].id, configuration.attributes[i].value)
            for i in range(configuration.attribute_count)
        ]
        self.launched.append(
            (grid, block, configuration.shared_memory, configuration.stream, early, function.value, values)
        )
        return int(self.status)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(SIZES)
    monkeypatch.setattr(driver, "_library", lambda: made)
    return made


class Compiled:
    """A compiled kernel as Triton returns it, without a GPU to load it on."""

    def __init__(self, arguments: tuple[Any, ...], signature: dict[str, Any], constants: dict[Any, Any]) -> None:
        source = ASTSource(kernels.sum_partials, signature, constants)
        self.compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False}
        )
        self.src, self.metadata, self.function = source, self.compiled.metadata, 4711
        self.asm = {"ptx": self.compiled.asm["ptx"]}


ARGUMENTS = (torch.empty(3, 48), torch.empty(48), 3, 48, 1, 4, 16, True)
SIZES = [POINTER, POINTER, 4, 4, POINTER, POINTER]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    kinds = ("*fp32", "*fp32", "i32", "i32", *["constexpr"] * 4)
    signature = dict(zip(kernels.sum_partials.arg_names, kinds, strict=True))
    return Compiled(ARGUMENTS, signature, {(4,): 1, (5,): 4, (6,): 16, (7,): True})


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def test_a_launch_passes_the_grid_stream_and_arguments_to_the_driver(cuda: Driver, compiled: Compiled) -> None:
    assert driver._taken(compiled.asm["ptx"]) == SIZES  # with Triton's two kinds of scratch memory
    ready = driver.ready(compiled, (5,), ARGUMENTS, early=True)
    assert ready is not None
    assert ready(77, [4096, 8192])
    assert ready(78, [16, 32])
    ends = [number(3, 4), number(48, 4), number(0, POINTER), number(0, POINTER)]
    shared = compiled.metadata.shared
    assert cuda.launched == [
        ((5, 1, 1), (256, 1, 1), shared, 77, [(6, 1)], 4711, [number(4096, 8), number(8192, 8), *ends]),
        ((5, 1, 1), (256, 1, 1), shared, 78, [(6, 1)], 4711, [number(16, 8), number(32, 8), *ends]),
    ]
    late = driver.ready(compiled, (5, 2), ARGUMENTS, early=False)
    assert late is not None
    assert late(1, [1, 2])
    assert cuda.launched[2][0] == (5, 2, 1)
    assert cuda.launched[2][4] == []


def test_cpp_launches_a_kernel_as_python_does(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    """C++ and Python pass the same arguments to cuLaunchKernelEx, except the stream and the addresses of tensors."""
    functional.wait_for_host()
    if host.described() != "called from C++":
        pytest.skip(host.described())
    seen: list[tuple[Any, ...]] = []

    def launch(configuration: int, function: int, arguments: Any, extra: int | None) -> int:
        held = driver._Configuration.from_address(configuration)
        values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(SIZES)]
        early = [(held.attributes[i].id, held.attributes[i].value) for i in range(held.attribute_count)]
        seen.append(
            (tuple(held.grid), tuple(held.block), held.shared_memory, held.stream, early, function, extra, values)
        )
        return 0

    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
    )
    library = SimpleNamespace(cuLaunchKernelEx=kind(launch))
    monkeypatch.setattr(driver, "_library", lambda: library)
    for early in (False, True):
        ready = driver.ready(compiled, (5, 2), ARGUMENTS, early)
        assert ready is not None
        assert ready(0, [4096, 8192])
        x, w = torch.randn(4, 32), torch.randn(32)
        planning(monkeypatch, ready.native(["x", "y"]), keeps=ready)
        made = host.norm(x, None, w, 1e-6, "early", 0.0)
        python, cpp = seen[-2:]
        assert cpp[:7] == python[:7]
        assert cpp[7][2:] == python[7][2:]
        assert cpp[7][:2] == [number(x.data_ptr(), 8), number(made.data_ptr(), 8)]


def test_arguments_are_flattened_and_constants_left_out() -> None:
    kinds = ("*bf16", "constexpr", "i64", "fp32", ("i32", "constexpr", ("i32",)))
    values = (None, None, 1 << 40, 0.5, (7, 1, (9,)))
    assert list(driver._flat(kinds, values)) == [
        ("*bf16", None), ("i64", 1 << 40), ("fp32", 0.5), ("i32", 7), ("i32", 9)
    ]  # fmt: skip


LAST = ",\n\t.param .u64 .ptr .global .align 1 sum_partials_param_5"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LAST, ""),
        (LAST, f"{LAST}, .param .u64 sum_partials_param_6"),
        (".param .u32 sum_partials_param_2", ".param .u64 sum_partials_param_2"),
        (".entry", ".func"),
    ],
    ids=["one less", "one more", "a wider one", "no kernel"],
)
def test_a_kernel_with_unexpected_parameters_is_left_to_triton(
    old: str, new: str, cuda: Driver, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptx = compiled.asm["ptx"]
    assert ptx.count(old) == 1
    monkeypatch.setitem(compiled.asm, "ptx", ptx.replace(old, new))
    assert driver.ready(compiled, (5,), ARGUMENTS, early=False) is None


def test_a_launch_returns_false_if_the_driver_refuses(cuda: Driver, compiled: Compiled) -> None:
    cuda.status = 201  # no context on this thread
    ready = driver.ready(compiled, (5,), ARGUMENTS, early=False)
    assert ready is not None
    assert not ready(0, [16, 32])


def test_without_a_driver_the_launch_is_left_to_triton(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    monkeypatch.setattr(driver, "_library", lambda: None)
    assert driver.ready(compiled, (5,), ARGUMENTS, early=False) is None


def test_concurrent_launches_do_not_mix_up_addresses(cuda: Driver, compiled: Compiled) -> None:
    cuda.takes_seconds = 1e-4
    ready = driver.ready(compiled, (5,), ARGUMENTS, early=False)
    assert ready is not None
    launched: list[tuple[int, int, int]] = []

    def launches(thread: int) -> None:
        for i in range(50):
            addresses = [thread * 1000 + i, thread * 1000 + i]
            if ready(thread, addresses):
                launched.append((thread, *addresses))

    threads = [threading.Thread(target=launches, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [
        (stream, *(int.from_bytes(value, "little") for value in values[:2]))
        for *_, stream, _, _, values in cuda.launched
    ]
    assert sorted(seen) == sorted(launched)
    assert launched


def test_a_launch_during_a_launch_does_not_deadlock(
    cuda: Driver, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may launch the same kernel while a launch is in progress."""
    ready = driver.ready(compiled, (5,), ARGUMENTS, early=False)
    assert ready is not None
    within: list[bool] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: within.append(ready(2, [3, 4])))
    assert ready(1, [16, 32])
    assert within == [False]
    assert [(stream, values[0]) for *_, stream, _, _, values in cuda.launched] == [(1, number(16, 8))]


def test_a_kernel_stays_loaded_as_long_as_its_launch_exists(cuda: Driver, compiled: Compiled) -> None:
    """Triton unloads kernels that are not referenced; if two threads compile the same kernel, it keeps only one."""
    own = copy.copy(compiled)
    alive = weakref.ref(own)
    ready = driver.ready(own, (5,), ARGUMENTS, early=False)
    del own
    gc.collect()
    assert alive() is not None
    assert ready is not None


@pytest.mark.parametrize("missing", ["metadata", "asm", "src"])
def test_an_unknown_version_of_triton_launches_its_own_kernels(missing: str, cuda: Driver, compiled: Compiled) -> None:
    own = copy.copy(compiled)
    delattr(own, missing)
    assert driver.ready(own, (5,), ARGUMENTS, early=False) is None


def test_ctypes_structures_match_cuda_h() -> None:
    """In cuda.h, CUlaunchAttribute has 72 bytes with its value at offset 8, and CUlaunchConfig has 56 bytes."""
    attribute, configuration = driver._Attribute, driver._Configuration
    assert (ctypes.sizeof(attribute), attribute.id.offset, attribute.value.offset) == (72, 0, 8)
    assert ctypes.sizeof(configuration) == 56
    offsets = [getattr(configuration, name).offset for name, _ in configuration._fields_]
    assert offsets == [0, 12, 24, 32, 40, 48]
