"""What all ranks must agree on around a checkpoint: the same router bits, and the same verdict."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..errors import RetryableError, UserError, of_os_error

ROUTER = "budget_router."


@torch.no_grad()
def check_replicas(chunks: Sequence[nn.Module]) -> None:
    """Compare the bits of the budget router, which every rank holds whole; collective, one int64 a rank.

    Raises ``RetryableError`` on all ranks that names those that differ from rank 0.
    """
    digest = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(ROUTER):
                digest.update(name.encode())
                digest.update(parameter.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    device = next(p.device for chunk in chunks for p in chunk.parameters())
    mine = torch.tensor([int.from_bytes(digest.digest(), "big", signed=True)], device=device)
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    if other := [rank for rank, value in enumerate(every) if value != every[0]]:
        raise RetryableError(
            f"the budget router of ranks {other} differs from that of rank 0, so nothing was saved; run the same "
            "command to continue from the last checkpoint, and report a defect if it happens again"
        )


@contextlib.contextmanager
def same_on_all_ranks(what: str) -> Iterator[None]:
    """A ``UserError`` or ``OSError`` of one rank becomes the same kind of ``UserError`` on every rank; collective.

    Without it one rank would leave and the others wait for it. ``what`` begins the message about an ``OSError``.
    """
    problem: tuple[type[UserError], str] | None = None
    cause: BaseException | None = None
    try:
        yield
    except UserError as e:
        problem, cause = (type(e), str(e)), e.__cause__
    except OSError as e:
        unknown = UserError(f"{what} ({e.filename}: {e.strerror}); correct its name or its permissions")
        told = of_os_error(e, what) or unknown
        problem, cause = (type(told), str(told)), e
    problems: list[tuple[type[UserError], str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if found := next((p for p in problems if p), None):
        kind, text = found
        raise kind(text) from cause
