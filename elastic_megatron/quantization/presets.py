"""Which linears are quantised, as data: ModelOpt's configurations by name, told by block. No torch, no ModelOpt.

``tests/training/test_quantised_leaves.py`` compares with what ModelOpt's own conversion enables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Block = Literal["mamba", "attention", "mlp", "experts", "shared_experts"]
BLOCKS: frozenset[Block] = frozenset(("mamba", "attention", "mlp", "experts", "shared_experts"))


@dataclass(frozen=True)
class Preset:
    """A family of ModelOpt configurations (modelopt/torch/quantization/config.py, 0.47), one a format.

    Args:
        configs: by format, the name in ``modelopt.torch.quantization``.
        blocks: whose linears they quantise; embeddings, convolutions, the moe_router and the head never are.
    """

    configs: Mapping[str, str]
    blocks: frozenset[Block]


PRESETS: Mapping[str, Preset] = {
    "default": Preset({"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}, BLOCKS),
    "mamba_moe_aggressive": Preset(
        {"fp8": "MAMBA_MOE_FP8_AGGRESSIVE_CFG", "nvfp4": "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG"}, BLOCKS - {"attention"}
    ),
    "mamba_moe_conservative": Preset(
        {"fp8": "MAMBA_MOE_FP8_CONSERVATIVE_CFG", "nvfp4": "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG"},
        BLOCKS - {"attention", "mamba"},
    ),
}  # fmt: skip


def block_of(symbol: str, layout_name: str) -> Block:
    """The block that a linear of a layer belongs to, by the fact table's name of its weight."""
    if symbol == "E":
        return "shared_experts" if "shared_experts" in layout_name else "experts"
    blocks: dict[str, Block] = {"M": "mamba", "*": "attention", "-": "mlp"}
    return blocks[symbol]
