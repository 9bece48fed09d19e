"""PTX that multiplies by silu(gate) or the sigmoid, rounds to 16 bits, and rarely needs fp64.

A product of an fp32 number u and the factor, rounded to 16 bits, is known from an enclosure of the factor if both ends
lead to the same 16 bits, because rounding is monotone. So each element is first computed with approximations in fp32:

- ex2.approx and rcp.approx are off by at most 2^-22 and 2^-23 (PTX ISA), the rounding of g·log2(e) changes exp(-g) by
  up to 1.3·|g|·2^-24, and each of the other steps, the two that compute the ends included, is off by at most 2^-24. In
  all that is less than 2^-20 + |g|·2^-23, relative to the factor, if the factor is a normal number.
- If the ends differ in their 16 bits, or |g| is not in the range where this holds, fp64 decides: the operations of
  `gated_kernels.factor_of`, one for one. A warp branches to them if one of its elements needs them: of bf16 about one
  in 3000 does, of fp16 one in 400.
"""

import struct

from rmsnorm import gated_reference

_LARGEST, _SMALLEST = 60.0, 2.0**-100  # |g| of at most 60 keeps exp(-g) and 1 / (1 + exp(-g)) far inside of fp32
_FIXED, _PER_GATE = 2.0**-20, 2.0**-23  # the bound on the error
_LOG2_E = 1.4426950408889634


def product_with_factor(activation: str, dtype: str) -> str:
    """PTX for two elements: $0 the two results, packed; $1, $2 the numbers u; $3, $4 the gates in fp32.

    Args:
        activation: "silu" or "sigmoid".
        dtype: "bf16" or "f16".
    """
    silu = activation == "silu"
    return f"""{{
        .reg .pred uncertain, far;
        .reg .b32 size, beyond, ends0, ends1;
        .reg .f32 f, width, low0, low1, high0, high1;
        setp.ne.u32 uncertain, 0, 0;
        {_ends(1, 3, 0, silu)}
        {_ends(2, 4, 1, silu)}
        cvt.rn.{dtype}x2.f32 ends0, low1, low0;
        cvt.rn.{dtype}x2.f32 ends1, high1, high0;
        setp.ne.or.b32 uncertain, ends0, ends1, uncertain;
        mov.b32 $0, ends0;
        @!uncertain bra CERTAIN;
        {_exact(1, 3, 0, silu)}
        {_exact(2, 4, 1, silu)}
        cvt.rn.{dtype}x2.f32 $0, low1, low0;
        CERTAIN:
        }}"""


def _ends(u: int, g: int, i: int, silu: bool) -> str:
    """u times both ends of the enclosure of the factor; sets `uncertain` where the bound does not hold."""
    # Of a gate of 0 both ends are 0, as the factor is. A sigmoid is a normal number for any small gate.
    smallest, largest = (_bits(_SMALLEST), _bits(_LARGEST)) if silu else (0, _bits(_LARGEST))
    zero = "setp.ne.and.u32 far, size, 0, far;" if silu else ""
    return f"""
        and.b32 size, ${g}, 0x7fffffff;
        sub.u32 beyond, size, {smallest};
        setp.gt.u32 far, beyond, {largest - smallest};
        {zero}
        or.pred uncertain, uncertain, far;
        mul.rn.f32 f, ${g}, {_fp32(-_LOG2_E)};
        ex2.approx.ftz.f32 f, f;
        add.rn.f32 f, f, {_fp32(1.0)};
        rcp.approx.ftz.f32 f, f;
        {f"mul.rn.f32 f, f, ${g};" if silu else ""}
        mov.b32 width, size;
        fma.rn.f32 width, width, {_fp32(_PER_GATE)}, {_fp32(_FIXED)};
        fma.rn.f32 high{i}, f, width, f;
        neg.f32 width, width;
        fma.rn.f32 low{i}, f, width, f;
        mul.rn.f32 low{i}, low{i}, ${u};
        mul.rn.f32 high{i}, high{i}, ${u};"""


def _exact(u: int, g: int, i: int, silu: bool) -> str:
    """u times the factor, in low{i}: `gated_kernels._sigmoid`, `_silu` and `factor_of` in PTX."""
    polynomial = "\n".join(
        f"fma.rn.f64 p, p, r, {_fp64(c)};" for c in (*reversed(gated_reference.EXP_COEFFICIENTS[:-1]), 1.0, 1.0)
    )
    after = (
        f"""mul.rn.f64 sigma, t, sigma;
            cvt.rn.f32.f64 result, sigma;
            neg.f32 result, result;
            selp.f32 result, ${g}, result, large;
            mul.rn.f32 zero, ${g}, {_fp32(0.0)};"""
        if silu
        else f"""cvt.rn.f32.f64 result, sigma;
            mov.f32 zero, {_fp32(0.0)};"""
    )
    return f"""{{
            .reg .pred large, none;
            .reg .b32 exponent, unused;
            .reg .f32 g, zero, result;
            .reg .f64 t, shifted, n, r, p, power, sigma;
            setp.gt.f32 large, ${g}, {_fp32(-gated_reference.LEAST_EXPONENT)};
            setp.lt.f32 none, ${g}, {_fp32(-gated_reference.LARGEST_EXPONENT)};
            neg.f32 g, ${g};
            selp.f32 g, {_fp32(gated_reference.LEAST_EXPONENT)}, g, large;
            cvt.f64.f32 t, g;
            fma.rn.f64 shifted, t, {_fp64(gated_reference.INVERSE_LN2)}, {_fp64(gated_reference.ROUNDER)};
            sub.rn.f64 n, shifted, {_fp64(gated_reference.ROUNDER)};
            fma.rn.f64 r, n, {_fp64(-gated_reference.LN2_HIGH)}, t;
            fma.rn.f64 r, n, {_fp64(-gated_reference.LN2_LOW)}, r;
            mov.f64 p, {_fp64(gated_reference.EXP_COEFFICIENTS[-1])};
            {polynomial}
            mov.b64 {{exponent, unused}}, shifted;
            add.s32 exponent, exponent, 1023;
            shl.b32 exponent, exponent, 20;
            mov.b64 power, {{0, exponent}};
            fma.rn.f64 sigma, p, power, {_fp64(1.0)};
            rcp.rn.f64 sigma, sigma;
            {after}
            selp.f32 result, zero, result, none;
            mul.rn.f32 low{i}, result, ${u};
            }}"""


def _bits(value: float) -> int:
    """The bits of an fp32 number."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _fp32(value: float) -> str:
    """An fp32 constant of PTX."""
    return f"0f{_bits(value):08X}"


def _fp64(value: float) -> str:
    """An fp64 constant of PTX."""
    return "0d" + struct.pack(">d", value).hex().upper()
