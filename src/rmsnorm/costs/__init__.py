"""Exact counts of what a norm costs: `counts` has the public function, the other modules the formulas it adds up.

counts       Cost and cost: the public function, and the figures that follow from the arguments alone
  ours         our kernels            eager        the published classes, operator by operator
  torch_norms  F.rms_norm, LayerNorm
tape         the record that the formulas write: operators, bytes, what is allocated
case         one call whose cost is asked for, and the check of its arguments
flops        the FLOP formulas of our operators for torch's FlopCounterMode
"""
