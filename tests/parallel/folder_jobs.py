"""What ranks do in the tests of run folders: functions that a pool of ranks imports by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import saved_models
import torch

from elastic_megatron.checkpoint.distributed import Saver
from elastic_megatron.errors import UserError
from elastic_megatron.files import lock
from elastic_megatron.training.held_folder import held_folder


def hold(path: str) -> str:
    """What a rank is told that wants to hold a folder, or who holds it then."""
    saved_models.student("M-", steps=0)
    try:
        with held_folder(Path(path), "train"):
            torch.distributed.barrier()
            owner = str(lock.owner_of(lock.within(Path(path))))
            torch.distributed.barrier()
            return owner
    except UserError as error:
        return str(error)


def save_into_removed(path: str, async_save: bool) -> str:
    """What a rank is told whose folder is removed after the first save."""
    folder, student = Path(path), saved_models.student("M-", steps=0)
    try:
        with (
            held_folder(folder, "train") as held,
            Saver(folder / "checkpoints", async_save=async_save, check=held.check) as saver,
        ):
            saver.save(1, student.chunks, student.manifest)
            saver.finish()
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(folder)
            saver.save(2, student.chunks, student.manifest)
    except UserError as error:
        return f"{error.status}: {error}"
    return ""
