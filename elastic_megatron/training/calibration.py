"""The sequences of a pass over calibration data, shared by data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .. import runtime
from ..errors import UserError
from .datasets import check_tokens


class Pass(Protocol):
    """A recipe's section that describes one: ``rank``, ``quantize``."""

    samples: int
    seq_length: int
    micro_batch_size: int


class CalibrationData:
    """This data-parallel rank's block of the samples, in batches.

    Args:
        settings: the section called ``key``.
        samples: ``samples[i]["tokens"]`` [sequence] int64 of the whole data set, on every rank.

    Raises ``UserError`` where samples do not divide among the data-parallel ranks.
    """

    def __init__(self, key: str, settings: Pass, samples: Any, vocab_size: int, device: torch.device) -> None:
        self.settings, self.samples, self.vocab_size, self.device = settings, samples, vocab_size, device
        self.own = _own_samples(key, settings)

    def __len__(self) -> int:
        return -(-len(self.own) // self.settings.micro_batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """``tokens`` [b, sequence]. Raises ``UserError`` where a token has no embedding."""
        for start in range(self.own.start, self.own.stop, self.settings.micro_batch_size):
            rows = range(start, min(start + self.settings.micro_batch_size, self.own.stop))
            tokens = torch.stack([self.samples[row]["tokens"] for row in rows])
            check_tokens(tokens, self.vocab_size)
            yield runtime.sent({"tokens": tokens}, self.device)


def shown[T](batches: Iterable[T], title: str, *, show: bool) -> Iterable[T]:
    """``batches`` with a bar on a terminal."""
    console = Console(stderr=True)
    total = len(batches) if isinstance(batches, Sized) else None
    return track(
        batches,
        title,
        total=total,
        transient=True,
        console=console,
        disable=not (show and console.is_terminal),
    )


def _own_samples(key: str, settings: Pass) -> range:
    replicas = runtime.groups().dp
    number = replicas.size()
    if number > 1 and settings.samples % (settings.micro_batch_size * number):
        raise UserError(
            f"{key}.samples={settings.samples} is not a multiple of micro_batch_size {settings.micro_batch_size} x "
            f"{number} data-parallel ranks; choose a multiple of {settings.micro_batch_size * number}"
        )
    share = settings.samples // number
    return range(replicas.rank() * share, (replicas.rank() + 1) * share)
