"""Run in a process of its own: quantise a small Megatron model with ModelOpt, and export it with ModelOpt's exporter.

    python modelopt_oracle.py FOLDER

writes ``FOLDER/bf16_NAME``, as we export the model, ``FOLDER/NAME``, as ModelOpt does, and ``FOLDER/run_NAME``, a
checkpoint of ours with the magnitudes that ModelOpt found, for each format. On a CPU ModelOpt can calibrate NVFP4 and
pack it, but not run it: no quantised forward is needed here.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from elastic_megatron.checkpoint.amax import Amax

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from hf_files import write_hf
    from modelopt.torch.export import export_mcore_gpt_to_hf
    from quantised_dirs import EXPORTED, family

    from elastic_megatron import runtime
    from elastic_megatron.blocks import build_model
    from elastic_megatron.checkpoint.distributed import save
    from elastic_megatron.checkpoint.quantised_plan import planned
    from elastic_megatron.ops.locate import weights
    from elastic_megatron.quantization.formats import FORMATS
    from elastic_megatron.quantization.presets import PRESETS

    runtime.start(seed=1)
    tokens = torch.randint(0, EXPORTED.vocab_size, (4, 16), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(16).expand_as(tokens)
    preset = PRESETS["mamba_moe_aggressive"]
    for form in FORMATS.values():
        model = build_model(EXPORTED, dtype=torch.bfloat16).eval()
        plain = build_model(EXPORTED, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        bf16 = folder / f"bf16_{form.name}"
        write_hf(bf16, family(EXPORTED), weights(model.state_dict()).items(), elastic=True)
        with torch.no_grad():
            mtq.quantize(
                model,
                getattr(mtq, preset.configs[form.name]),
                lambda m: [m((tokens + i) % EXPORTED.vocab_size, positions, None) for i in range(5)],
            )
        quantised = planned(form, EXPORTED, preset.blocks, keep_feeding_mamba=False, version="0.47.0")
        manifest = replace(family(EXPORTED), quantised=quantised)
        save(folder / f"run_{form.name}", 0, [plain], manifest, hf_files=bf16, amax=found(model))
        export_mcore_gpt_to_hf(
            model,
            str(bf16),
            dtype=torch.bfloat16,
            export_dir=str(folder / form.name),
            moe_router_dtype="fp32",
        )


def found(model: nn.Module) -> dict[str, Amax]:
    """The magnitudes of ModelOpt's quantisers."""
    from elastic_megatron.checkpoint.amax import Amax

    return {
        f"{name}.weight": Amax(
            module.weight_quantizer.amax.reshape(()), module.input_quantizer.amax.reshape(())
        )
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
