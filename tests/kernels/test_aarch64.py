"""The CPU kernels as machine code for 64-bit Arm processors, which is compiled and read here but not run."""

import re

import llvmlite.binding as llvm
import numba
import pytest
import torch
from numba import types

from rmsnorm.kernels.cpu.compiling import ELEMENT
from rmsnorm.kernels.cpu.kernels import backward, forward

TARGET = "aarch64-unknown-linux-gnu"
FUSED = re.compile(r"^\s+(fn?m(?:add|sub)|fml[as])\s+(.*)", re.MULTILINE)
# A call of the run-time library for fp16, or of a function for fma, in place of an instruction.
CALLS = re.compile(r"^\s+bl?\s+(__\w*(?:hf|f2h|h2f)\w*|fmaf?)$", re.MULTILINE)


def pointees(name: str, X: types.Type) -> tuple[types.Type, ...]:
    if name == "forward":
        return X, X, X, X, X, types.float32, types.float64, types.int64, types.float32
    return X, X, X, X, X, X, types.float32, X, types.float64, types.float64, types.int64, types.float32


def assembly(name: str, dtype: torch.dtype) -> str:
    """What LLVM makes of a kernel for an Arm processor."""
    made = forward(False, False) if name == "forward" else backward(1, False, False, False)
    pointers = [types.CPointer(pointee) for pointee in pointees(name, ELEMENT[dtype])]
    code = numba.cfunc(types.void(*pointers, types.int64, types.int64), error_model="numpy")(made)
    text = re.sub(r"target triple = .*", f'target triple = "{TARGET}"', code.inspect_llvm())
    text = re.sub(r"target datalayout = .*", "", text)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(TARGET).create_target_machine(cpu="neoverse-n1", opt=3)
    return machine.emit_assembly(llvm.parse_assembly(text))


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_on_arm_only_exact_squares_in_fp64_are_fused_with_additions(name: str, dtype: torch.dtype) -> None:
    text = assembly(name, dtype)
    fused = [operands for _, operands in FUSED.findall(text)]
    assert all(re.match(r"v\d+\.2d,|d\d+,", operands) for operands in fused), fused
    assert bool(fused) == (name == "forward")  # LLVM fuses wherever that is allowed: only for the squares
    assert not CALLS.findall(text)
