"""Megatron distributed checkpoints with an atomic tracker.

A checkpoint directory holds ``iter_0000100/`` folders (Megatron's ``torch_dist`` shards, ``elastic.json``,
``integrity.json`` and ``hf/``, the side files an export needs) and ``latest_checkpointed_iteration.txt``, which
names the newest complete one. A folder is written under a temporary name and renamed, then the tracker is
replaced, so that a crash at any moment leaves the previous checkpoint loadable and named.

Tensors are saved under the names and whole shapes of the parent, so that any layout loads what any other wrote.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from .. import runtime
from ..errors import RetryableError, UserError, failure_in
from . import integrity, tracker
from .agreement import check_finite, check_replicas, same_on_all_ranks
from .amax import Amax, write_amax
from .dist_check import check_folder
from .manifest import FILE, Manifest
from .sharded_state import model_shards, named, sharding, without_missing_states
from .side_files import copy_side_files


def save(
    directory: Path,
    iteration: int,
    chunks: Sequence[nn.Module],
    manifest: Manifest,
    *,
    optimizer: Any = None,
    state: Mapping[str, Any] | None = None,
    hf_files: Path | None = None,
    amax: Mapping[str, Amax] | None = None,
    keep_last: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``iter_%07d`` and point the tracker at it; collective over all ranks.

    Args:
        directory: the checkpoint root.
        chunks, manifest, optimizer, state, hf_files, amax: as in ``Saver.save``.
        keep_last, check: as in ``Saver``.

    Raises ``UserError`` as ``Saver.save``.
    """
    with Saver(directory, keep_last=keep_last, check=check) as saver:
        return saver.save(
            iteration, chunks, manifest, optimizer=optimizer, state=state, hf_files=hf_files, amax=amax
        )


class Saver:
    """Writes the checkpoints of one run, in the background if asked; every method is collective over all ranks.

    In the background a forked process per rank holds the state at the moment of ``save``, writes and hashes it;
    training goes on and calls ``poll`` at every step. Renaming, tracker and pruning follow when all ranks have
    written. Leaving the ``with`` block waits for that; leaving it by an exception kills the writers.

    Args:
        directory: the checkpoint root.
        keep_last: checkpoints to keep, 0 for all.
        async_save: write in the background.
        check: raises ``UserError`` where nothing may be written (any more); called on rank 0.
    """

    def __init__(
        self, directory: Path, *, keep_last: int = 0, async_save: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.directory, self.keep_last, self.async_save, self._check = directory, keep_last, async_save, check
        self.published: Path | None = None  # the last one that this object completed
        self._queue = AsyncCallsQueue()

    def save(
        self,
        iteration: int,
        chunks: Sequence[nn.Module],
        manifest: Manifest,
        *,
        optimizer: Any = None,
        state: Mapping[str, Any] | None = None,
        hf_files: Path | None = None,
        amax: Mapping[str, Amax] | None = None,
    ) -> Path:
        """Save a state; returns the folder that holds it once it is complete. Waits for a save still under way.

        Args:
            chunks: this rank's ``HybridModel`` chunks, one without virtual pipeline.
            optimizer: a Megatron optimizer, saved reshardable; ``None`` saves weights only.
            state: plain values to return from ``load`` (step, consumed samples, schedules), equal on all ranks.
            hf_files: a Hugging Face directory whose tokenizer and other side files are copied to ``hf/``.
            amax: of a quantised model, those of the whole of it, on the first rank at least.

        Raises ``UserError`` where the files can never be written, and ``RetryableError`` where that may pass: a full
        disk, a file server that does not answer, a budget router that differs between ranks. Of them ``NonFiniteError``
        is raised before anything is written, where a weight or a number of the optimizer is not finite.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        self.finish()
        _forget_results()
        check_replicas(chunks)
        check_finite(chunks, optimizer, f"what would be checkpoint {iteration} of {self.directory}")
        with same_on_all_ranks(f"{self.directory} cannot be written"):
            if _rank() == 0:
                self._check()
                tracker.begin(self.directory, iteration)
        torch.distributed.barrier()
        temporary = tracker.temporary(self.directory, iteration)
        shards = model_shards(chunks) | {"state": dict(state or {})}
        if optimizer is not None:
            shards["optimizer"] = optimizer.sharded_state_dict(shards, metadata=sharding())
        # the data-parallel ranks share the writing
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), runtime.groups().dp_cp)
        request = dist_checkpointing.save(
            shards, str(temporary), strategy, async_sharded_save=True, async_strategy="mcore"
        )
        if request.async_fn is not None:
            owner = os.getpid() if self.async_save else None
            write = functools.partial(_write_shards, request.async_fn, temporary, owner)
            request = request._replace(async_fn=write)
        request.add_finalize_fn(lambda: self._publish(temporary, iteration, manifest, hf_files, amax))
        with _write_errors(temporary):
            if self.async_save:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()
        return tracker.folder(self.directory, iteration)

    def poll(self) -> None:
        """Complete a background save if all ranks have written it. Raises ``RetryableError`` where one could not."""
        with _write_errors(self.directory):
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background save and complete it. Raises ``RetryableError`` where a rank could not write."""
        with _write_errors(self.directory):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        while self._queue.async_calls:
            writer = self._queue.async_calls.popleft().async_caller.process
            if writer is not None:
                writer.kill()
                writer.join()

    def _publish(
        self,
        temporary: Path,
        iteration: int,
        manifest: Manifest,
        hf_files: Path | None,
        amax: Mapping[str, Amax] | None,
    ) -> None:
        with same_on_all_ranks(f"{temporary} cannot be completed"):
            if _rank() == 0:
                manifest.write(temporary / FILE)
                if amax is not None:
                    write_amax(temporary, amax)
                if hf_files is not None:
                    copy_side_files(hf_files, manifest.hf_config, temporary / "hf")
                integrity.seal(temporary)
                self._check()
                tracker.publish(self.directory, iteration)
                tracker.prune(self.directory, self.keep_last)
        self.published = tracker.folder(self.directory, iteration)


def load(path: Path, chunks: Sequence[nn.Module], *, optimizer: Any = None) -> dict[str, Any]:
    """Load weights (and optimizer) from an ``iter_*`` folder into built chunks; returns the saved ``state``.

    Collective over all ranks, which share the work of verifying the files; nothing that a file names runs.

    Raises ``UserError`` on all ranks where a file is missing, damaged, hostile or of a later release, or the weights
    do not fit the model.
    """
    from megatron.core import dist_checkpointing

    with same_on_all_ranks(f"{path} cannot be read"):
        Manifest.read(path / FILE)  # first: it knows the releases that cannot be read
        integrity.verify(path, _rank(), torch.distributed.get_world_size())
        saved = check_folder(path, _rank(), torch.distributed.get_world_size())
    shards = without_missing_states(model_shards(chunks), saved.objects)
    if optimizer is not None:
        shards["optimizer"] = optimizer.sharded_state_dict(shards, is_loading=True, metadata=sharding())
    with same_on_all_ranks(f"{path} cannot be read"):
        try:
            with _unlogged():
                loaded = dist_checkpointing.load(shards, str(path))
            for name, chunk in named(chunks):
                chunk.load_state_dict(loaded[name], strict=False)
            if optimizer is not None:
                with torch.no_grad():  # the fp32 path copies into views of leaves
                    optimizer.load_state_dict(loaded["optimizer"])
        except (Exception, CheckpointException) as e:  # backends raise all kinds; torch's is no Exception
            raise UserError(
                f"{path} cannot be loaded ({_reason(e)}); it is damaged, of another model or of another "
                "parallel.distributed_optimizer: name an older iteration in the tracker file, or use another run_dir"
            ) from e
    return dict(loaded.get("state", {}))


def _write_shards(write: Callable[..., None], folder: Path, owner: int | None, *arguments: Any) -> None:
    """Megatron's writer of one rank, then the digests of what it wrote; in a fork of process ``owner``, if any."""
    if owner is not None:
        runtime.begin_fork()
        if os.getppid() != owner:  # it died before this process could ask to be told
            return
    write(*arguments)
    rank, buckets, _ = arguments
    integrity.digest_part(folder, rank, [Path(file) for file, _, _ in buckets])


def _forget_results() -> None:
    """A save that was given up may have left its writers' results in Megatron's queue, which has no owner."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results = filesystem_async._results_queue
    while results is not None and not results.empty():
        results.get_nowait()


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as e:  # the latter on every rank, with the reason on the first
        # one file of many could not be written where its folder could be made: whatever it was, it may pass
        raise RetryableError(
            f"{folder} cannot be written ({_reason(e)}); free space and run the same command to continue from "
            "the last checkpoint"
        ) from e


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
    """One line about a failure; a ``CheckpointException`` wraps the failure of each rank."""
    inner = failure_in(error)
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return f"{type(inner).__name__}: {line[:160]}"


def _rank() -> int:
    return torch.distributed.get_rank()
