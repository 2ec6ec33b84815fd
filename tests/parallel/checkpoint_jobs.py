"""What ranks do in the checkpoint tests: functions that a pool of ranks imports by name."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import saved_models
import torch
from saved_models import Student
from torch import Tensor

from elastic_megatron.checkpoint import distributed, integrity, tracker
from elastic_megatron.checkpoint.distributed import Saver
from elastic_megatron.errors import UserError


def save(root: str, iteration: int, layout: dict[str, Any], **kwargs: Any) -> None:
    """Save a student that has been moved."""
    _save(Path(root), iteration, saved_models.student(**layout, **kwargs), {"step": iteration})


def copy(source: str, root: str, iteration: int, layout: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Load a checkpoint into another student under some layout, save that, and again one step later."""
    student = saved_models.student(seed=9, steps=1, **layout, **kwargs)
    state = distributed.load(Path(source), student.chunks, optimizer=student.optimizer)
    _save(Path(root), iteration, student, state)
    saved_models.move(student)
    _save(Path(root), iteration + 1, student, state)
    return state


def copy_weights(source: str, root: str, layout: dict[str, Any]) -> None:
    """Load a checkpoint that has nothing but weights into another student under some layout, and save its weights."""
    student = saved_models.student(seed=9, steps=0, **layout)
    router, student.chunks[0].budget_router = student.chunks[0].budget_router, None
    distributed.load(Path(source), student.chunks)
    student.chunks[0].budget_router = router
    distributed.save(Path(root), 0, student.chunks, student.manifest)


def _save(root: Path, iteration: int, student: Student, state: dict[str, Any]) -> None:
    distributed.save(
        root, iteration, student.chunks, student.manifest, optimizer=student.optimizer, state=state
    )


def load(source: str, layout: dict[str, Any]) -> str:
    """What the user is told on this rank about a damaged checkpoint."""
    student = saved_models.student(steps=0, **layout)
    try:
        distributed.load(Path(source), student.chunks)
    except UserError as error:
        return str(error)
    return ""


def save_different_routers(root: str, layout: dict[str, Any], odd: int) -> str:
    """One rank's router is a rounding error away from the others'."""
    student = saved_models.student(**layout)
    if int(os.environ["RANK"]) == odd:
        weight = next(student.chunks[0].budget_router.parameters())
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    try:
        _save(Path(root), 1, student, {})
    except UserError as error:
        return str(error)
    return ""


def save_on_full_disk(root: str, full: int, async_save: bool) -> str:
    """Save twice; the second time, the disk of one rank is full."""
    student = saved_models.student()
    _save(Path(root), 1, student, {})
    if int(os.environ["RANK"]) == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        with Saver(Path(root), async_save=async_save) as saver:
            saver.save(2, student.chunks, student.manifest, optimizer=student.optimizer)
    except UserError as error:
        return f"{error.status}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def save_refused(root: str, number: int) -> str:
    """What each rank ends with where the file system refuses the first one the name of the second checkpoint."""
    student = saved_models.student("M-", steps=0)
    distributed.save(Path(root), 1, student.chunks, student.manifest)

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), root)

    publish, tracker.publish = tracker.publish, refuse
    try:
        distributed.save(Path(root), 2, student.chunks, student.manifest)
    except UserError as error:
        return f"{error.status}: {error}"
    finally:
        tracker.publish = publish
    return ""


def save_slowly(root: str, alive: str) -> None:
    """A background save whose writer would take an hour."""
    student = saved_models.student("M-")

    def last_act(*_: Any) -> None:
        Path(alive).touch()
        time.sleep(3600)

    integrity.digest_part = last_act
    with Saver(Path(root), async_save=True) as saver:
        saver.save(1, student.chunks, student.manifest)
        time.sleep(3600)


def save_without_end(root: str, alive: str, async_save: bool) -> None:
    """Save a state whose every number is the count of the save, after the last count that is found; each iteration
    is saved twice. While a save is written in the background, every number is another one."""
    folder, student = Path(root), saved_models.student("M-", steps=1)
    named, count = tracker.newest(folder), 0
    if named is not None:
        count = distributed.load(named, student.chunks, optimizer=student.optimizer)["count"]
        assert all((value == count).all() for value in _numbers(student))
    Path(alive, os.environ["RANK"]).touch()
    with Saver(folder, keep_last=2, async_save=async_save) as saver:
        while True:
            count += 1
            _fill(student, count)
            saver.save(
                count // 2,
                student.chunks,
                student.manifest,
                optimizer=student.optimizer,
                state={"count": count},
            )
            _fill(student, -1)
            for _ in range(count % 5):
                saver.poll()


def _fill(student: Student, value: int) -> None:
    for tensor in _numbers(student):
        tensor.fill_(value)


@torch.no_grad()
def _numbers(student: Student) -> list[Tensor]:
    """Everything that a checkpoint holds of this rank."""
    out = [t for chunk in student.chunks for t in chunk.state_dict().values() if isinstance(t, Tensor)]
    for optimizer in student.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            out += [p.data for p in group["params"]]
        for moments in optimizer.optimizer.state.values():
            out += [moment for moment in moments.values() if isinstance(moment, Tensor)]
    return out
