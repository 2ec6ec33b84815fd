"""Megatron distributed checkpoints with an atomic tracker.

A checkpoint directory holds ``iter_0000100/`` folders (Megatron's ``torch_dist`` shards, ``elastic.json`` and
``hf/``, the side files an export needs) and ``latest_checkpointed_iteration.txt``, which names the newest
complete one. A folder is written under a temporary name and renamed, then the tracker is replaced, so that a
crash at any moment leaves the previous checkpoint loadable and named.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from ..errors import UserError
from .hf_read import side_files
from .manifest import FILE, Manifest
from .tracker import TRACKER, complete


def save(
    directory: Path,
    iteration: int,
    model: nn.Module,
    manifest: Manifest,
    *,
    optimizer: Any = None,
    state: Mapping[str, Any] | None = None,
    hf_files: Path | None = None,
    keep_last: int = 0,
) -> Path:
    """Write ``iter_%07d`` and point the tracker at it; collective over all ranks.

    Args:
        directory: the checkpoint root.
        optimizer: a Megatron optimizer, saved reshardable; ``None`` saves weights only.
        state: plain values to return from ``load`` (step, consumed samples, schedules).
        hf_files: a Hugging Face directory whose tokenizer and other side files are copied to ``hf/``.
        keep_last: complete checkpoints to keep, 0 for all.
    """
    from megatron.core import dist_checkpointing

    final = directory / f"iter_{iteration:07d}"
    temporary = directory / f".{final.name}.incomplete"
    if _main_rank():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    shards = {"model": model.sharded_state_dict(metadata=_metadata()), "state": dict(state or {})}
    if optimizer is not None:
        shards["optimizer"] = optimizer.sharded_state_dict(shards, metadata=_metadata())
    dist_checkpointing.save(shards, str(temporary))
    _barrier()
    if _main_rank():
        manifest.write(temporary / FILE)
        if hf_files is not None:
            (temporary / "hf").mkdir()
            for file in side_files(hf_files):
                shutil.copy2(file, temporary / "hf")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _point(directory, iteration)
        _prune(directory, keep_last)
    _barrier()
    return final


def load(path: Path, model: nn.Module, *, optimizer: Any = None) -> dict[str, Any]:
    """Load weights (and optimizer) from an ``iter_*`` folder into a built model; returns the saved ``state``.

    Raises ``UserError`` where a shard or ``elastic.json`` is missing, damaged or of a later release, or the
    weights do not fit the model.
    """
    from megatron.core import dist_checkpointing

    Manifest.read(path / FILE)
    shards: dict[str, Any] = {"model": model.sharded_state_dict(metadata=_metadata())}
    if optimizer is not None:
        shards["optimizer"] = optimizer.sharded_state_dict(shards, is_loading=True, metadata=_metadata())
    try:
        with _unlogged():
            loaded = dist_checkpointing.load(shards, str(path))
    except (Exception, CheckpointException) as e:  # backends raise all kinds; torch's is no Exception
        raise UserError(
            f"{path} cannot be loaded ({_reason(e)}); it is damaged or of another model: name an older "
            "iteration in the tracker file, or use another run_dir"
        ) from e
    model.load_state_dict(loaded["model"], strict=False)
    if optimizer is not None:
        with torch.no_grad():  # the fp32 path copies into views of leaves
            optimizer.load_state_dict(loaded["optimizer"])
    return dict(loaded.get("state", {}))


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs tracebacks of what a user is told in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """One line about a failed load; a ``CheckpointException`` wraps the failure of each rank."""
    inner = next((e for e, _ in getattr(error, "failures", {}).values()), error)
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return f"{type(inner).__name__}: {line[:160]}"


def _metadata() -> dict[str, Any]:
    from .. import runtime

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": runtime.groups().dp_cp,
    }


def _point(directory: Path, iteration: int) -> None:
    temporary = directory / f".{TRACKER}.incomplete"
    with open(temporary, "w") as f:
        f.write(f"{iteration}\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, directory / TRACKER)


def _prune(directory: Path, keep_last: int) -> None:
    for old in complete(directory)[:-keep_last] if keep_last else []:
        shutil.rmtree(old)


def _main_rank() -> bool:
    return torch.distributed.get_rank() == 0


def _barrier() -> None:
    torch.distributed.barrier()
