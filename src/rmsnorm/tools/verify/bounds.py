"""The bounds of the contract that `rmsnorm verify` checks, each with its derivation."""

import math

import torch

FP32_ULP = 2.0**-23

# Outputs of random rows (y, x + residual, dx) whose bits may differ from those of the exact arithmetic.
DIFFERING = 0

# Share of outputs that may differ from the class run eagerly. The class's fp32 statistic makes rstd differ by one or
# two ulp in some rows, which moves an output across a rounding boundary of the 16-bit dtype at about 2⁻¹⁶ (bf16) or
# 2⁻¹³ (fp16) of the positions. The share is a mean over many rows: samples of fewer than SHARE_OUTPUTS outputs get an
# allowance for chance.
EAGER_SHARE = {torch.bfloat16: 1e-5, torch.float16: 8e-5}
SHARE_OUTPUTS = 10_000_000

# By how many ulp an output may differ from the class run eagerly. With the early cast, one ulp of cast(h) is multiplied
# by a weight whose significand is in [1, 2), which gives less than two ulp of y. With the first cast, which is verified
# without a weight, one ulp of the statistic is multiplied by x in the same way.
EAGER_ULP = {"early": 2, "late": 1, "first": 2}

# Largest allowed ratio of a gradient's relative L2 error to eager's. It is only checked for samples of at least
# GRADIENT_ELEMENTS elements and GRADIENT_ROWS rows: rstd is rounded once a row, and in fp32 the error of a gradient
# depends on that rounding.
GRADIENT_RATIO = {torch.float32: 1.1, torch.bfloat16: 1.0, torch.float16: 1.0}
GRADIENT_ELEMENTS, GRADIENT_ROWS = 1 << 16, 256

# Added to the ratio where eager, too, rounds the gradient to 16 bits only once (late cast; dw of one row). Both errors
# are then that one rounding, and chance decides which is larger: rounding two numbers that are δ apart changes the
# square of the error by δ². δ is at most 8 fp32 ulp against 2⁻¹² of fp16, hence 2⁻¹⁶ of the error.
TIE = 2.0**-16
# Added instead for dw with the early cast if the weight is wider than x. Both sides then sum dy·cast(h) without
# rounding it. The casts are equal except for EAGER_SHARE of them, which are one ulp apart while an error is ulp/√12:
# √(12·share) of the error, with a random sign for each element of dw; this is five standard deviations of the sum.
CAST_TIE = {dtype: 5 * math.sqrt(12 * share / GRADIENT_ELEMENTS) for dtype, share in EAGER_SHARE.items()}

# For N < NARROW, dx is a difference that cancels (completely at N = 1). An error of NARROW_ERROR relative to what is
# subtracted, ‖rstd·dy·w‖ for dx and Σ|dy·xh| for dw, is allowed whatever eager's error is.
NARROW, NARROW_ERROR = 16, 8 * FP32_ULP

# Constructed rows, whose statistic lies on a rounding boundary: v may differ by one ulp, then rstd by one, and h and y
# by at most two each. In ulp of the row's largest number, because where g = 0 all of dx is the rounding of the sum.
CONSTRUCTED_ULP = 4
