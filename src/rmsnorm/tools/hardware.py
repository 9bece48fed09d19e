"""The published peak figures of GPUs, for dense matrices, and the share of them that our kernels reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The published peak figures of a GPU.

    Attributes:
        name: Its name.
        bandwidth: Bytes of memory per second.
        matmul: FLOP per second of a dense 16-bit matrix product.
        source: Where the figures were published.
        few_fp64: Whether its fp64 rate is 1/32 of its fp32 rate or less.
    """

    name: str
    bandwidth: float
    matmul: float
    source: str
    few_fp64: bool = False


# If a data sheet gives 16-bit FLOP with sparsity only, this is half of that.
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


@dataclass(frozen=True)
class Fit:
    """What our kernels reach on a GPU, fitted to times of the forward pass: launch + bytes / (efficiency · bandwidth).

    Attributes:
        gpu: The GPU, a key of `GPUS`.
        efficiency: The share of its published bandwidth.
        launch: The seconds that a kernel takes besides moving its bytes.
        source: The file with the measurements.
    """

    gpu: str
    efficiency: float
    launch: float
    source: str


# By torch's name of the GPU. A test compares each fit with its source.
FITTED: dict[str, Fit] = {
    "NVIDIA H200": Fit("h200", 0.872, 5.42e-6, "the line of ours in benchmarks/results/bench-cuda.json"),
}
