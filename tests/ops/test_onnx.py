"""torch.onnx.export writes every norm as plain arithmetic, and ONNX Runtime then computes RMSNorm."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm import gated_reference, reference
from rmsnorm.spec import Gate
from tolerance import assert_same_bits, published_y

onnx = pytest.importorskip("onnx", reason="the ONNX exporters need the package onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the exported graphs run in the package onnxruntime")

N, EPS = 48, 1e-3  # as large as the mean of the squares of x, so that an eps that is lost is noticed


class PublishedRMSNorm(nn.Module):
    """The form of the published classes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.clone()), EPS

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class EveryNorm(nn.Module):
    """One output for each way to call a norm, and last the sum of add_rms_norm."""

    def __init__(self, weight: Tensor, torchs: bool) -> None:
        super().__init__()
        self.torchs = torchs  # whether to call TorchRMSNorm; torch cannot write its own class for TorchScript
        self.own, self.deepseek = rmsnorm.RMSNorm(N, EPS), rmsnorm.DeepseekV2RMSNorm(N, EPS)
        self.like_torchs = rmsnorm.TorchRMSNorm(N, EPS)
        for norm in (self.own, self.deepseek, self.like_torchs):
            norm.load_state_dict({"weight": weight})
        self.patched = PublishedRMSNorm(weight)
        assert len(rmsnorm.patch(self).replaced) == 1
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (
            self.patched(x),
            self.own(x),
            self.deepseek(x),
            self.like_torchs(x) if self.torchs else self.own(x),
            rmsnorm.rms_norm(x, None, EPS),
            rmsnorm.rms_norm(x, self.weight, EPS, cast="late", offset=1.0),
            rmsnorm.gated_rms_norm(x, residual, self.weight, EPS, gate_first=True, groups=2),
            *rmsnorm.add_rms_norm(x, residual, self.weight, EPS),
        )


def true_outputs(x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
    of_x = [reference.truth(x, w, EPS, offset) for w, offset in ((weight, 0.0), (None, 0.0), (weight, 1.0))]
    gated = gated_reference.truth(x, residual, weight, EPS, Gate(first=True), groups=2)
    return [*of_x[:1] * 4, *of_x[1:], gated, reference.truth(x + residual, weight, EPS, 0.0)]


def exported(model: nn.Module, inputs: tuple[Tensor, ...], way: str) -> bytes:
    """The ONNX file of a model whose number of rows is dynamic."""
    rows = ({0: torch.export.Dim("rows")},) * len(inputs)
    buffer = io.BytesIO()
    if way == "torchscript":
        names = ["x", "residual"]
        torch.onnx.export(
            model, inputs, buffer, dynamo=False, input_names=names, dynamic_axes={name: {0: "rows"} for name in names}
        )
        return buffer.getvalue()
    pytest.importorskip("onnxscript", reason="this ONNX exporter needs the package onnxscript")
    if way == "dynamo":
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=rows, verbose=False)
    else:
        ours = torch.export.export(model, inputs, dynamic_shapes=rows)
        program = torch.onnx.export(ours.run_decompositions(rmsnorm.decompositions()), dynamo=True, verbose=False)
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["dynamo", "torchscript", "an exported program, decomposed"])
def test_every_norm_in_onnx_runtime_computes_the_formula(way: str, randn: Any) -> None:
    weight = randn(N)
    model = EveryNorm(weight, torchs=way != "torchscript").eval()
    file = exported(model, (randn(4, N), randn(4, N)), way)
    operators = {(node.domain, node.op_type) for node in onnx.load_from_string(file).graph.node}
    assert {domain for domain, _ in operators} <= {"", "ai.onnx"}, operators
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for rows in (1, 4, 9):
        x, residual = randn(rows, N, scale=EPS**0.5), randn(rows, N)
        names = [one.name for one in session.get_inputs()]
        *got, s = map(torch.from_numpy, session.run(None, dict(zip(names, (x.numpy(), residual.numpy()), strict=True))))
        assert_same_bits(s, x + residual)
        for i, (y, expected) in enumerate(zip(got, true_outputs(x, residual, weight), strict=True)):
            off = ((y.double() - expected).abs() / expected.abs()).max().item()
            assert off <= published_y(N), f"{way}, output {i} is off by {off}"


@pytest.mark.filterwarnings("ignore")
def test_invalid_arguments_raise_our_error_when_exported(randn: Any) -> None:
    layer = rmsnorm.RMSNorm(N)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight has shape"):
        torch.onnx.export(layer, (randn(4, N - 1),), io.BytesIO(), dynamo=False)
