"""The steps of the check, the largest risk first; together they end within 12 minutes, whatever hangs."""

from __future__ import annotations

from gpu.bench import Step

STEPS = (
    Step("environment", "versions, devices, kernels that import", "gpu.environment:environment", 50),
    Step("router", "expert router's GEMM: strided against dense", "gpu.kernels:router", 45),
    Step("mamba", "scan, convolution and gated norm against torch", "gpu.kernels:mamba", 90),
    Step("layers", "a layer of each kind: masked = sliced = exported", "gpu.layers:layers", 90),
    Step("training", "distributed optimizer, overlap, recomputation; fused gradients on and off",
         "gpu.training:training", 100),
    Step("speed", "time and memory of soft, sliced and stock steps", "gpu.speed:speed", 90),
    Step("quantized", "NVFP4: calibration and distillation, attention backend", "gpu.quantized:quantized", 100),
    Step("checkpoints", "save, kill, resume; Transformer Engine to local and back", "gpu.checkpoints:checkpoints",
         100),
    Step("ranking", "rank and sort", "gpu.ranking:ranking", 50),
)  # fmt: skip
