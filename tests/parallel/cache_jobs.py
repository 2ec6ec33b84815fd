"""What the ranks do in the tests of the teacher's cache."""

from __future__ import annotations

from typing import Any

import training_jobs

from elastic_megatron.training import train as module


def taught(recipe: str) -> dict[str, Any]:
    """As ``training_jobs.trained``, with how often this rank's chunks of the teacher ran."""
    calls, build = [0], module.build_teacher

    def counting(*args: Any) -> Any:
        chunks = build(*args)
        for chunk in chunks:
            chunk.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return chunks

    module.build_teacher = counting
    try:
        return {**training_jobs.trained(recipe), "calls": calls[0]}
    finally:
        module.build_teacher = build
