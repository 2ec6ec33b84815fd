"""Run in a process of its own: quantise a small Megatron model with ModelOpt, and export it with ModelOpt's exporter.

    python modelopt_oracle.py FOLDER

writes ``FOLDER/bf16_NAME``, as we export the model, and ``FOLDER/NAME``, as ModelOpt does, for each format. On a CPU
ModelOpt can calibrate NVFP4 and pack it, but not run it: no quantised forward is needed here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from hf_files import write_hf
    from modelopt.torch.export import export_mcore_gpt_to_hf
    from quantised_dirs import EXPORTED, family

    from elastic_megatron import runtime
    from elastic_megatron.blocks import build_model
    from elastic_megatron.checkpoint.slice import weights

    runtime.start(seed=1)
    tokens = torch.randint(0, EXPORTED.vocab_size, (4, 16), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(16).expand_as(tokens)
    configs = {"fp8": mtq.MAMBA_MOE_FP8_AGGRESSIVE_CFG, "nvfp4": mtq.MAMBA_MOE_NVFP4_AGGRESSIVE_CFG}
    for name, config in configs.items():
        model = build_model(EXPORTED, dtype=torch.bfloat16).eval()
        plain = folder / f"bf16_{name}"
        write_hf(plain, family(EXPORTED), weights(model.state_dict()).items(), elastic=True)
        with torch.no_grad():
            mtq.quantize(
                model,
                config,
                lambda m: [m((tokens + i) % EXPORTED.vocab_size, positions, None) for i in range(5)],
            )
        export_mcore_gpt_to_hf(
            model, str(plain), dtype=torch.bfloat16, export_dir=str(folder / name), moe_router_dtype="fp32"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
