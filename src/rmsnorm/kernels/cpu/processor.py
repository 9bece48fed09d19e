"""What the processor that Numba compiles for cannot do."""

import functools
import re

import llvmlite.binding
from llvmlite import ir

from rmsnorm import compat


def refusal(*needed: str) -> str | None:
    """Why the reference must compute what needs instructions for "fp16" or "fma"; None if the processor has them."""
    missing = [name for name in needed if name in _missing_instructions()]
    if not missing:
        return None
    what = " or ".join(missing)
    return f"the processor that Numba compiles for has no instructions for {what}: computed by plain torch"


@functools.cache
def _missing_instructions() -> tuple[str, ...]:
    """Which of "fp16" (its conversion to and from fp32) and "fma" (in fp64) the processor has no instructions for.

    In place of one, LLVM calls a library function, which is slow and may be missing.
    """
    half, single, double = ir.HalfType(), ir.FloatType(), ir.DoubleType()
    triple, cpu, features = compat.numba_processor()
    module = ir.Module()
    module.triple = triple

    def function(name: str, result: ir.Type, *operands: ir.Type) -> None:
        pointers = [operand.as_pointer() for operand in (result, *operands)]
        made = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), f"try_{name}")
        builder = ir.IRBuilder(made.append_basic_block())
        values = [builder.load(pointer) for pointer in made.args[1:]]
        value = builder.fma(*values) if name == "fma" else getattr(builder, name)(*values, result)
        builder.store(value, made.args[0])
        builder.ret_void()

    function("fpext", single, half)
    function("fptrunc", half, single)
    function("fma", double, double, double, double)
    machine = llvmlite.binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
    calls = {"fp16": r"__\w*(hf|f2h|h2f)", "fma": r"(?<!\w)_?fma\b"}
    return tuple(name for name, call in calls.items() if re.search(call, assembly))
