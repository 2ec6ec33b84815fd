"""Configuration of a Nemotron-H model whose layers differ in width.

Written by elastic_megatron beside the weights of such a model, because vLLM, which asks the config of a
``nemotron_h_puzzle`` model for that of each layer, has no class for it. Nothing here depends on elastic_megatron.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import NemotronHConfig


class NemotronHPuzzleConfig(NemotronHConfig):
    """``nemotron_h`` plus ``block_configs``: for each layer its ``block_type`` and the fields that are its own.

    The same fields of the model hold the largest value of all layers.
    """

    model_type = "nemotron_h_puzzle"
    block_configs: list[dict[str, Any]] | None = None

    def get_nemotron_h_config_for_layer(self, layer_idx: int) -> NemotronHConfig:
        """The config that the layer would have in a model of equal layers."""
        own = copy.copy(self)
        for name, value in (self.block_configs or [])[layer_idx].items():
            if name != "block_type":
                setattr(own, name, value)
        return own
