"""What plain PyTorch costs: the published classes, and F.rms_norm where it is not one kernel, operator by operator.

A forward formula returns the bytes that are saved for the backward pass. A backward formula begins with what the
forward pass saved still allocated, and frees it where autograd does.
"""

import torch

from rmsnorm.costs.case import Case
from rmsnorm.costs.tape import F32, Array, Tape, given


def forward(tape: Tape, case: Case) -> int:
    """The lines of a published class in their order. An array is freed where Python drops its last name.

    "early" is DeepSeek's class, "late" GPT-OSS's and, with an offset, Gemma's.
    """
    M, E = case.M, case.E
    x, w = given(E, case.x_dtype), case.weight()
    h = tape.cast(x, F32)
    squares = tape.op("x²", E, E, h)
    variance = tape.op("mean", E, M, squares, scalar=True)  # N − 1 additions and a division a row
    tape.free(squares)
    shifted = tape.op("+ eps", M, M, variance, scalar=True)
    if case.offset:
        tape.free(variance)  # the other classes give it a name, which keeps it until they return
    rstd = tape.op("rsqrt", M, M, shifted)
    tape.free(shifted)
    normed = tape.op("× rstd", E, E, h, rstd)
    if not case.training:
        tape.free(rstd, h)
    if w is None:
        saved = _cast_back(tape, case, normed)
    elif case.cast == "early":
        saved = _cast_then_scale(tape, case, normed, w)
    else:
        saved = _scale_then_cast(tape, case, normed, w)
    tape.free(variance)
    return sum(array.nbytes for array in [h, rstd, *saved])


def _cast_back(tape: Tape, case: Case, normed: Array) -> list[Array]:
    """The end of the forward pass without a weight."""
    tape.recast(normed, case.x_dtype)
    return []


def _cast_then_scale(tape: Tape, case: Case, normed: Array, w: Array) -> list[Array]:
    """The end of the forward pass for "early". Returns what is saved of it."""
    cast = tape.cast(normed, case.x_dtype)
    tape.op("× weight", case.E, case.E, w, cast)
    if not case.training:
        tape.free(cast)
    if cast is not normed:
        tape.free(normed)
    return [cast] if case.training else []


def _scale_then_cast(tape: Tape, case: Case, normed: Array, w: Array) -> list[Array]:
    """The end of the forward pass for "late". Returns what is saved of it."""
    scale = w
    if case.offset:
        w32 = tape.cast(w, F32)
        scale = tape.op("1 + weight", case.N, case.N, w32, scalar=True)
        tape.free(w32)
    product = tape.op("× weight", case.E, case.E, scale, normed)
    if case.training:
        saved = [normed] if scale is w else [normed, scale]
    else:
        saved = []
        tape.free(scale)
        if case.offset:
            tape.free(normed)  # Gemma's class gives its name to the product
    tape.recast(product, case.x_dtype)
    if not case.training:
        tape.free(normed)
    return saved


def backward(tape: Tape, case: Case) -> None:
    """Autograd's nodes in the order in which its engine runs them. A node frees what it saved when it is done."""
    E = case.E
    dy, w = given(E, case.y_dtype), case.weight()
    x32, rstd = Array(E, F32, ours=case.x_dtype != F32), Array(case.M, F32)
    if w is None:
        g = tape.cast(dy, F32)
    elif case.cast == "early":
        h = Array(E, case.x_dtype)
        g = tape.op("dy · w", E, E, dy, w)
        _weight_gradient(tape, case, dy, h, w.dtype)
        g = tape.recast(g, case.x_dtype)
        tape.free(h)
        g = tape.recast(g, F32)
    else:
        g = _scale_backward(tape, case, tape.cast(dy, F32), w)
    _normalize_backward(tape, case, g, x32, rstd)


def rms_norm_forward(tape: Tape, case: Case) -> int:
    """F.rms_norm as PyTorch decomposes it: everything in fp32, and one cast at the end."""
    M, E = case.M, case.E
    x, w = given(E, case.x_dtype), case.weight()
    h = tape.cast(x, F32)
    squares = tape.op("x²", E, E, h)
    variance = tape.op("mean", E, M, squares, scalar=True)
    scratch = tape.number()
    tape.run("+ eps", M, [variance], [variance])  # in place
    tape.free(*scratch)
    rstd = tape.op("rsqrt", M, M, variance)
    tape.free(variance, squares)
    normed = tape.op("× rstd", E, E, h, rstd)
    product = normed if w is None else tape.op("× weight", E, E, normed, w)
    saved = [h, rstd] if w is None else [h, rstd, normed]
    if not case.training:
        if product is not normed:
            tape.free(normed)
        tape.free(h)
    tape.recast(product, case.x_dtype)
    if not case.training:
        tape.free(rstd)
    return sum(array.nbytes for array in saved)


def rms_norm_backward(tape: Tape, case: Case) -> None:
    """The backward pass of `rms_norm_forward`."""
    x32, rstd, w = Array(case.E, F32, ours=case.x_dtype != F32), Array(case.M, F32), case.weight()
    g = tape.cast(given(case.E, case.x_dtype), F32)
    if w is not None:
        g = _scale_backward(tape, case, g, w)
    _normalize_backward(tape, case, g, x32, rstd)


def _scale_backward(tape: Tape, case: Case, dy32: Array, w: Array) -> Array:
    """The backward pass of the multiplication by the weight in fp32. Allocates dw, returns g = dy · w."""
    normed = Array(case.E, F32)
    scale = Array(case.N, F32) if case.offset else w
    g = tape.op("dy · w", case.E, case.E, dy32, scale)
    dw = _weight_gradient(tape, case, dy32, normed, F32 if case.offset else w.dtype)
    tape.free(normed, dy32)
    if case.offset:
        tape.free(scale)
        tape.recast(dw, w.dtype)
    return g


def _weight_gradient(tape: Tape, case: Case, dy: Array, h: Array, dtype: torch.dtype) -> Array:
    """dw: the products with the normalized rows, summed over the rows and cast to the dtype."""
    products = dw = tape.op("dy · h", case.E, case.E, dy, h)
    if not case.single_row:
        dw = tape.op("Σ over rows", case.E - case.N, case.N, products)
        tape.free(products)
    return tape.recast(dw, dtype)


def _normalize_backward(tape: Tape, case: Case, g: Array, x32: Array, rstd: Array) -> None:
    """From g, the gradient of x·rstd, to dx: the direct part, the part through the statistic, and their sum."""
    M, N, E = case.M, case.N, case.E
    products = tape.op("g · x", E, E, g, x32)
    direct = tape.op("g · rstd", E, E, g, rstd)
    d_rstd = products
    if N > 1:
        d_rstd = tape.op("Σ over columns", E - M, M, products)
        tape.free(products)
    tape.free(g)
    cube = tape.op("rstd³", 2 * M, M, rstd)
    half = tape.op("× −1/2", M, M, cube, scalar=True)
    d_variance = tape.op("· d rstd", M, M, half, d_rstd)
    tape.free(half, cube, d_rstd, rstd)
    spread = tape.op("/ N, for every column", E if N > 1 else 0, E, d_variance, scalar=True)
    tape.free(d_variance)
    power = tape.op("x¹", 0, E, x32)
    double = tape.op("× 2", E, E, power, scalar=True)
    through = tape.op("· d square", E, E, double, spread)
    tape.free(double, power, spread)
    tape.run("+", E, [direct, through], [direct])  # in place
    tape.free(through, x32)
    tape.recast(direct, case.x_dtype)
