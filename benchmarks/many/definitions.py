"""What is measured: cases of norms, sizes, plans, and the options of a run."""

from dataclasses import dataclass, replace

import torch

from rmsnorm.spec import Cast
from rmsnorm.tools.verify.cases import VerifyCase
from whole_models.definitions import MODELS

BITS, NORMS, STEPS = SECTIONS = "bits", "norms", "steps"
LEFT_OUT = "left_out"  # plans that a model does not fit

# How a model is spread over the ranks.
FSDP, SEQUENCE, FSDP_AND_TENSOR = PLANS = "FSDP2", "sequence parallel", "FSDP2 × TP"
LAYERS = 12
(_LLAMA,) = (model for model in MODELS if model.name == "llama")
MODEL = replace(_LLAMA, tiny=_LLAMA.tiny | {"num_attention_heads": 8, "num_key_value_heads": 8})

# A sharding of norms that `rmsnorm verify` does not have: FSDP2 shards the weight, and each rank has its own rows.
BY_FSDP = "FSDP2"
_SPECS: tuple[tuple[torch.dtype, Cast, float], ...] = (
    (torch.bfloat16, "early", 0.0),
    (torch.bfloat16, "late", 1.0),
    (torch.float32, "late", 0.0),
)

# What is timed of a norm, by the name in tables and JSON.
WHOLE, ROWS, COLUMNS, PART, REDUCE = "one GPU, whole rows", "by rows", "by columns", "a part's kernel", "all-reduce"


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        tiny: Whether sizes are so small that a CPU takes only seconds.
        sections: Those of SECTIONS that are measured.
        plans: Those of PLANS that are measured.
        repetitions: The number of samples of each call.
        batch: The number of sequences of a step, for each rank along the data-parallel dimension.
        tokens: The length of a sequence.
        layers: The number of layers of the model.
    """

    tiny: bool
    sections: tuple[str, ...]
    plans: tuple[str, ...]
    repetitions: int
    batch: int
    tokens: int
    layers: int

    def bit_cases(self) -> list[VerifyCase]:
        """Return the norms whose bits are compared, without a sharding: each spec with and without a residual."""
        rows, widths = (24, (67,)) if self.tiny else (512, (2048, 7168, 8192, 16384))
        return [
            VerifyCase(dtype, dtype, cast, offset, rows, N, residual=residual)
            for N in widths
            for dtype, cast, offset in _SPECS
            for residual in (None, dtype)
        ]

    def timed_shapes(self) -> list[tuple[int, int]]:
        """Return the rows and the width of the norms that are timed, in bf16."""
        return [(16, 64)] if self.tiny else [(8192, 16384), (16384, 7168)]
