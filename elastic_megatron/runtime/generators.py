"""Random generators that building a model leaves as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def untouched_generators() -> Iterator[None]:
    """What is drawn inside changes no draw after it: torch's generators, and those that Megatron tracks.

    Megatron's modules draw initial weights when they are built, some whatever the config says.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    try:
        with torch.random.fork_rng(
            devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        ):
            yield
    finally:
        tracker.set_states(states)
