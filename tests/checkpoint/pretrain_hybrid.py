"""Megatron-LM's own pretraining of a hybrid model on its mock data: nothing of this project but a stack for CPUs."""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    # imported here: writers of checkpoints may import this file again
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from elastic_megatron import runtime

    args = parse_and_validate_args()
    model = hybrid_config_from_args(args)
    model.hybrid_stack_spec = runtime.hybrid_stack_spec()
    pretrain(
        pretrain_cfg_container_from_args(args, model), _datasets, ModelType.encoder_or_decoder, _forward_step
    )


def _datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=None, blend_per_split=[None, None, None],
        split="99,1,0", num_dataset_builder_threads=1, path_to_cache=None, tokenizer=build_tokenizer(args),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


_datasets.is_distributed = True  # type: ignore[attr-defined]


def _forward_step(batches: Any, model: Any) -> Any:
    import torch

    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(values: Any) -> Any:
        mask = batch["loss_mask"].view(-1).float()
        total, tokens = (values.view(-1).float() * mask).sum(), mask.sum().to(torch.int)
        return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}

    return output, loss


if __name__ == "__main__":
    main()
    sys.exit(0)
