"""Batches are a pure function of the data and of the samples consumed."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from elastic_megatron.data import blend as blend_module
from elastic_megatron.data.blend import batch, build_dataset, data_digest, sample_indices, windows
from elastic_megatron.errors import RetryableError, UserError

SEQ = 16
TOKENS = {"a": np.arange(1000), "b": np.arange(10_000, 10_500)}


def write_prefix(prefix: Path, tokens: np.ndarray, documents: int) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for part in np.array_split(tokens, documents):
        builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


pytestmark = pytest.mark.usefixtures("megatron")  # Megatron's data sets ask for a process group


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {name: write_prefix(folder / name, tokens, 9) for name, tokens in TOKENS.items()}


def build(blend, cache_dir: Path, num_samples: int = 50, seed: int = 3) -> Any:
    return build_dataset(
        blend, seq_length=SEQ, num_samples=num_samples, seed=seed, cache_dir=cache_dir, tokenizer_eod=2
    )


def rows(dataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_samples_are_the_data_shifted_by_one(prefixes, tmp_path: Path):
    one = batch(
        build([(1.0, prefixes["a"])], tmp_path), 7, micro_batch_size=3, dp_rank=0, dp_size=1, microbatch=0
    )
    assert {key: (tuple(value.shape), value.dtype) for key, value in one.items()} == {
        "tokens": ((3, SEQ), torch.int64),
        "labels": ((3, SEQ), torch.int64),
        "loss_mask": ((3, SEQ), torch.float32),
        "position_ids": ((3, SEQ), torch.int64),
    }
    assert torch.equal(one["tokens"][:, 1:], one["labels"][:, :-1])
    assert torch.equal(one["position_ids"], torch.arange(SEQ).expand(3, -1))


def test_one_epoch_meets_every_token_once(prefixes, tmp_path: Path):
    dataset = build([(1.0, prefixes["a"])], tmp_path, num_samples=62)
    assert len(dataset) == 62
    seen = rows(dataset, 62).flatten()
    assert len(seen.unique()) == 62 * SEQ and int(seen.max()) < 1000
    masks = torch.stack([dataset[i]["loss_mask"] for i in range(62)])
    assert masks.all(), "id 0 is data here, though many tokenizers use it for padding"


@pytest.mark.parametrize("weights", [(0.25, 0.75), (1, 3)])
def test_blend_follows_the_weights(prefixes, tmp_path: Path, weights):
    dataset = build(list(zip(weights, prefixes.values(), strict=True)), tmp_path, num_samples=400)
    assert len(dataset) >= 400
    from_b = (rows(dataset, 400) >= 10_000).any(dim=1)
    for count in (40, 400):
        assert abs(int(from_b[:count].sum()) - 0.75 * count) <= 1


def test_order_depends_on_the_seed_and_on_nothing_else(prefixes, tmp_path: Path):
    mixed = [(0.5, prefixes["a"]), (0.5, prefixes["b"])]
    first = rows(build(mixed, tmp_path / "one"), 50)
    assert torch.equal(first, rows(build(mixed, tmp_path / "one"), 50)), "from the cache"
    assert torch.equal(first, rows(build(mixed, tmp_path / "two"), 50)), "built again"
    assert not torch.equal(first, rows(build(mixed, tmp_path / "one", seed=4), 50))


def test_new_data_under_an_old_name_is_not_read_by_the_old_index(tmp_path: Path):
    prefix = write_prefix(tmp_path / "d", np.arange(700), 5)
    build([(1.0, prefix)], tmp_path / "cache")
    write_prefix(tmp_path / "d", np.arange(20_000, 20_350), 2)
    again = rows(build([(1.0, prefix)], tmp_path / "cache"), 50)
    fresh = rows(build([(1.0, prefix)], tmp_path / "fresh"), 50)
    assert torch.equal(again, fresh) and int(again.min()) >= 20_000


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1e-3, 0.1, 1.0, 7.0]), min_size=2, max_size=8),
    num_samples=st.integers(1, 40),
)
def test_small_blends_never_run_out_of_samples(tmp_path_factory, weights: list[float], num_samples: int):
    folder = tmp_path_factory.mktemp("tight")
    # SEQ tokens per epoch: Megatron then builds not one sample more than it is asked for.
    prefix = write_prefix(folder / "d", np.arange(SEQ), 1)
    dataset = build([(weight, prefix) for weight in weights], folder / "cache", num_samples=num_samples)
    assert rows(dataset, num_samples).shape == (num_samples, SEQ)


@given(
    first=st.integers(0, 10**9),
    mbs=st.integers(1, 5),
    dp_size=st.integers(1, 8),
    microbatches=st.integers(1, 6),
)
def test_a_step_is_every_sample_once_in_any_layout(first: int, mbs: int, dp_size: int, microbatches: int):
    step = [
        index
        for microbatch in range(microbatches)
        for rank in range(dp_size)
        for index in sample_indices(
            first, micro_batch_size=mbs, dp_rank=rank, dp_size=dp_size, microbatch=microbatch
        )
    ]
    assert step == list(range(first, first + mbs * dp_size * microbatches))


def test_batches_are_the_samples_of_their_indices(prefixes, tmp_path: Path):
    dataset = build([(1.0, prefixes["a"]), (1.0, prefixes["b"])], tmp_path)
    layout = {"micro_batch_size": 2, "dp_rank": 1, "dp_size": 3, "microbatch": 2}
    tokens = batch(dataset, 12, **layout)["tokens"]
    assert torch.equal(tokens, torch.stack([dataset[26]["tokens"], dataset[27]["tokens"]]))


@given(length=st.integers(0, 70), seq_length=st.integers(2, 20))
def test_windows_are_the_text_in_order(length: int, seq_length: int):
    ids = np.arange(length, dtype=np.int32)
    parts = list(windows(ids, seq_length))
    assert all(part.dtype == torch.int64 and len(part) >= 2 for part in parts)
    assert all(len(part) == seq_length for part in parts[:-1])
    joined = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
    assert joined.tolist() == list(range(length - (length % seq_length == 1)))


def test_a_window_of_one_token_is_the_users_error():
    with pytest.raises(UserError, match="seq_length 1"):
        next(windows(np.arange(5), 1))


@pytest.mark.parametrize("whole_bytes", [16 << 20, 0], ids=["whole", "sampled"])
def test_digest_follows_content_and_order_not_place(prefixes, tmp_path: Path, monkeypatch, whole_bytes: int):
    monkeypatch.setattr(blend_module, "_DIGEST_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(blend_module, "_DIGEST_BLOCK_BYTES", 8)
    for suffix in (".bin", ".idx"):
        shutil.copy(prefixes["a"] + suffix, tmp_path / f"moved{suffix}")
    moved = str(tmp_path / "moved")
    digest = data_digest([prefixes["a"], prefixes["b"]])
    assert data_digest([moved, prefixes["b"]]) == digest
    assert data_digest([prefixes["b"], moved]) != digest
    raw = bytearray(Path(f"{moved}.bin").read_bytes())
    raw[-1] ^= 1
    Path(f"{moved}.bin").write_bytes(raw)
    assert data_digest([moved, prefixes["b"]]) != digest


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header":
        path.write_bytes(b"x" + path.read_bytes()[1:])
    else:
        path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("suffix", "how", "message"),
    [
        (".bin", "missing", r"d\.bin is missing; write it by: elastic-megatron prepare-data"),
        (".idx", "missing", r"d\.idx is missing; .*prepare-data"),
        (".bin", "empty", "do not belong together; run prepare-data again"),
        (".bin", "cut", "do not belong together; run prepare-data again"),
        (".idx", "header", "is no Megatron index; run prepare-data again"),
        (".idx", "cut", "is no Megatron index; run prepare-data again"),
        (".idx", "empty", "is no Megatron index; run prepare-data again"),
    ],
)
def test_unusable_files_are_the_users_error(tmp_path: Path, suffix: str, how: str, message: str):
    prefix = write_prefix(tmp_path / "d", np.arange(100), 2)
    damage(Path(prefix + suffix), how)
    with pytest.raises(UserError, match=message) as caught:
        build([(1.0, prefix)], tmp_path)
    assert prefix in str(caught.value)


def test_no_tokens_is_the_users_error(tmp_path: Path):
    prefix = write_prefix(tmp_path / "d", np.arange(0), 1)
    with pytest.raises(UserError, match="holds no tokens"):
        build([(1.0, prefix)], tmp_path)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive(prefixes, tmp_path: Path, weight: float):
    with pytest.raises(UserError, match="not positive"):
        build([(weight, prefixes["a"])], tmp_path)
    with pytest.raises(UserError, match="data.blend is empty"):
        build([], tmp_path)


def test_what_the_disk_refuses_of_a_cache_is_told_in_one_line(prefixes, tmp_path: Path, monkeypatch):
    """A full disk may have room again: the same command may succeed later. Megatron's own exception is many lines."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        RetryableError, match=r"data\.cache .*cache cannot be written \(No space left"
    ) as caught:
        build([(1.0, prefixes["a"])], tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_an_index_whose_inside_is_damaged_is_the_users_error(tmp_path: Path):
    """Header and ends are right; a document begins beyond all sequences."""
    prefix = write_prefix(tmp_path / "d", np.arange(100), 10)
    index = Path(f"{prefix}.idx")
    data = bytearray(index.read_bytes())
    data[-8:] = (1 << 40).to_bytes(8, "little")
    index.write_bytes(data)
    with pytest.raises(UserError, match="is damaged, or was changed while it was read .*prepare-data again"):
        build([(1.0, prefix)], tmp_path / "cache")


def test_tokens_that_are_cut_while_they_are_read_are_the_users_error(tmp_path: Path, monkeypatch):
    """The reader keeps the file open; here it meets the shorter one as soon as the index is built."""
    prefix = write_prefix(tmp_path / "d", np.arange(100), 10)
    samples = build([(1.0, prefix)], tmp_path / "cache")

    def cut(*_: Any, **__: Any) -> None:
        raise ValueError("offset must be non-negative and no greater than buffer length (18312)")

    monkeypatch.setattr(np, "frombuffer", cut)
    with pytest.raises(UserError, match="was changed while it was read .*buffer length"):
        samples[0]
