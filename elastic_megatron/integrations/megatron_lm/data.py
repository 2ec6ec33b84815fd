"""Megatron-LM's data under its own flags, with samples that know their place in the data order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_tokenizer
from megatron.training.utils.common_utils import get_blend_and_blend_per_split
from torch.utils.data import Dataset

from ...data.blend import BATCH_KEYS
from ...data.index_cache import building


class Numbered(Dataset):
    """A dataset whose samples also hold their index, as ``sample``.

    With Megatron's sequential sampler that is the place in the data order: what is drawn for a sample can then
    depend on nothing else.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        # Megatron's loader takes the batch size of evaluation for the splits that say so
        self.split = getattr(samples, "split", getattr(samples, "index_split", None))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {key: sample[key] for key in BATCH_KEYS} | {"sample": index}


def build_datasets(args: Any, sizes: Sequence[int | None], seq_length: int) -> list[Any]:
    """(train, valid, test) by Megatron's data flags, ``None`` where there is none; every rank must call."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, list(sizes), lambda: True, config)
    cache = args.data_cache_path
    with building(Path(cache)) if cache is not None else nullcontext():
        return list(builder.build())
