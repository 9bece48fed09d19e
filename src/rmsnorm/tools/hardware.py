"""What GPUs can do at most, as their makers publish it. Peaks of dense matrices, not of sparse ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes of memory a second; matmul: 16-bit FLOP a second, dense; few_fp64: 1/32 of fp32 or less."""

    name: str
    bandwidth: float
    matmul: float
    source: str
    few_fp64: bool = False


# Where the sheet gives 16-bit FLOPs with sparsity alone, this is half of them.
GPUS: dict[str, Gpu] = {
    "h200": Gpu("H200 SXM", 4.8e12, 989.5e12, "nvidia.com/en-us/data-center/h200, specifications"),
    "h100": Gpu("H100 SXM", 3.35e12, 989.5e12, "nvidia.com/en-us/data-center/h100, specifications"),
    "h100-pcie": Gpu("H100 PCIe", 2.0e12, 756.5e12, "NVIDIA H100 Tensor Core GPU datasheet, PCIe"),
    "a100": Gpu("A100 80GB SXM", 2.039e12, 312e12, "NVIDIA A100 80GB datasheet"),
    "a100-40gb": Gpu("A100 40GB SXM", 1.555e12, 312e12, "NVIDIA A100 40GB datasheet"),
    "b200": Gpu("B200 SXM", 8.0e12, 2250e12, "NVIDIA DGX B200 datasheet, an eighth of the system"),
    "l40s": Gpu("L40S", 0.864e12, 362e12, "NVIDIA L40S datasheet", few_fp64=True),
    "l4": Gpu("L4", 0.3e12, 121e12, "NVIDIA L4 datasheet", few_fp64=True),
    "rtx4090": Gpu("GeForce RTX 4090", 1.008e12, 165.2e12, "NVIDIA Ada GPU architecture whitepaper", few_fp64=True),
}
