"""GPUs by name, for estimates: memory, and peak dense BF16 rate. From NVIDIA's data sheets, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """``memory`` in GiB as the driver reports it, rounded down; ``tflops``: 1e12 dense BF16 operations a second."""

    memory_gib: float
    bf16_tflops: float


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(39, 312),
    "a100-80gb": Gpu(79, 312),
    "h100-80gb": Gpu(79, 989),
    "h200": Gpu(139, 989),
    "b200": Gpu(178, 2250),
    "gb200": Gpu(184, 2450),
    "l40s": Gpu(44, 362),
}
