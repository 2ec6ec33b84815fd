"""Processes that stay up for a test module, joined by gloo, and the calls they answer.

Torch and the floor under test are all that they import.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_megatron.ops import (
    Projection,
    TopLogits,
    chunked_distillation_loss,
    distillation_loss,
    scale_gradient,
    sum_over,
    token_cross_entropy,
    top_logits,
)

all_reduce = dist.all_reduce

WORLD = 3
SECONDS = 120  # for an answer; half of it for a message between ranks, so that errors arrive first
Members = tuple[int, ...]
Groups = dict[Members, dist.ProcessGroup]
# of two ranks also a group whose ranks are not those of the world
GROUPS: tuple[Members, ...] = ((0, 1), (1, 2), (0, 1, 2))


class Ranks:
    """``WORLD`` processes. ``on(group, call, ...)`` runs ``call(group, ...)`` on its members, results in order."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["elastic_megatron.ops"])  # torch is imported once, not by every rank
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, str(folder / "store")), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def on(self, members: Members, call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for rank in members:
            # by pickle itself: a connection's own would pass tensors through shared memory
            self.pipes[rank].send_bytes(pickle.dumps((call, members, args, kwargs)))
        until = time.monotonic() + SECONDS
        results, errors = [], []
        for rank in members:
            if not self.pipes[rank].poll(max(0.0, until - time.monotonic())):
                self.stop()
                raise TimeoutError(f"rank {rank} of {members} did not answer in {SECONDS} s")
            value, error = pickle.loads(self.pipes[rank].recv_bytes())
            results.append(value)
            errors += [error] if error else []
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _as_strict_as_nccl(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Gloo reduces tensors that NCCL refuses."""
    assert x.is_contiguous(), "Tensors must be contiguous"
    return all_reduce(x, *args, **kwargs)


def _serve(pipe: Connection, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.all_reduce = _as_strict_as_nccl
    limit = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=limit)
    groups: Groups = {members: dist.new_group(members, timeout=limit) for members in GROUPS}
    while True:
        try:
            call, members, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (call(groups[members], *args, **kwargs), None)
        except Exception:
            answer = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def part(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    return whole.chunk(group.size(), -1)[group.rank()]


def distil(
    group: dist.ProcessGroup,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    **how: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss and divergence of every token, and this part's gradient of the losses' weighted sum."""
    mine = part(student, group).detach().requires_grad_()
    theirs = None if teacher is None else part(teacher, group)
    loss, kd = distillation_loss(mine, theirs, labels, group=group, **how)
    (grad,) = torch.autograd.grad((weight * loss).sum(), mine)
    return loss.detach(), None if kd is None else kd.detach(), grad


def distil_in_chunks(
    group: dist.ProcessGroup,
    student: Projection,
    teacher: Projection | TopLogits | None,
    labels: Tensor,
    mask: Tensor,
    **how: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, int]:
    """Sums, this part's gradients of hidden states and weight, and how many messages were exchanged."""
    mine = Projection(
        student.hidden.clone().requires_grad_(), rows_of(student.weight, group).requires_grad_()
    )
    theirs = teacher
    if isinstance(teacher, Projection):
        theirs = Projection(teacher.hidden, rows_of(teacher.weight, group))
    counted = dist.all_reduce
    messages: list[int] = []
    dist.all_reduce = lambda *args, **kwargs: (messages.append(1), counted(*args, **kwargs))
    try:
        loss, kd = chunked_distillation_loss(mine, theirs, labels, mask, group=group, **how)
        of_hidden, of_weight = torch.autograd.grad(loss, (mine.hidden, mine.weight))
    finally:
        dist.all_reduce = counted
    return loss.detach(), kd, of_hidden, of_weight, len(messages)


def top_of(group: dist.ProcessGroup, teacher: Projection, k: int, **how: Any) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the most probable entries."""
    mine = Projection(teacher.hidden, rows_of(teacher.weight, group))
    found = top_logits(mine, k, group=group, **how)
    return found.ids, found.log_p


def rows_of(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    return weight.chunk(group.size(), 0)[group.rank()].clone()


def judge(group: dist.ProcessGroup, logits: Tensor, labels: Tensor) -> Tensor:
    return token_cross_entropy(part(logits, group), labels, group)


def summed(group: dist.ProcessGroup, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum over ranks, and the gradient of the sum of its squares for this rank's part."""
    mine = parts[group.rank()].clone().requires_grad_()
    total = sum_over(mine, group)
    (grad,) = torch.autograd.grad(total.square().sum(), mine)
    return total.detach(), grad


def untouched(group: dist.ProcessGroup, x: Tensor) -> bool:
    """Whether a sum leaves its argument as it was, also one that is not laid out in order."""
    before = x.clone()
    sum_over(x.transpose(0, 1), group)
    return torch.equal(x, before)


def shares(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """The gradients that the ranks have of a value which all of them compute, divided among them, added up."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(scale_gradient(x, 1 / group.size()).exp().sum(), x)
    return sum_over(grad, group)
