"""Does a parallel layout fit a model and all its submodels? Answered before a job waits in a queue for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..space import ElasticSpace, ParentShape
from .batch_rules import sequence_cut
from .parallel import Batch, Layout
from .remedy import described, problems_of
from .setting import Setting


def check_layout(
    shape: ParentShape,
    space: ElasticSpace | None,
    parallel: Layout,
    stages: Sequence[Batch] = (),
    **rest: Any,
) -> list[str]:
    """Everything that Megatron would refuse, or get wrong, once the job runs (``layout_rules``); one line each.

    ``rest`` is whatever else a ``Setting`` may hold.

    A line ends with what to do: ``...; set KEY=VALUE``, a change that was tried. Empty where the layout fits.
    """
    return check_setting(Setting.of(shape, space, parallel, stages, **rest))


def check_setting(setting: Setting) -> list[str]:
    """As ``check_layout``, with everything that a setting may hold."""
    return [described(setting, problem) for problem in problems_of(setting)]


def check_sequence(parallel: Layout, what: str, seq_length: int) -> Iterator[str]:
    """As ``check_layout`` for sequences of a pass over data that is no training; ``what`` has the ``seq_length``."""
    cut = sequence_cut(parallel)
    if seq_length % cut:
        longer = -(-seq_length // cut) * cut
        yield (
            f"{what}: seq_length={seq_length} is not a multiple of {cut}, which context and sequence parallelism "
            f"cut it into; set {what}.seq_length={longer}"
        )
