"""What all ranks must agree on around a checkpoint: the same router bits, finite numbers, and the same verdict."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetryableError, UserError, of_os_error

ROUTER = "budget_router."
_CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteError(UserError):
    """Weights that nobody may build on, nor save; ``what`` is the message without its remedy."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; go back to a checkpoint that is finite")
        self.what = what


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


@torch.no_grad()
def check_finite(chunks: Sequence[nn.Module], optimizer: Any = None, what: str = "the model") -> None:
    """Look for NaN and infinities in weights, buffers and the optimizer's parameters and moments; collective.

    One pass over this rank's numbers and one flag for all ranks. ``what`` begins the message.

    Raises ``NonFiniteError`` on all ranks, which names the first tensor that is not finite.
    """
    named = [(n, t) for chunk in chunks for n, t in chunk.state_dict().items() if isinstance(t, Tensor)]
    named += _optimized(optimizer)
    named = [(n, t) for n, t in named if t.dtype in _CHECKED and t.numel()]
    # the largest magnitude of each: NaN where there is one
    finite = torch.stack(
        [
            torch.linalg.vector_norm(
                t, ord=float("inf"), dtype=torch.promote_types(t.dtype, torch.float32)
            ).isfinite()
            for _, t in named
        ]
    )
    flag = (~finite.all()).to(torch.int32).reshape(1)
    torch.distributed.all_reduce(flag)
    if not flag.item():
        return
    mine = next((name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good), None)
    every: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    name = next(n for n in every if n is not None)
    raise NonFiniteError(f"{what} is not finite: {name} has NaN or infinite values")


def _optimized(optimizer: Any) -> list[tuple[str, Tensor]]:
    """What a Megatron optimizer holds on this rank: parameters, which may be finer than the model's, and moments."""
    out: list[tuple[str, Tensor]] = []
    for each in getattr(optimizer, "chained_optimizers", [] if optimizer is None else [optimizer]):
        inner = getattr(each, "optimizer", None)
        for group in inner.param_groups if inner is not None else ():
            for parameter in group["params"]:
                out.append(("a parameter of the optimizer", parameter.detach()))
                state = inner.state.get(parameter, {})
                out += [(f"the optimizer's {k}", v) for k, v in state.items() if isinstance(v, Tensor)]
    return out


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
