"""Small changes that make the package wrong, each with tests of which one must notice it; runner.py applies them.

A mutant names the fastest tests that notice it. tests/mutants/test_mutants.py checks that its text occurs exactly once
in its file.
"""

from dataclasses import dataclass

REFERENCE = "tests/test_reference.py"
KERNELS = "tests/kernels/test_kernels.py"
HOST = "tests/kernels/test_host.py"
PTX = "tests/kernels/test_gpu_ptx.py"
LAUNCH = "tests/kernels/test_launch.py"
GATED = "tests/kernels/test_gated_kernels.py"
PARTS = "tests/kernels/test_parts_kernels.py"
OF_SUM = "tests/ops/test_backward_of_sum.py"
PAIRS = "tests/ops/test_pairs.py"
SANDWICH = "tests/ops/test_sandwich.py"
HEADS = "tests/ops/test_heads.py"
SLICES = "tests/ops/test_slices.py"
TWO_RANKS = "tests/ops/test_distributed.py::test_case_passes_on_every_rank"
OPS = "tests/ops/test_ops.py"
SIZES = "tests/test_sizes.py"
BAD_INPUT = "tests/test_bad_input.py"
RECOMPUTATION = "tests/ops/test_eager_recomputation.py"
RANKS = "tests/tools/verify/test_ranks.py"
PROOF = "tests/patching/test_proof.py"
PATCH = "tests/patching/test_patch.py"
REPLACEMENT = "tests/patching/test_replacement.py"
GATED_NORMS = "tests/patching/test_gated_norms.py"
TORCH_NORM = "tests/patching/test_torch_norm.py"
COST = "tests/costs/test_cost.py"
MODEL_COST = "tests/tools/cost/test_model_cost.py"
PREDICTION = "tests/tools/report/test_report_prediction.py"
FAULTS = "tests/kernels/test_faults.py"
GENERATED = "tests/test_generated.py"
PLATFORMS = "tests/test_platforms.py"


def interpreted(case: str) -> str:
    return f"tests/kernels/test_gpu_interpreter.py::test_interpreted_kernels_have_the_bits_of_the_reference[{case}]"


SILU = "Spec(eps=1e-06, cast='early', gate=Gate(activation='silu', first=False), groups=1)"
SILU_FIRST = SILU.replace("first=False", "first=True")
SIGMOID = SILU.replace("silu", "sigmoid")


def gated(form: str, dtype: str = "float32") -> str:
    return f"{GATED}::test_bits_for_every_dtype[{dtype}-{form}]"


@dataclass(frozen=True)
class Mutant:
    """name: what is wrong then. file: in src/rmsnorm. text: becomes the replacement. tests: one must turn red."""

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        """The file, relative to the checkout."""
        return f"src/rmsnorm/{self.file}"

    def applied_to(self, text: str) -> str:
        """The file's text with the change. Raises ValueError if the text does not occur exactly once."""
        count = text.count(self.text)
        if count != 1:
            raise ValueError(f"mutant {self.name!r}: its text occurs {count} times in {self.file}, expected once")
        return text.replace(self.text, self.replacement)


BY_HAND = f"{REFERENCE}::test_forward_gives_the_bits_of_the_arithmetic_written_out_by_hand"
GRADIENTS = f"{REFERENCE}::test_gradients_are_no_further_from_fp64_than_those_of_eager"

OF_REFERENCE = (
    Mutant(
        "eps is not added", "reference.py",
        "v = _mean(S, N) + eps", "v = _mean(S, N)",
        (f"{BY_HAND}[x_dtype0-early-0.0]",),
    ),
    Mutant(
        "the squares are summed in fp32", "reference.py",
        "x.float().double().square().sum(-1)", "x.float().square().sum(-1).double()",
        (f"{BY_HAND}[x_dtype0-early-0.0]",),
    ),
    Mutant(
        "the root is torch's fp32 sqrt", "reference.py",
        "1 / v.double().sqrt().float()", "1 / v.sqrt()",
        (f"{BY_HAND}[x_dtype0-early-0.0]",),
    ),
    Mutant(
        "early casts once, at the end", "reference.py",
        "return w * h.to(x.dtype)  # PyTorch", "return (w.float() * h).to(torch.promote_types(w.dtype, x.dtype))  #",
        (f"{BY_HAND}[x_dtype1-early-0.0]",),
    ),
    Mutant(
        "late casts before it multiplies by the weight", "reference.py",
        "return (_scale(w, offset) * h).to(x.dtype)", "return (_scale(w, offset) * h.to(x.dtype)).to(x.dtype)",
        (f"{BY_HAND}[x_dtype1-late-0.0]",),
    ),
    Mutant(
        "first does not round the statistic", "reference.py",
        'if cast == "first" else x.float() * rstd.unsqueeze(-1)', 'if False else x.float() * rstd.unsqueeze(-1)',
        (f"{BY_HAND}[x_dtype1-first-0.0]",),
    ),
    Mutant(
        "the offset is added in the weight's dtype", "reference.py",
        "else w.float() + offset", "else (w + offset).float()",
        (f"{BY_HAND}[x_dtype1-late-1.0]",),
    ),
    Mutant(
        "+0.0 is added to a weight without an offset", "reference.py",
        "return w.float() if offset == 0 else w.float() + offset", "return w.float() + offset",
        (f"{KERNELS}::test_bits_for_every_bf16_pattern_in_the_weight[float32-late-0.0]",),
    ),
    Mutant(
        "the unrounded sum with the residual is normalized", "reference.py",
        '    rows = x if s is None else s\n    rstd = exact_rstd(rows if', '    rows = x if s is None else x.float() + residual.float()\n    rstd = exact_rstd(rows if',
        (f"{REFERENCE}::test_the_sum_with_the_residual_is_rounded_before_it_is_normalized[x_dtype1-r_dtype1]",),
    ),
    Mutant(
        "the gradient through the sum is added after the cast", "reference.py",
        "return (dx if ds is None else dx + ds.float()).to(dtype).contiguous()",
        "return (dx.to(dtype) if ds is None else dx.to(dtype) + ds).contiguous()",
        (f"{REFERENCE}::test_the_gradient_through_the_sum_is_added_before_the_only_cast[early-0.0]",),
    ),
    Mutant(
        "dx leaves out its second term", "reference.py",
        'dx = rstd.unsqueeze(-1) * (g - through_rstd)', 'dx = rstd.unsqueeze(-1) * g',
        (f"{GRADIENTS}[127-w_dtype0-x_dtype0-early-0.0]",),
    ),
    Mutant(
        "the products for dx are summed in fp32", "reference.py",
        "return (g * xh).double().sum(-1)", "return (g * xh).sum(-1).double()",
        (f"{KERNELS}::test_bits_at_every_width[x-float32-w-float32-early-0]",),
    ),
    Mutant(
        "the products for dx are not rounded to fp32", "reference.py",
        "return (g * xh).double().sum(-1)", "return (g.double() * xh.double()).sum(-1)",
        (f"{KERNELS}::test_bits_at_every_width[x-float32-w-float32-early-0]",),
    ),
    Mutant(
        "early computes dw without the cast of xh", "reference.py",
        'h = xh if cast == "late" else xh.to(dtype).float()', "h = xh",
        (f"{KERNELS}::test_bits_at_every_width[x-bfloat16-w-bfloat16-early-0]",),
    ),
    Mutant(
        "dw is summed in fp32", "reference.py",
        "return (dy.float() * h).double().reshape(", "return (dy.float() * h).reshape(",
        (f"{KERNELS}::test_bits_for_many_rows[float32-float32-early-0.0]",),
    ),
    Mutant(
        "dw leaves out the last row", "reference.py",
        'reshape(rows, *w.shape).sum(0).to(w.dtype)', 'reshape(rows, *w.shape)[:-1].sum(0).to(w.dtype)',
        (f"{GRADIENTS}[127-w_dtype0-x_dtype0-early-0.0]",),
    ),
    Mutant(
        "several gradients of y are added in fp32", "reference.py",
        "backward(functools.reduce(torch.add, dy), None, x",
        "backward(functools.reduce(torch.add, [d.float() for d in dy]), None, x",
        (f"{OF_SUM}::test_the_reference_has_the_bits_of_separate_additions",),
    ),
)  # fmt: skip

OF_ARGUMENTS = (
    Mutant(
        "a device without float64 is not refused", "spec.py",
        "    if lacks_float64(x.device):\n        expected", "    if False:\n        expected",
        (f"{PLATFORMS}::test_a_device_without_float64_is_refused_with_one_message",),
    ),
    Mutant(
        "early returns the dtype of x, not the promoted one", "spec.py",
        'return x if weight is None or cast == "late" else torch.promote_types(x, weight)', "return x",
        (f"{KERNELS}::test_bits_at_every_width[x-bfloat16-w-float32-early-0]",),
    ),
    Mutant(
        "a weight that is too short is accepted", "spec.py",
        'if not _same_sizes(weight.shape, x.shape[-dims:], symbolic):', 'if False:',
        (f"{BAD_INPUT}::test_a_short_weight_raises_the_message_of_the_contract",),
    ),
    Mutant(
        "a negative eps is accepted", "spec.py",
        "    return 0.0 <= value <= 3.4028234663852886e38\n", "    return value <= 3.4028234663852886e38\n",
        (f"{HOST}::test_arguments_are_checked_after_the_plan_is_cached",),
    ),
    Mutant(
        "freed memory is read", "spec.py",
        "        if held < needed:\n", "        if False:\n",
        (f"{SIZES}::test_strided_rows_that_reach_past_their_storage_are_named[Python]",),
    ),
    Mutant(
        "the backward pass accepts a weight whose dtype has changed", "spec.py",
        "if t.dtype is not was.dtype:", "if False:",
        (f"{SIZES}::test_a_dtype_that_changed_to_that_of_another_planned_kind_is_named",),
    ),
    Mutant(
        "the backward pass accepts a weight whose shape has changed", "spec.py",
        "if not t.is_nested and t.shape != was.shape:", "if False:",
        (f"{SIZES}::test_a_weight_for_each_head_that_changed_its_shape_since_the_forward_pass_is_named",),
    ),
    Mutant(
        "rows without elements are accepted", "spec.py",
        "if not shape or not _is_not_zero(shape[-1], symbolic):", "if not shape:",
        (f"{BAD_INPUT}::test_rms_norm_names_the_bad_argument_and_what_it_should_be[x has shape (3, 0)]",),
    ),
)  # fmt: skip

WIDTH_BF16 = f"{KERNELS}::test_bits_at_every_width[x-bfloat16-w-bfloat16-early-0]"
WIDTH_FP32 = f"{KERNELS}::test_bits_at_every_width[x-float32-w-float32-early-0]"
MANY_ROWS = f"{KERNELS}::test_bits_for_many_rows[float32-float32-early-0.0]"

OF_CPU_KERNELS = (
    Mutant(
        "eps is not added", "kernels/cpu/kernels.py",
        'v = np.float32(total / layout[WHOLE]) + eps', 'v = np.float32(total / layout[WHOLE])',
        (WIDTH_FP32,),
    ),
    Mutant(
        "the squares are summed in fp32", "kernels/cpu/kernels.py",
        "total = add_square(total, np.float64(widen(rows[at + i], k)))",
        "total = np.float64(np.float32(add_square(total, np.float64(widen(rows[at + i], k)))))",
        (WIDTH_FP32,),
    ),
    Mutant(
        "the last element of a row is not written", "kernels/cpu/kernels.py",
        '            for i in range(steps):\n                element = nothing(y)', '            for i in range(steps - 1):\n                element = nothing(y)',
        (WIDTH_FP32,),
    ),
    Mutant(
        "the last row is not written", "kernels/cpu/kernels.py",
        "last = min(first + rows, M)", "last = min(first + rows, max(first, M - 1))",
        (MANY_ROWS,),
    ),
    Mutant(
        "early casts once, at the end", "kernels/cpu/kernels.py",
        'scaled = scale * cast(h, x) if early else', 'scaled = scale * h if early else',
        (WIDTH_BF16,),
    ),
    Mutant(
        "first does not round the statistic", "kernels/cpu/kernels.py",
        '            if spec[2] == 2:\n                r = cast(r, x)\n', '',
        (f"{KERNELS}::test_bits_at_every_width[x-bfloat16-w-bfloat16-first-0]",),
    ),
    Mutant(
        "the residual is read with the strides of x", "kernels/cpu/kernels.py",
        "other = start_of(layout, SECOND, m) // parts", "other = start_of(layout, FIRST, m) // parts",
        (f"{KERNELS}::test_bits_with_a_residual[x-float32-w-float32-early-0]",),
    ),
    Mutant(
        "the third gradient is read with the strides of the second", "kernels/cpu/kernels.py",
        "a3 = start_of(layout, FOURTH, m) // parts", "a3 = start_of(layout, THIRD, m) // parts",
        (f"{OF_SUM}::test_gradients_of_any_strides_are_added",),
    ),
    Mutant(
        "dw is added to what was in memory", "kernels/cpu/kernels.py",
        '                    dw[share + i] = 0.0\n', '                    pass\n',
        (WIDTH_FP32,),
    ),
    Mutant(
        "the last block of rows is missing from dw", "kernels/cpu/kernels.py",
        "for chunk in range(1, chunks):", "for chunk in range(1, chunks - 1):",
        (MANY_ROWS,),
    ),
    Mutant(
        "all blocks of rows are summed into the first sum of dw", "kernels/cpu/kernels.py",
        'out, share = m * steps, m // chunk * columns', 'out, share = m * steps, 0',
        (MANY_ROWS,),
    ),
    Mutant(
        "the sum for dx leaves out the offset", "kernels/cpu/kernels.py",
        "total = add(total, np.float64((d * (widen(w[of_head + i], k) + offset)) * xh))",
        "total = add(total, np.float64((d * widen(w[of_head + i], k)) * xh))",
        (f"{KERNELS}::test_bits_at_every_width[x-float32-w-float32-late-1]",),
    ),
    Mutant(
        "dx is not rounded before ds, where eager code adds ds separately", "kernels/cpu/kernels.py",
        "                        if round_first:\n", "                        if False:\n",
        (f"{OF_SUM}::test_bits_are_those_of_separate_operators[C++-x_dtype0-w_dtype0-early-0.0]",),
    ),
    Mutant(
        "bf16 rounds ties away from zero", "kernels/cpu/intrinsics.py",
        "rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)", "rounded = builder.add(bits, _I32(0x8000))",
        (WIDTH_BF16,),
    ),
    Mutant(
        "a NaN from an fp32 weight is rounded like a number", "kernels/cpu/intrinsics.py",
        "    if source.dtype == types.float32:\n", "    if False:\n",
        (f"{KERNELS}::test_a_nan_with_any_payload_stays_a_nan[bfloat16-early]",),
    ),
    Mutant(
        "rows of three strided dimensions use the middle stride for the outer dimension", "kernels/cpu/intrinsics.py",
        "return outer * layout[strides] + rest", "return outer * layout[strides + 1] + rest",
        (f"{KERNELS}::test_bits_for_every_memory_layout[4d_permuted-float32-float32-early-0.0]",),
    ),
)  # fmt: skip

OF_PLANS = (
    Mutant(
        "alignment is not part of a kind of call", "kernels/plan.py",
        "return cls(t.dtype, t.shape, t.stride(), address & -address)", "return cls(t.dtype, t.shape, t.stride())",
        (f"{HOST}::test_unaligned_tensors_get_their_own_plan",),
    ),
    Mutant(
        "several gradients of another dtype are not added by torch first", "kernels/plan.py",
        "if len(dys) == 1 or kind.dy.dtype is dtype:", "if True:",
        (f"{OF_SUM}::test_gradients_of_another_dtype_than_y_are_added_in_their_own_dtype",),
    ),
    Mutant(
        "C++ gets plans for which torch must convert a tensor", "kernels/plan.py",
        "        if self.before or self.after:\n", "        if False:\n",
        (f"{HOST}::test_calls_that_need_a_conversion_are_made_by_python",),
    ),
    Mutant(
        "a tensor with a strided last dimension is not copied", "kernels/rows.py",
        "    if M > 0 and N > 1 and any(stride[-1] != 1 for stride in strides):\n        return None\n", "",
        (f"{LAUNCH}::test_walk_returns_none_if_a_copy_is_needed",),
    ),
    Mutant(
        "dimensions are merged if only one tensor allows it", "kernels/rows.py",
        "if dims and all(outer == inner * size", "if dims and any(outer == inner * size",
        (f"{KERNELS}::test_bits_with_a_residual[x-float32-w-float32-early-0]",),
    ),
    Mutant(
        "rows at odd addresses are read in pairs", "kernels/cpu/planner.py",
        "return all(kind.alignment >= _PAIR_BYTES for kind in kinds)", "return True",
        (f"{HOST}::test_unaligned_tensors_get_their_own_plan",),
    ),
    Mutant(
        "rows of an odd number of elements are read in pairs", "kernels/cpu/launches.py",
        'even = all(number % 2 == 0 for number in (N, columns, *steps)) and', 'even = True and',
        (WIDTH_BF16,),
    ),
    Mutant(
        "the blocks of dw follow the thread count", "kernels/cpu/launches.py",
        "chunk = groups * max(_FEWEST_ROWS,", "chunk = groups * max(_FEWEST_ROWS, -(-M // torch.get_num_threads()),",
        (f"{KERNELS}::test_the_order_in_which_dw_is_summed_depends_on_its_shape_only",),
    ),
    Mutant(
        "gradients are added in another order", "kernels/dispatch.py",
        "dx, dw = run(plan, (dy[0], ds, x, w, rstd, *dy[1:]))", "dx, dw = run(plan, (dy[0], ds, x, w, rstd, *dy[:0:-1]))",
        (f"{OF_SUM}::test_bits_are_those_of_separate_operators[Python-x_dtype0-w_dtype0-early-0.0]",),
    ),
    Mutant(
        "fp64 runs the kernels of fp32", "spec.py",
        "KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)",
        "KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)",
        (f"{OPS}::test_fp64_is_computed_in_fp32_and_returned_as_promoted",),
    ),
    Mutant(
        "the second norm of a pair is launched with the tensors of the first", "kernels/plan.py",
        "launches=(*first.launches, *(launch.renamed(names) for launch in second.launches)),",
        "launches=(*first.launches, *(launch.renamed(names) for launch in first.launches)),",
        (f"{PAIRS}::test_a_pair_has_the_bits_of_two_calls[C++-x_dtype0-w_dtype0-early-0.0]",),
    ),
)  # fmt: skip

OF_GPU_KERNELS = (
    Mutant(
        "eps is not added", "kernels/gpu/kernels.py",
        "v = (S / N).to(tl.float32) + eps", "v = (S / N).to(tl.float32)",
        (interpreted("strides"),),
    ),
    Mutant(
        "the statistic is an approximate rsqrt", "kernels/gpu/kernels.py",
        "return tl.div_rn(1.0, tl.sqrt_rn(v))", "return tl.rsqrt(v)",
        (f"{PTX}::test_rounding_is_ieee_and_subnormals_are_kept",),
    ),
    Mutant(
        "the squares are summed in fp32", "kernels/gpu/kernels.py",
        "    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)\n    for k in tl.static_range(ALL):\n"
        "        d = measured(row[k].to(tl.float32), columns(first, ends, k, PIECES, BLOCK_N) + lead, V).to(tl.float64)",
        "    squares = tl.zeros([ROWS, BLOCK_N], tl.float32)\n    for k in tl.static_range(ALL):\n"
        "        d = measured(row[k].to(tl.float32), columns(first, ends, k, PIECES, BLOCK_N) + lead, V)",
        (interpreted("strides"),),
    ),
    Mutant(
        "early casts once, at the end", "kernels/gpu/kernels.py",
        "y = (w.to(tl.float32) * cast_to(h, X)).to(Y)", "y = (w.to(tl.float32) * h).to(Y)",
        (interpreted("dtypes_that_differ"),),
    ),
    Mutant(
        "the cast to bf16 truncates", "kernels/gpu/kernels.py",
        '"{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2;', '"{ .reg .b32 two; cvt.rz.bf16x2.f32 two, $3, $2;',
        (f"{PTX}::test_bf16_is_rounded_two_numbers_at_a_time",),
    ),
    Mutant(
        "the middle and inner sizes of strided rows are exchanged", "kernels/gpu/kernels.py",
        "middle, inner = sizes[0], sizes[1]", "inner, middle = sizes[0], sizes[1]",
        (interpreted("strides"),),
    ),
    Mutant(
        "the sum with the residual is not rounded before it is normalized", "kernels/gpu/kernels.py",
        "(row[k].to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty),)",
        "row[k].to(tl.float32) + other.to(tl.float32),)",
        (interpreted("no_rows_or_one"),),
    ),
    Mutant(
        "columns beyond the end of a row count where the statistic is infinite", "kernels/gpu/kernels.py",
        "return tl.where(inside, x.to(tl.float32) * r, 0.0)", "return x.to(tl.float32) * r",
        (interpreted("extremes"),),
    ),
    Mutant(
        "dx of tiles leaves out the gradient through the sum", "kernels/gpu/kernels.py",
        "if len(ds_row) > 0:", "if len(ds_row) > len(dw):",
        (interpreted("rows_that_begin_anywhere_in_a_word"),),
    ),
    Mutant(
        "dx of tiles is the gradient of a norm without a weight", "kernels/gpu/kernels.py",
        "weight[k] if len(weight) > 0 else None, offset, EARLY)\n        dx_row", "None, offset, EARLY)\n        dx_row",
        (interpreted("parts_of_rows"),),
    ),
    Mutant(
        "dx of rows in parts takes the mean over the columns of the part", "kernels/gpu/parts_kernels.py",
        "width = tl.full([ROWS, 1], whole, tl.float64)", "width = tl.full([ROWS, 1], N, tl.float64)",
        (interpreted("parts_of_rows"),),
    ),
    Mutant(
        "programs leave out their last tile", "kernels/gpu/kernels.py",
        "return last // programs + (last % programs >= program).to(tl.int32)",
        "return last // programs + (last % programs > program).to(tl.int32)",
        (interpreted("every_row_counts"),),
    ),
    Mutant(
        "dw leaves out the shares of the last programs", "kernels/gpu/kernels.py",
        "(program < programs) & (n < N), 0.0).to(tl.float64)", "(program < programs - 1) & (n < N), 0.0).to(tl.float64)",
        (interpreted("every_row_counts"),),
    ),
    Mutant(
        "the addresses of rows in tiles are computed with 32 bits", "kernels/gpu/kernels.py",
        "m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]", "m = tile * ROWS + tl.arange(0, ROWS)[:, None]",
        (interpreted("rows_that_begin_more_than_2_31_elements_apart"),),
    ),
    Mutant(
        "the addresses of wide rows are computed with 32 bits", "kernels/gpu/kernels.py",
        '    """Each program loops over one row twice: once for the sum, once for y."""\n'
        "    N = as_multiple(N, MULTIPLE)\n    m = tl.program_id(0).to(tl.int64)",
        '    """Each program loops over one row twice: once for the sum, once for y."""\n'
        "    N = as_multiple(N, MULTIPLE)\n    m = tl.program_id(0)",
        (interpreted("rows_that_begin_more_than_2_31_elements_apart"),),
    ),
    Mutant(
        "programs of the second norm take rows by their number in the whole launch", "kernels/gpu/kernels.py",
        "program - tiles, 0, x2, None, w2,", "program, 0, x2, None, w2,",
        (interpreted("two_norms_in_one_launch"),),
    ),
    Mutant(
        "partial sums of dw are read before the previous launch has ended", "kernels/gpu/kernels.py",
        "        tl.extra.cuda.gdc_wait()  # this kernel may start", "        pass  # this kernel may start",
        (f"{PTX}::test_a_kernel_that_starts_early_waits_before_it_reads_results",),
    ),
    Mutant(
        "multiplications and additions are fused", "kernels/gpu/driver.py",
        '"enable_fp_fusion": False', '"enable_fp_fusion": True',
        (f"{PTX}::test_every_launch_forbids_fusion",),
    ),
    Mutant(
        "two concurrent launches of a kernel share their argument memory", "kernels/gpu/driver.py",
        "        if not self._lock.acquire(blocking=False):\n            return False\n",
        "        self._lock.acquire(blocking=False)\n",
        ("tests/kernels/test_driver.py::test_concurrent_launches_do_not_mix_up_addresses",
         "tests/kernels/test_driver.py::test_a_launch_during_a_launch_does_not_deadlock"),
    ),
    Mutant(
        "a GPU call runs on the current GPU, not on that of its tensors", "kernels/run.py",
        "if gpu is not None and gpu != compat.current_gpu():", "if False:",
        (f"{PTX}::test_a_call_runs_on_the_gpu_of_its_tensors",),
    ),
)  # fmt: skip

OF_GATED = (
    Mutant(
        "silu is computed in fp32", "gated_reference.py",
        'return (t * sigma if activation == "silu" else sigma).float()',
        'return (t.float() * sigma.float() if activation == "silu" else sigma).float()',
        (gated(SILU),),
    ),
    Mutant(
        "the exponential has a coefficient of fp32", "gated_reference.py",
        '"0x1.0000000000001p-1", "0x1.5555555555556p-3",', '"0x1.0000000000001p-1", "0x1.5555p-3",',
        ("tests/ops/test_gated.py::test_silu_and_sigmoid_of_bf16_numbers_are_correctly_rounded_but_for_near_ties_at_zero",),
    ),
    Mutant(
        "the first group's part of the weight serves all groups", "kernels/cpu/gated_kernels.py",
        "at_x, at_gate, column = start_of(layout, FIRST, m), start_of(layout, SECOND, m), m % groups * N",
        "at_x, at_gate, column = start_of(layout, FIRST, m), start_of(layout, SECOND, m), 0",
        (gated(SILU),),
    ),
    Mutant(
        "the derivative of silu leaves out the gate", "kernels/cpu/gated_kernels.py",
        "slopes[i] = np.float32(sigma + scaled * rest)", "slopes[i] = np.float32(sigma + sigma * rest)",
        (gated(SILU),),
    ),
    Mutant(
        "a gate that comes first does not reach the sum of squares", "kernels/cpu/gated_kernels.py",
        "        activate(factor, n, form[2] != 0)\n        multiply(z, n, factor)\n\n",
        "        activate(factor, n, form[2] != 0)\n\n",
        (gated(SILU_FIRST),),
    ),
    Mutant(
        "the gate is read with the strides of x", "kernels/cpu/gated_kernels.py",
        "start_of(layout, SECOND, m), m % groups * N\n        total", "start_of(layout, FIRST, m), m % groups * N\n        total",
        (f"{GATED}::test_bits_for_every_memory_layout[3d_transposed-float32-float32-float32-{SILU}]",),
    ),
    Mutant(
        "the second tile of a wide group overwrites the first", "kernels/cpu/gated_kernels.py",
        "store(z, n, y, form[8], m * N + i)", "store(z, n, y, form[8], m * N)",
        (f"{GATED}::test_bits_at_every_width[{SILU}]",),
    ),
    Mutant(
        "the norm is rounded before it is multiplied by the gate", "gated_reference.py",
        "        u = u * factor\n", "        u = u.to(dtype) * factor\n",
        (gated(SILU.replace("early", "late"), "bfloat16"),),
    ),
    Mutant(
        "the product with a first gate is rounded before it is normalized", "gated_reference.py",
        "    rows = grouped(x.float() * factor if spec.gate.first else x, spec.groups)\n    rstd = exact_rstd",
        "    rows = grouped((x.float() * factor).to(x.dtype) if spec.gate.first else x, spec.groups)\n    rstd = exact_rstd",
        (gated(SILU_FIRST, "bfloat16"),),
    ),
    Mutant(
        "the derivative of the sigmoid leaves out 1 - σ", "kernels/cpu/gated_kernels.py",
        "slopes[i] = np.float32(sigma * (1.0 - sigma))", "slopes[i] = np.float32(sigma)",
        (gated(SIGMOID),),
    ),
    Mutant(
        "the gradient of a first gate is multiplied by the gate, not by x", "kernels/cpu/gated_kernels.py",
        "load(x, form[4], at_x + i, n, d)\n                    multiply(d, n, dz)",
        "load(gate, form[5], at_gate + i, n, d)\n                    multiply(d, n, dz)",
        (gated(SILU_FIRST),),
    ),
    Mutant(
        "the gradient of a first gate alone is made from memory that was never written", "kernels/cpu/gated_kernels.py",
        "wants_dz = wants_dx or (wants_dgate and gate_first)", "wants_dz = wants_dx",
        (f"{GATED}::test_only_the_gradients_that_are_asked_for_are_computed[{SILU_FIRST.replace('groups=2', 'groups=1')}]",),
    ),
    Mutant(
        "dw of an early gated norm leaves out the cast of xh", "kernels/cpu/gated_kernels.py",
        "    if form[1] != 0:\n        round_to(form[4], rounded, n)\n    for i in range(n):\n        dw",
        "    for i in range(n):\n        dw",
        (gated(SILU, "bfloat16"),),
    ),
    Mutant(
        "a gated layer applies its gate after the norm always", "modules.py",
        "activation=spec.gate.activation,\n            gate_first=spec.gate.first, groups=spec.groups,",
        "activation=spec.gate.activation,\n            groups=spec.groups,",
        ("tests/ops/test_gated.py::test_the_layer_has_the_bits_of_the_function",),
    ),
    Mutant(
        "a gated layer ignores its groups", "modules.py",
        "activation=spec.gate.activation,\n            gate_first=spec.gate.first, groups=spec.groups,",
        "activation=spec.gate.activation,\n            gate_first=spec.gate.first,",
        ("tests/ops/test_gated.py::test_the_layer_has_the_bits_of_the_function",),
    ),
    Mutant(
        "the function ignores the activation", "functional.py",
        "return gated_norm(x, gate, weight, eps, cast, activation, gate_first, groups)",
        'return gated_norm(x, gate, weight, eps, cast, "silu", gate_first, groups)',
        (gated(SIGMOID),),
    ),
)  # fmt: skip

OF_SANDWICHES = (
    Mutant(
        "the second norm of a sandwich is planned for the dtype of x", "kernels/dispatch.py",
        "return first, Forward.of(x, residual, w2, spec, with_rstd)._replace(x=h)",
        "return first, Forward.of(x, residual, w2, spec, with_rstd)",
        (f"{SANDWICH}::test_one_call_has_the_bits_of_two_norms[C++-x_dtype3-w_dtype3-residual_dtype3-early-0.0]",),
    ),
    Mutant(
        "the output of the first norm of a sandwich is read with the strides of x", "kernels/dispatch.py",
        "h = TensorKind.dense(x.shape, result_dtype(x.dtype, None if w is None else w.dtype, spec.cast))",
        "h = first.x._replace(dtype=result_dtype(x.dtype, None if w is None else w.dtype, spec.cast))",
        (f"{SANDWICH}::test_one_call_has_the_bits_of_two_norms[C++-x_dtype0-w_dtype0-residual_dtype0-late-1.0]",),
    ),
    Mutant(
        "the statistics of the two norms of a sandwich are exchanged", "kernels/plan.py",
        "return replace(plan, outputs=(y, s, rstd, rstd2))", "return replace(plan, outputs=(y, s, rstd2, rstd))",
        (f"{SANDWICH}::test_one_call_has_the_bits_of_two_norms[C++-x_dtype0-w_dtype0-residual_dtype0-late-1.0]",),
    ),
    Mutant(
        "a sandwich loses gradients instead of raising", "ops/sandwich.py",
        "    if differentiated(x, w, residual, w2):\n", "    if False:\n",
        (f"{SANDWICH}::test_the_operator_is_refused_where_autograd_would_lose_a_gradient",),
    ),
    Mutant(
        "a compiler is told that the output of a sandwich has the dtype of x", "ops/sandwich.py",
        "y_dtype = result_dtype(s_dtype, None if w2 is None else w2.dtype, cast)", "y_dtype = x.dtype",
        (f"{SANDWICH}::test_a_compiler_is_told_the_dtypes_and_shapes_of_the_outputs",),
    ),
    Mutant(
        "a norm whose output is read twice is fused into a sandwich", "ops/residual_fusion.py",
        "or h is residual or _only_user(h) is not norm:", "or h is residual:",
        (f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[read twice-0-False]",),
    ),
    Mutant(
        "norms with different eps are fused into a sandwich", "ops/residual_fusion.py",
        "            and options == options_before\n", "",
        (f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[another eps-0-False]",),
    ),
    Mutant(
        "a sandwich exchanges the weights of its norms", "ops/residual_fusion.py",
        "(x, w_before, before.residual, w, *options), norm)", "(x, w, before.residual, w_before, *options), norm)",
        (f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[plain-1-False]",),
    ),
    Mutant(
        "the second norm of a sandwich is differentiated with the statistic of the first", "ops/residual_fusion.py",
        "replaced = [((0, 1, 3)[i], output)", "replaced = [((0, 1, 2)[i], output)",
        (f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[plain-1-True]",),
    ),
    Mutant(
        "a sandwich is found only if the residual is the second summand", "ops/residual_fusion.py",
        "for h, residual in ((a, b), (b, a)):", "for h, residual in ((a, b),):",
        (f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[plain-1-False]",
         f"{SANDWICH}::test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them[sum on the left-1-False]"),
    ),
    Mutant(
        "a sandwich is made after the first use of its first statistic", "ops/residual_fusion.py",
        "    if not all(edit.precedes([norm], user) for rstd in rstds for user in rstd.users):\n        return\n", "",
        (f"{SANDWICH}::test_a_statistic_that_is_read_between_the_norms_prevents_a_sandwich",),
    ),
    Mutant(
        "a norm that is computed again is fused with one that is not", "ops/residual_fusion.py",
        "            and all(call.meta.get(key) == norm.meta.get(key) for key in CHECKPOINTING)\n        ):",
        "        ):",
        (f"{SANDWICH}::test_a_norm_that_is_computed_again_is_fused_with_none_that_is_not[True-0]",),
    ),
)  # fmt: skip

OF_PAIRS = (
    Mutant(
        "norms with different eps are paired", "ops/pairing.py",
        "        and _options(norm) == _options(other)\n", "",
        (f"{PAIRS}::test_norms_that_differ_are_not_paired",),
    ),
    Mutant(
        "a norm is paired with one that it depends on", "ops/pairing.py",
        "    if any(earlier in node.all_input_nodes for node in (later, *moved)):\n        return None\n", "",
        (f"{PAIRS}::test_a_norm_that_depends_on_the_other_is_not_paired_with_it",),
    ),
    Mutant(
        "a norm with a residual is paired without it", "ops/pairing.py",
        "        and arguments(norm)[1] is None\n", "",
        (f"{PAIRS}::test_norms_that_differ_are_not_paired",),
    ),
    Mutant(
        "the second norm of a pair returns the output of the first", "ops/pairing.py",
        "new = edit.output(norm, call, 2 * number + places[i], output)",
        "new = edit.output(norm, call, places[i], output)",
        (f"{PAIRS}::test_norms_of_queries_and_keys_are_paired_and_keep_all_bits[False]",),
    ),
    Mutant(
        "the gradients of a pair are those of one weight", "ops/pairing.py",
        "(dy, x, w, rstd, dy2, x2, w2, rstd2, *options), {0: 0, 1: 1})",
        "(dy, x, w, rstd, dy2, x2, w, rstd2, *options), {0: 0, 1: 1})",
        (f"{PAIRS}::test_norms_of_queries_and_keys_are_paired_and_keep_all_bits[True]",),
    ),
    Mutant(
        "both norms of a pair get the gradients that the first one needs", "ops/pairs.py",
        "if dy is not None and dy2 is not None and needs == needs2:", "if dy is not None and dy2 is not None:",
        (f"{PAIRS}::test_only_the_gradients_that_are_needed_are_computed",),
    ),
    Mutant(
        "a pair of norms is made where forward mode needs a tangent", "ops/pairs.py",
        "is_plain(*tensors) and not has_tangent(*tensors)", "is_plain(*tensors)",
        ("tests/ops/test_transforms.py::test_rms_norms_keeps_the_tangents_of_forward_mode",),
    ),
)  # fmt: skip

BITS_OF_PARTS = f"{PARTS}::test_parts_have_the_bits_of_whole_rows"

OF_PARTS = (
    Mutant(
        "a part of a row is normalized by its own width", "kernels/cpu/launches.py",
        "groups, columns, whole or columns]", "groups, columns, columns]",
        (f"{BITS_OF_PARTS}[C++-float32-early-0.0]",),
    ),
    Mutant(
        "a part's dx uses the sum over that part", "kernels/cpu/kernels.py",
        "c = np.float32(((sums[m] + 0.0) if finishes else total) / layout[WHOLE])",
        "c = np.float32(total / layout[WHOLE])",
        (f"{BITS_OF_PARTS}[C++-float32-early-0.0]",),
    ),
    Mutant(
        "a sum of nothing but -0.0 stays -0.0 in a part", "kernels/cpu/kernels.py",
        "((sums[m] + 0.0) if finishes else total)", "(sums[m] if finishes else total)",
        (f"{PARTS}::test_a_sum_of_minus_zero_gives_the_bits_of_zero[C++-float32]",),
    ),
    Mutant(
        "a part sums the squares of x, not of its sum with the residual", "kernels/cpu/parts_planner.py",
        'tensors = row, "residual" if adds else None, None, None, "s" if adds else None, None, "S"',
        'tensors = row, None, None, None, None, None, "S"',
        (f"{BITS_OF_PARTS}[C++-float32-early-0.0]",),
    ),
    Mutant(
        "the sum of a part for dx leaves out the offset", "kernels/cpu/parts_planner.py",
        'scale.name, "rstd", None, None, "S"\n    words = spec_words(0.0, spec.offset, spec.cast)',
        'scale.name, "rstd", None, None, "S"\n    words = spec_words(0.0, 0.0, spec.cast)',
        (f"{BITS_OF_PARTS}[C++-float32-late-1.0]",),
    ),
    Mutant(
        "a rank without columns gets a kernel", "kernels/dispatch.py",
        "    if kind.x.shape[-1] == 0:\n", "    if False:\n",
        (f"{BITS_OF_PARTS}[C++-float32-early-0.0]",),
    ),
    Mutant(
        "a part of heads with weights of their own gets the kernel for one weight", "kernels/dispatch.py",
        "    if heads_of(w) > 1:\n", "    if False:\n",
        (f"{PARTS}::test_parts_of_heads_with_weights_of_their_own",),
    ),
    Mutant(
        "a compiler is told that the output of a part has the dtype of x", "ops/parts.py",
        "y = x.new_empty(x.shape, dtype=result_dtype(x.dtype, None if w is None else w.dtype, cast))",
        "y = x.new_empty(x.shape)",
        (f"{PARTS}::test_operators_are_opaque_and_their_shapes_are_known",),
    ),
    Mutant(
        "ranks normalize x, not its sum with the residual", "ops/sharding.py",
        "parts.append((x if residual is None else s, S))", "parts.append((x, S))",
        (f"{TWO_RANKS}[2-columns_stay_sharded]",),
    ),
    Mutant(
        "two norms each have an all-reduce of their own", "ops/sharding.py",
        "    if _share_sums(*norms):\n", "    if False:\n",
        (f"{TWO_RANKS}[2-two_norms_share_an_all_reduce]",),
    ),
    Mutant(
        "a norm of columns shares its all-reduce with one of rows", "ops/sharding.py",
        " and first.by_columns == second.by_columns\n", "\n",
        (f"{TWO_RANKS}[2-two_norms_share_an_all_reduce]",),
    ),
    Mutant(
        "dw alone costs an all-reduce", "ops/sharding.py",
        "    if norm.by_columns and need_dx:\n", "    if norm.by_columns:\n",
        (f"{TWO_RANKS}[2-gradients_that_need_no_sum_need_no_communication]",),
    ),
    Mutant(
        "the weight of heads is expected to be sharded by heads where columns are sharded", "ops/sharding.py",
        "return tuple(Replicate() if dim is None or dim < shared else Shard(dim - shared) for dim in dims)",
        "return tuple(Replicate() if dim is None or dim < shared else Shard(0) for dim in dims)",
        (f"{TWO_RANKS}[2-weights_of_heads_are_sharded_as_the_heads]",),
    ),
)  # fmt: skip

OF_HEADS_AND_SLICES = (
    Mutant(
        "all heads are multiplied by the weight of the first", "kernels/cpu/kernels.py",
        "of_head = m % layout[HEADS] * steps\n            total = 0.0\n            if finishes:",
        "of_head = 0\n            total = 0.0\n            if finishes:",
        (f"{HEADS}::test_each_head_is_a_norm_of_its_own[torch.float32-{{}}]",),
    ),
    Mutant(
        "gradients of all heads are those of the first head's weight", "kernels/cpu/kernels.py",
        "of_head = m % layout[HEADS] * steps\n            total = 0.0\n            for i in range(steps if",
        "of_head = 0\n            total = 0.0\n            for i in range(steps if",
        (f"{HEADS}::test_each_head_is_a_norm_of_its_own[torch.float32-{{}}]",),
    ),
    Mutant(
        "dw of heads that are read in pairs is laid out as that of one head", "kernels/cpu/kernels.py",
        "column = k * (columns // parts) + of_head + i", "column = k * steps + of_head + i",
        (f"{HEADS}::test_each_head_is_a_norm_of_its_own[torch.bfloat16-{{}}]",),
    ),
    Mutant(
        "heads are not part of a weight", "modules.py",
        "shape = (hidden_size,) if heads is None else (heads, hidden_size)", "shape = (hidden_size,)",
        (f"{HEADS}::test_a_layer_with_heads_has_a_weight_for_each",),
    ),
    Mutant(
        "the kernel takes the statistic over all columns", "kernels/cpu/kernels.py",
        "steps, of_head = N // parts, 0\n        measured = layout[MEASURED] if sliced else N",
        "steps, of_head = N // parts, 0\n        measured = N",
        (f"{SLICES}::test_bits_of_the_reference[torch.float32-early-0.0]",),
    ),
    Mutant(
        "dx passes through the statistic in columns outside of it too", "kernels/cpu/kernels.py",
        "                        if sliced and i >= measured // parts:\n", "                        if False:\n",
        (f"{SLICES}::test_bits_of_the_reference[torch.float32-early-0.0]",),
    ),
    Mutant(
        "a statistic over an odd number of columns is read in pairs", "kernels/cpu/launches.py",
        "for number in (N, columns, *steps))", "for number in (N, *steps))",
        (f"{SLICES}::test_bits_of_the_reference[torch.bfloat16-early-0.0]",),
    ),
    Mutant(
        "the reference leaves columns outside of the statistic in dx", "reference.py",
        "        through_rstd[..., N:] = 0.0\n", "        pass\n",
        (f"{SLICES}::test_bits_of_the_reference[torch.float32-early-0.0]",),
    ),
    Mutant(
        "a residual alone gets no gradient through a norm of the first columns", "ops/autograd.py",
        "ctx.spec, need_x or need_residual, need_dw)", "ctx.spec, need_x, need_dw)",
        (f"{SLICES}::test_only_the_gradients_that_are_needed_are_computed",),
    ),
    Mutant(
        "a norm of the first columns is not recorded for a residual alone", "ops/slices.py",
        "slice_forward.default(*args, needs_rstd(x, residual, w))",
        "slice_forward.default(*args, needs_rstd(x, None, w))",
        (f"{SLICES}::test_only_the_gradients_that_are_needed_are_computed",),
    ),
    Mutant(
        "the gradient of a residual is rounded to the dtype of x", "ops/autograd.py",
        "d_residual = d_rows.to(ctx.dtypes[1]) if", "d_residual = d_rows.to(ctx.dtypes[0]) if",
        (f"{SLICES}::test_dtypes_may_differ",),
    ),
    Mutant(
        "exported programs take the statistic over all columns", "ops/plain.py",
        "rstd = reference.published_rstd(rows[..., :variance_size], eps)", "rstd = reference.published_rstd(rows, eps)",
        (f"{SLICES}::test_compiled_and_exported_code_gives_the_same_bits",),
    ),
)  # fmt: skip

OF_HOST = (
    Mutant(
        "C++ takes a plan for another alignment", "kernels/host/host.cpp",
        "const auto alignment = address | 16;", "const auto alignment = (address & 0) | 16;",
        (f"{HOST}::test_unaligned_tensors_get_their_own_plan",),
    ),
    Mutant(
        "C++ takes a plan for other strides", "kernels/host/host.cpp",
        "    numbers.append(t.strides().begin(), t.strides().end());\n", "",
        (f"{HOST}::test_calls_that_differ_in_any_relevant_property_get_separate_plans",),
    ),
    Mutant(
        "C++ takes a plan for other gradients", "kernels/host/host.cpp",
        'call.requested[1] << 8 |', 'call.requested[1] * 0 |',
        (f"{HOST}::test_only_requested_gradients_are_computed",),
    ),
    Mutant(
        "C++ reads memory that was freed", "kernels/host/host.cpp",
        "return t.storage().nbytes() >= needed;", "return t.storage().nbytes() + needed > 0;",
        (f"{SIZES}::test_the_forward_pass_names_the_tensor_whose_memory_was_freed[C++-weight-True]",),
    ),
    Mutant(
        "C++ does not notice a weight whose shape has changed", "kernels/host/host.cpp",
        " && t[3].dim() == saved.dims_of_w", "",
        (f"{SIZES}::test_a_weight_for_each_head_that_changed_its_shape_since_the_forward_pass_is_named",),
    ),
    Mutant(
        "C++ loses a tangent of forward mode", "kernels/host/host.cpp",
        "      if (t._fw_grad(0).defined()) {\n        return false;\n      }\n", "",
        (f"{HOST}::test_calls_with_anything_but_plain_tensors_are_made_by_python",),
    ),
    Mutant(
        "a second derivative is silently zero", "kernels/host/host.cpp",
        "if (as_saved && !at::GradMode::is_enabled() && plain(t)) {", "if (as_saved && plain(t)) {",
        (f"{HOST}::test_a_second_derivative_raises",),
    ),
    Mutant(
        "C++ leaves one of torch's threads idle", "kernels/host/host.cpp",
        "(team->parallel)(drain, shared, threads, 0);", "(team->parallel)(drain, shared, threads - 1, 0);",
        (f"{HOST}::test_threads_share_the_rows_of_a_call_from_cpp",),
    ),
    Mutant(
        "C++ keeps saved tensors without their version", "kernels/host/host.cpp",
        "ctx->save_for_backward({rows, w ? *w : Tensor(), rstd});",
        "ctx->save_for_backward({rows.detach().alias(), w ? w->variable_data() : Tensor(), rstd});",
        (f"{HOST}::test_saved_tensors_that_were_freed_or_modified_raise",),
    ),
    Mutant(
        "a library that others can write is loaded", "kernels/host/build.py",
        "if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):", "if False:",
        (f"{HOST}::test_only_files_that_no_other_user_can_write_are_loaded",),
    ),
    Mutant(
        "machine code from different sources is loaded", "kernels/cpu/cache.py",
        'return b"".join(source.read_bytes() for source in SOURCES) + repr(versions).encode()',
        "return repr(versions).encode()",
        ("tests/kernels/test_processes.py::test_the_cache_of_another_source_is_not_used",),
    ),
    Mutant(
        "a cache that others can write is used", "kernels/cpu/cache.py",
        "    _check_own(folder)\n    build", "    build",
        (f"{FAULTS}::test_a_cache_that_other_users_can_write_is_not_used",),
    ),
)  # fmt: skip

OF_OPERATORS = (
    Mutant(
        "saved tensors are kept without their version", "ops/autograd.py",
        "        ctx.save_for_backward(rows, w, rstd)\n        ctx.set_materialize_grads(False)\n        ctx.spec = spec",
        "        ctx.save_for_backward(rows.data, None if w is None else w.data, rstd)\n"
        "        ctx.set_materialize_grads(False)\n        ctx.spec = spec",
        (f"{SIZES}::test_an_x_or_weight_modified_in_place_raises_an_error_that_says_what_to_write",),
    ),
    Mutant(
        "the tangent of y leaves out the tangent of the weight", "ops/autograd.py",
        "        if w_t is not None:\n", "        if False:\n",
        (f"{OPS}::test_forward_mode",),
    ),
    Mutant(
        "second derivatives are silently zero", "ops/derivatives.py",
        "        @staticmethod\n        def backward(ctx: Any, *grads: Tensor) -> None:\n            raise RuntimeError(message)",
        "        @staticmethod\n        def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:\n            return (None,) * 9",
        (f"{OPS}::test_a_second_derivative_raises",),
    ),
    Mutant(
        "a lazily negated tensor is read without the negation", "ops/dispatch.py",
        "or t.is_neg() or", "or",
        (f"{KERNELS}::test_a_lazily_negated_view_is_negated",),
    ),
    Mutant(
        "the gradients of a pair are exchanged", "ops/pairs.py",
        "return without_none(x, *dispatch.backward_pair(first, second, spec, need_dx, need_dw))",
        "return without_none(x, *dispatch.backward_pair(second, first, spec, need_dx, need_dw))",
        (f"{PAIRS}::test_a_pair_has_the_bits_of_two_calls[Python-x_dtype0-w_dtype0-early-0.0]",),
    ),
    Mutant(
        "each rank normalizes by its own columns", "ops/sharding.py",
        '        S = summed  # type: ignore[assignment]\n', '        pass\n',
        (f"{RANKS}::test_the_code_passes_on_two_ranks",),
    ),
    Mutant(
        "sums over ranks are exchanged in fp32", "ops/sharding.py",
        'summed = compat.sum_over_ranks(S, norm.mesh, dim)', 'summed = compat.sum_over_ranks(S.float(), norm.mesh, dim).double()',
        (f"{RANKS}::test_the_code_passes_on_two_ranks",),
    ),
    Mutant(
        "dw of a rank's rows counts as that of all rows", "ops/sharding.py",
        'Partial() if q == Replicate() and _dim(p) is not None else q for', 'q for',
        (f"{RANKS}::test_the_code_passes_on_two_ranks",),
    ),
    Mutant(
        "a norm output that was modified is recomputed unmodified", "ops/eager_recomputation.py",
        "        if t._version != self.version:\n            self.reason = _MODIFIED\n        elif", "        if",
        (f"{RECOMPUTATION}::test_an_output_that_is_modified_before_it_is_saved_is_kept",),
    ),
    Mutant(
        "a saved tensor that was modified since is used", "ops/eager_recomputation.py",
        "    if not is_compiling() and t._version != version:", "    if False:",
        (f"{RECOMPUTATION}::test_modifying_a_tensor_after_it_was_saved_raises_as_without_the_context",),
    ),
    Mutant(
        "a saved view of an output is recomputed as the whole output", "ops/eager_recomputation.py",
        "return self.output.tensor(self).as_strided(self.size, self.stride, self.offset)", "return self.output.tensor(self)",
        (f"{RECOMPUTATION}::test_a_saved_view_of_an_output_is_recomputed_as_that_view",),
    ),
    Mutant(
        "the recomputed output is never freed", "ops/eager_recomputation.py",
        "if self.cached is not None and self.served >= self.views:", "if False:",
        (f"{RECOMPUTATION}::test_the_recomputed_output_is_freed_after_its_last_reader",),
    ),
)  # fmt: skip

OF_PATCHING = (
    Mutant(
        "a replaced norm calls our kernel on a device without float64", "patching/replacement.py",
        "    if lacks_float64(x.device):\n", "    if False:\n",
        (f"{PLATFORMS}::test_a_replaced_norm_runs_its_own_forward_on_a_device_without_float64",),
    ),
    Mutant(
        "norms are proven in fp32 and bf16 only", "patching/rule.py",
        "TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)",
        "TRAINING_DTYPES = (torch.float32, torch.bfloat16)",
        (f"{PROOF}::test_a_branch_that_computes_something_else_is_found[<lambda>-float16]",),
    ),
    Mutant(
        "a proof ignores the operators and compares only the outputs", "patching/probe.py",
        "return found == expected and is_close(", "return is_close(",
        (f"{PROOF}::test_another_way_to_take_the_root_is_not_replaced_even_if_its_bits_agree",),
    ),
    Mutant(
        "norms are proven only without gradients", "patching/states.py",
        "for grad in GRAD_MODES if every else GRAD_MODES[:2]:", "for grad in GRAD_MODES[:1]:",
        (f"{PROOF}::test_a_norm_with_another_eps_with_gradients_is_not_replaced",
         f"{PROOF}::test_a_norm_that_rounds_late_only_with_gradients_is_not_replaced"),
    ),
    Mutant(
        "mixed dtypes count as proven", "patching/coverage.py",
        "        if not all(probe.holds(spec, state, shape) for shape in probe.shapes for state in all_modes(pair))\n",
        "        if False\n",
        ("tests/patching/test_prove.py::test_the_dtypes_are_those_for_which_the_own_forward_is_not_needed",),
    ),
    Mutant(
        "a proof does not check that eps follows its attribute", "patching/eps_attribute.py",
        "if all(_follows(probe, spec, name, other) for other in sorted(others)):", "if True:",
        (f"{PROOF}::test_a_norm_that_changes_its_eps_before_use_is_not_replaced",),
    ),
    Mutant(
        "eps is read at the first call, not at each call", "patching/replacement.py",
        "        eps = getattr(self, eps_attribute, Absent)\n        if type(eps) is not float or not may_be_eps(eps):\n",
        "        eps = self.__dict__.setdefault('_eps', getattr(self, eps_attribute, Absent))\n"
        "        if type(eps) is not float or not may_be_eps(eps):\n",
        (f"{REPLACEMENT}::test_eps_is_read_at_each_call",),
    ),
    Mutant(
        "an attribute that changed since the proof is ignored", "patching/replacement.py",
        "        if not same:\n", "        if False:\n",
        (f"{REPLACEMENT}::test_a_changed_attribute_runs_its_own_forward",),
    ),
    Mutant(
        "inputs with an unproven number of dimensions run our kernel", "patching/replacement.py",
        "or x.dim() not in ranks or", "or",
        (f"{REPLACEMENT}::test_inputs_of_unproven_ranks_run_its_own_forward",),
    ),
    Mutant(
        "norms with different attributes share a proof", "patching/eligibility.py",
        "plain = {k: identity(v) if is_plain(v) else Absent for k, v in vars(module).items() if k != \"training\"}",
        "plain = {}",
        (f"{PROOF}::test_attributes_that_compare_equal_do_not_share_a_proof",),
    ),
    Mutant(
        "a bias is overlooked", "patching/eligibility.py",
        'if others := sorted(held - {"weight"}):', "if others := []:",
        (f"{PATCH}::test_a_norm_that_computes_something_else_is_not_replaced_and_the_report_says_why",),
    ),
    Mutant(
        "pickling loses the hints of patch", "patching/replacement.py",
        "arguments = self._rmsnorm_original, self._rmsnorm_rule, self._rmsnorm_hints",
        "arguments = self._rmsnorm_original, self._rmsnorm_rule",
        (f"{PATCH}::test_patched_models_are_copied_and_pickled",),
    ),
    Mutant(
        "unpatch leaves the norms replaced", "patching/patch.py",
        "        set_class(module, original_class(module))\n    inductor", "        pass\n    inductor",
        (f"{PATCH}::test_nothing_but_the_class_changes_and_unpatch_restores_it",),
    ),
    Mutant(
        "the candidates of a proof leave out late with an offset", "patching/spec_search.py",
        'for offset in (0.0, 1.0))]', 'for offset in (0.0,))]',
        (f"{PATCH}::test_proven_norms_compute_exact",),
    ),
    Mutant(
        "norms with a weight are proven to round the statistic first, as those without", "patching/spec_search.py",
        'return [Spec(eps), *(Spec(eps, "late", offset)', 'return [Spec(eps), Spec(eps, "first"), *(Spec(eps, "late", offset)',
        (f"{PROOF}::test_a_norm_that_rounds_its_statistic_first_is_proven_without_a_weight",),
    ),
    Mutant(
        "a norm without a weight that rounds its statistic first is no candidate", "patching/spec_search.py",
        'return [Spec(eps), Spec(eps, "first")]', "return [Spec(eps)]",
        (f"{PROOF}::test_a_norm_that_rounds_its_statistic_first_is_proven_without_a_weight",),
    ),
    Mutant(
        "a gated norm without a weight matches two specs that are the same", "patching/spec_search.py",
        'return [s for s in specs if s.cast == "early" or (s.gate is not None and not s.gate.first)]', "return specs",
        (f"{GATED_NORMS}::test_a_gated_norm_without_a_weight_is_proven",),
    ),
    Mutant(
        "gated norms are proven without the calls in which only the gate needs a gradient", "patching/coverage.py",
        "modes = GATED_GRAD_MODES if probe.gated else GRAD_MODES", "modes = GRAD_MODES",
        (f"{GATED_NORMS}::test_a_module_that_is_no_gated_norm_of_ours_is_left_with_a_reason",),
    ),
    Mutant(
        "gated norms count as proven in fp64, where no kernel computes them", "patching/coverage.py",
        "own = {p for p in probe.dtype_pairs(DTYPES) if probe.gated and torch.float64 in p} | failing",
        "own = set(failing)",
        (f"{GATED_NORMS}::test_a_call_that_was_not_proven_runs_its_own_forward",),
    ),
    Mutant(
        "a gate of another shape reaches our kernel", "patching/replacement.py",
        "    if gate is not None and (gate.shape != x.shape or gate.device != x.device):\n", "    if False:\n",
        (f"{GATED_NORMS}::test_a_call_that_was_not_proven_runs_its_own_forward",),
    ),
    Mutant(
        "a replaced gated norm fails in forward mode", "patching/replacement.py",
        "    if gate is None or torch.compiler.is_compiling() or not compat.in_forward_ad():\n", "    if True:\n",
        (f"{GATED_NORMS}::test_a_replaced_norm_runs_its_own_forward_in_forward_mode",),
    ),
    Mutant(
        "a gate from inference mode reaches our kernel", "patching/replacement.py",
        '    for name, t in (("input", x), ("gate", gate)):\n        if t is not None and t.is_inference():',
        '    for name, t in (("input", x),):\n        if t is not None and t.is_inference():',
        (f"{GATED_NORMS}::test_a_gate_from_inference_mode_that_reaches_a_trained_norm_runs_its_own_forward",),
    ),
    Mutant(
        "a replaced gated norm computes one group", "patching/replacement.py",
        "                x, gate, w, eps, cast=cast, activation=activation, gate_first=gate_first, groups=groups\n",
        "                x, gate, w, eps, cast=cast, activation=activation, gate_first=gate_first\n",
        (f"{GATED_NORMS}::test_the_attributes_of_a_gated_norm_decide_what_is_proven[Falcon-H1]",),
    ),
    Mutant(
        "an eps of None makes TorchRMSNorm run torch's own forward", "patching/torch_norm.py",
        "weighted, none_is_torch_eps=True,", "weighted, none_is_torch_eps=False,",
        (f"{TORCH_NORM}::test_our_kernel_runs",),
    ),
    Mutant(
        "an eps of None means another number than torch's", "patching/rule.py",
        "return torch.finfo(torch.float32).eps", "return 1e-6",
        (f"{TORCH_NORM}::test_our_kernel_runs", f"{REPLACEMENT}::test_an_eps_of_none_means_that_of_torch"),
    ),
    Mutant(
        "TorchRMSNorm has a kernel's bits where the weight is fp64", "patching/torch_norm.py",
        "for w in weights if torch.float64 in (x, w))", "for w in weights if x is torch.float64)",
        (f"{TORCH_NORM}::test_it_computes_what_patch_makes_of_the_class_of_torch[64-None-True]",),
    ),
    Mutant(
        "TorchRMSNorm keeps 16 bits under autocast on a GPU", "patching/replacement.py",
        '    return "autocast may cast its input"\n', "    return None\n",
        (f"{TORCH_NORM}::test_on_a_gpu_the_output_has_torchs_dtype_under_autocast",),
    ),
    Mutant(
        "TorchRMSNorm takes an eps that is a bool", "patching/torch_norm.py",
        "if eps is not None and (isinstance(eps, bool) or not isinstance(eps, numbers.Real)):",
        "if eps is not None and not isinstance(eps, numbers.Real):",
        (f"{BAD_INPUT}::test_an_argument_of_a_wrong_type_raises_with_the_name_of_the_function_or_class",),
    ),
)  # fmt: skip

OF_PUBLIC_FUNCTIONS = (
    Mutant(
        "rms_norm ignores a small eps", "functional.py",
        "        y = host.norm(x, None, weight, eps, cast, offset)\n",
        "        y = host.norm(x, None, weight, eps if eps > 1e-20 else 0.0, cast, offset)\n",
        (f"{GENERATED}::test_rms_norm_has_the_bits_of_the_reference",),
    ),
    Mutant(
        "a residual of another dtype is read in the dtype of x", "kernels/plan.py",
        "if residual is None or residual.dtype is x.dtype:", "if True:",
        (f"{GENERATED}::test_add_rms_norm_has_the_bits_of_the_reference",),
    ),
    Mutant(
        "two norms in one call share the weight of the first", "ops/pairs.py",
        "xs[i], weights[i], xs[i + 1], weights[i + 1], float(eps)",
        "xs[i], weights[i], xs[i + 1], weights[i], float(eps)",
        (f"{GENERATED}::test_rms_norms_has_the_bits_of_the_reference_for_each_norm",),
    ),
    Mutant(
        "explain does not look at the weight's dtype", "kernels/dispatch.py",
        'for name, dtype in (("x", x), ("residual", residual), ("weight", w)):',
        'for name, dtype in (("x", x), ("residual", residual)):',
        (f"{GENERATED}::test_explain_says_in_one_line_who_computes_any_valid_call",),
    ),
    Mutant(
        "the gate of a row with gaps is read with the strides of x in the backward pass", "kernels/cpu/gated_kernels.py",
        "start_of(layout, SECOND, m), start_of(layout, THIRD, m)", "start_of(layout, SECOND, m), start_of(layout, SECOND, m)",
        (f"{GENERATED}::test_gated_rms_norm_has_the_bits_of_the_reference",),
    ),
    Mutant(
        "a layer forgets its offset", "modules.py",
        'x, self.weight, self.eps, cast=self.cast, offset=self.offset, variance_size=self.variance_size\n        )  # fmt: skip', 'x, self.weight, self.eps, cast=self.cast, variance_size=self.variance_size\n        )  # fmt: skip',
        (f"{GENERATED}::test_layers_have_the_bits_of_the_functions",),
    ),
    Mutant(
        "the context casts before it multiplies by the weight", "patching/torch_norm.py",
        '"late" if weighted else "early", 0.0, "eps"', '"early", 0.0, "eps"',
        (f"{GENERATED}::test_torchs_function_has_the_bits_of_the_reference_in_the_context",),
    ),
    Mutant(
        "the recomputed output has another eps", "ops/eager_recomputation.py",
        "rows, None, w, self.eps, self.cast, self.offset, False", "rows, None, w, 1e-5, self.cast, self.offset, False",
        (f"{GENERATED}::test_recomputed_outputs_give_the_same_gradients",),
    ),
    Mutant(
        "a replaced norm has another eps than it was proven with", "patching/replacement.py",
        "return by_kernel(self, x, w, eps)\n        return _in_memory_order",
        "return by_kernel(self, x, w, eps * 2)\n        return _in_memory_order",
        (f"{GENERATED}::test_what_is_proven_of_a_module_is_what_it_computes_when_replaced",),
    ),
)  # fmt: skip

OF_COSTS = (
    Mutant(
        "rstd is not among the bytes that are saved", "costs/ours.py",
        "return case.E * case.x_dtype.itemsize + (case.M * F32.itemsize if case.training else 0)",
        "return case.E * case.x_dtype.itemsize",
        (f"{COST}::test_the_counts_of_8192_by_1280_are_those_worked_out_by_hand",),
    ),
    Mutant(
        "the conversion of a weight on a CPU is not counted", "costs/ours.py",
        "read = tape.cast(w, _dtype_as_read(case, w.dtype))", "read = w",
        (f"{COST}::test_every_count_equals_a_trace_of_the_running_code[ours-early-0-bfloat16-float32]",
         f"{COST}::test_every_count_equals_a_trace_of_the_running_code[ours-early-0-float32-bfloat16]"),
    ),
    Mutant(
        "partial sums of dw are counted as the kernel made fewer", "costs/ours.py",
        "rows = case.heads * max(32,", "rows = case.heads * max(64,",
        (f"{COST}::test_the_number_of_partial_sums_is_that_of_the_cpu_kernel",),
    ),
    Mutant(
        "FLOPs leave out the residual", "costs/ours.py",
        "per_element = 3 + (case.w_dtype is not None) + case.adds", "per_element = 3 + (case.w_dtype is not None)",
        (f"{COST}::test_the_flops_of_our_kernels_are_those_of_the_reference[True-early-0.0-True]",),
    ),
    Mutant(
        "the weights of several heads count as one", "costs/case.py",
        "return self.heads * self.N", "return self.N",
        (f"{COST}::test_heads_with_weights_of_their_own_have_so_many_parameters",),
    ),
    Mutant(
        "the least bytes leave out the sum with the residual", "costs/counts.py",
        "return x + residual + weight + y + s + rstd", "return x + residual + weight + y + rstd",
        (f"{COST}::test_the_least_is_every_argument_and_result_once[dtype0]",),
    ),
    Mutant(
        "the moments of a master copy have the weight's dtype", "costs/counts.py",
        "return 3 * _tensors(case) * case.W * F32.itemsize + counters",
        "return _tensors(case) * case.W * F32.itemsize + 2 * _parameter_bytes(case) + counters",
        (f"{COST}::test_master_weights_and_their_moments_are_fp32",),
    ),
    Mutant(
        "recompute still counts y as allocated before the backward pass", "costs/counts.py",
        "tape.alive - (case.y_nbytes if case.recompute else 0)", "tape.alive",
        (f"{COST}::test_recompute_adds_a_forward_call_to_the_backward_pass_and_frees_y",),
    ),
    Mutant(
        "programs on a GPU that share a row exchange nothing", "costs/ours.py",
        "    if config.parts < 2:\n", "    if True:\n",
        (f"{COST}::test_ours_on_cuda_follows_the_launch_configuration",),
    ),
    Mutant(
        "eager code keeps the rows that it has cast for free", "costs/eager.py",
        "return sum(array.nbytes for array in [h, rstd, *saved])", "return sum(array.nbytes for array in [rstd, *saved])",
        (f"{COST}::test_the_counts_of_8192_by_1280_are_those_worked_out_by_hand",),
    ),
    Mutant(
        "bytes that are kept are counted in the backward pass again", "tools/cost/result.py",
        'forward = count if phase == "forward" else 0', "forward = count",
        (f"{MODEL_COST}::test_totals_are_sums_over_the_norms",),
    ),
    Mutant(
        "queries of a model that does not run get as many rows as keys", "tools/cost/calls.py",
        'return tokens * (heads if last.startswith("q_") else size_of(config, "num_key_value_heads") or heads)',
        'return tokens * (size_of(config, "num_key_value_heads") or heads)',
        (f"{MODEL_COST}::test_rows_of_a_model_that_does_not_run_are_guessed_with_a_note",),
    ),
    Mutant(
        "all experts of a layer are counted for each token", "tools/cost/sizes.py",
        "met += p.numel() * used // experts if routed else p.numel()", "met += p.numel()",
        (f"{MODEL_COST}::test_only_the_experts_that_a_token_uses_are_counted",),
    ),
    Mutant(
        "a training step has the matrix products of a forward pass", "tools/cost/result.py",
        "return (3 if training else 1) * self.matmul_flops", "return self.matmul_flops",
        (f"{MODEL_COST}::test_a_training_step_has_three_times_the_matrix_products_of_a_forward_pass",),
    ),
)  # fmt: skip

OF_PREDICTION = (
    Mutant(
        "each call of a norm is predicted with the rows of all calls", "tools/report/prediction.py",
        "(n.rows // n.calls, n.width)", "(n.rows, n.width)",
        (f"{PREDICTION}::test_the_work_of_a_norm_is_what_cost_counts_for_one_call",),
    ),
    Mutant(
        "a training step is predicted without its forward pass", "tools/report/prediction.py",
        '"training": ("forward", "backward")', '"training": ("backward",)',
        (f"{PREDICTION}::test_the_work_of_a_norm_is_what_cost_counts_for_one_call",),
    ),
    Mutant(
        "a norm without a weight is predicted with one", "tools/report/prediction.py",
        "offset=spec.offset, elementwise_affine=weight is not None,", "offset=spec.offset,",
        (f"{PREDICTION}::test_the_work_of_a_norm_is_what_cost_counts_for_one_call",),
    ),
    Mutant(
        "several kernels are predicted to take one launch", "tools/report/prediction.py",
        "return work.kernels * self.launch + work.moved", "return self.launch + work.moved",
        (f"{PREDICTION}::test_a_prediction_is_bytes_at_a_rate_and_a_launch_for_each_kernel",),
    ),
    Mutant(
        "a norm that is called twice is predicted once", "tools/report/prediction.py",
        "seconds += n.calls * rate.seconds(work)", "seconds += rate.seconds(work)",
        (f"{PREDICTION}::test_a_prediction_is_bytes_at_a_rate_and_a_launch_for_each_kernel",),
    ),
    Mutant(
        "a sum of predictions leaves out the norms that are not counted", "tools/report/prediction.py",
        "        if work is None or rate is None:\n            return None\n        seconds",
        "        if work is None or rate is None:\n            continue\n        seconds",
        (f"{PREDICTION}::test_what_is_not_counted_has_no_work_and_no_prediction",),
    ),
    Mutant(
        "the error of a prediction is relative to the predicted time", "tools/report/prediction.py",
        "return self.predicted / self.measured - 1 if self.measured else None",
        "return 1 - self.measured / self.predicted if self.measured else None",
        (f"{PREDICTION}::test_a_prediction_is_bytes_at_a_rate_and_a_launch_for_each_kernel",),
    ),
    Mutant(
        "a launch is predicted to take less than no time", "tools/report/prediction.py",
        "return (max(0.0, fixed), 1 / per_byte)", "return (fixed, 1 / per_byte)",
        (f"{PREDICTION}::test_the_line_of_copies_never_begins_below_zero",),
    ),
    Mutant(
        "copies move twice as many bytes as they are said to", "tools/report/prediction.py",
        "(size // 2) for size in dict.fromkeys(sizes)", "(size) for size in dict.fromkeys(sizes)",
        (f"{PREDICTION}::test_copies_reach_from_a_small_one_to_the_most_that_a_norm_moves",),
    ),
)  # fmt: skip

MUTANTS = (
    *OF_REFERENCE, *OF_ARGUMENTS, *OF_CPU_KERNELS, *OF_PLANS, *OF_GPU_KERNELS, *OF_GATED, *OF_SANDWICHES, *OF_PAIRS,
    *OF_PARTS, *OF_HEADS_AND_SLICES, *OF_HOST, *OF_OPERATORS, *OF_PATCHING, *OF_PUBLIC_FUNCTIONS, *OF_COSTS,
    *OF_PREDICTION,
)  # fmt: skip
