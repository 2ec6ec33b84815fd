"""Token files to batches: Megatron's blended ``GPTDataset``, indexed by how many samples were consumed.

The data order is a pure function of (data, blend, seed, seq_length, num_samples) and of the number of
samples consumed so far: no loader state exists, so a resumed run needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from elastic_megatron.data.index_cache import building
from elastic_megatron.data.token_files import check_prefix
from elastic_megatron.errors import UserError, of_os_error

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")

_DIGEST_WHOLE_BYTES = 16 << 20
_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_BYTES = 16 << 10


@dataclass(frozen=True)
class _DatasetTokenizer:
    """All that ``GPTDataset`` asks of a tokenizer. Having no ``pad``, no token of the data is masked out."""

    eod: int
    vocab_size: None = None
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


def build_dataset(
    blend: Sequence[tuple[float, str]],
    *,
    seq_length: int,
    num_samples: int,
    seed: int,
    cache_dir: str | Path,
    tokenizer_eod: int,
) -> Dataset:
    """At least ``num_samples`` samples of ``seq_length`` tokens from prefixes mixed by weight.

    ``blend`` holds (weight, prefix) pairs; weights need not sum to one. Documents are concatenated and
    shuffled as by ``megatron/core/datasets/gpt_dataset.py``; attention and positions run across document
    ends. Index files are kept under ``cache_dir`` in a folder named by the digest of the data, so that
    newly prepared data never meets an old index; under torch.distributed rank 0 writes them, so
    ``cache_dir`` must be shared, and every rank must call.

    Raises ``UserError`` for missing, damaged or empty files and for weights that are not positive, and as
    ``index_cache.building``.
    """
    assert seq_length > 0 and num_samples > 0
    if not blend:
        raise UserError("data.blend is empty; give at least one [weight, prefix]")
    for weight, prefix in blend:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.blend: weight {weight} of {prefix} is not positive; remove the entry")
    prefixes = [prefix for _, prefix in blend]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(prefixes, [float(weight) for weight, _ in blend]), None, None],
        path_to_cache=str(Path(cache_dir) / data_digest(prefixes)[:16]),
        tokenizer=_DatasetTokenizer(tokenizer_eod),  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # The default 0.005 lets blends of few samples draw more from a prefix than was built for it
        # (each of k prefixes is rounded up, then the blend is filled to the sum).
        mid_level_dataset_surplus=0.005 + 2 * len(blend) / num_samples,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    with building(Path(str(config.path_to_cache))), _refusals_told(prefixes, cache_dir):
        train, _, _ = builder.build()
    assert isinstance(train, (GPTDataset, BlendedDataset))
    return _Samples(train, prefixes, cache_dir)


class _Samples(Dataset):
    """Megatron's data set. A sample raises ``UserError`` where the files were changed after they were opened."""

    def __init__(self, samples: Dataset, prefixes: Sequence[str], cache_dir: str | Path) -> None:
        self._samples, self._prefixes, self._cache_dir = samples, prefixes, cache_dir

    def __len__(self) -> int:
        return len(self._samples)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        with _refusals_told(self._prefixes, self._cache_dir):
            return self._samples[index]


@contextlib.contextmanager
def _refusals_told(prefixes: Sequence[str], cache_dir: str | Path) -> Iterator[None]:
    """What Megatron raises while it builds, as ``UserError``: a cache that the disk refuses, damage inside files."""
    try:
        yield
    except (AssertionError, ValueError) as e:
        raise UserError(
            f"data set {', '.join(prefixes)[:200]} is damaged, or was changed while it was read ({e or 'its index'}); "
            "run prepare-data again"
        ) from None
    except Exception as e:  # Megatron's own, which tells the OSError in many lines
        cause = e.__cause__ if isinstance(e.__cause__, OSError) else None
        if cause is not None and (told := of_os_error(cause, f"data.cache {cache_dir} cannot be written")):
            raise told from None
        raise


def sample_indices(
    first_sample: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, microbatch: int
) -> range:
    """Samples of one micro-batch on one data-parallel rank.

    Row j is ``first_sample + (microbatch * dp_size + dp_rank) * micro_batch_size + j``, where
    ``first_sample`` is the number of samples consumed before the global step.
    """
    assert 0 <= dp_rank < dp_size
    start = first_sample + (microbatch * dp_size + dp_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


def batch(
    dataset: Dataset, first_sample: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, microbatch: int
) -> dict[str, torch.Tensor]:
    """One micro-batch on the CPU: tokens, labels, position_ids (int64) and loss_mask (float32), all [b, s]."""
    rows = sample_indices(
        first_sample,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        microbatch=microbatch,
    )
    samples = [dataset[row] for row in rows]
    return {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}


def windows(token_ids: np.ndarray, seq_length: int) -> Iterator[torch.Tensor]:
    """Consecutive windows [seq_length] (int64) without overlap, for evaluation.

    The last may be shorter; one of a single token is left out, as it has nothing to predict.
    Raises ``UserError`` if ``seq_length`` is below 2.
    """
    if seq_length < 2:
        raise UserError(f"seq_length {seq_length}: a window needs 2 tokens to predict one; use 2 or more")
    for start in range(0, len(token_ids) - 1, seq_length):
        yield torch.from_numpy(token_ids[start : start + seq_length].astype(np.int64))


def data_digest(prefixes: Sequence[str]) -> str:
    """Hex sha256 that changes with the data or its order, not with where the files lie.

    Covers the size of every .idx and .bin, all of a file up to 16 MiB, and 64 evenly spaced blocks of
    16 KiB of a larger one, the first and the last among them. Raises ``UserError`` if a file is missing.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        check_prefix(prefix)
        for suffix in (".idx", ".bin"):
            hash_file(digest, Path(f"{prefix}{suffix}"))
    return digest.hexdigest()


def hash_file(digest: Any, path: Path) -> None:
    """Add the size of a file and its bytes, or blocks of them, as ``data_digest`` says."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        if size <= _DIGEST_WHOLE_BYTES:
            digest.update(stream.read())
            return
        for block in range(_DIGEST_BLOCKS):
            stream.seek(block * (size - _DIGEST_BLOCK_BYTES) // (_DIGEST_BLOCKS - 1))
            digest.update(stream.read(_DIGEST_BLOCK_BYTES))
