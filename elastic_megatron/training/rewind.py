"""Back to the last good checkpoint of a run that diverged, in the same process."""

from __future__ import annotations

from ..checkpoint import distributed
from ..checkpoint.agreement import NonFiniteError, check_finite
from .build import Model
from .divergence import DivergenceWatch
from .log import RunLog


def rewind(
    model: Model, saver: distributed.Saver, watch: DivergenceWatch, log: RunLog, *, done: int, what: str,
    resumable: bool,
) -> int:  # fmt: skip
    """Load the last checkpoint, and pass over the steps that led away from it; collective.

    Args:
        done: steps of the run so far.
        what: is not finite.
        resumable: whether a run can go on from ``saver.published``.

    Returns the steps that are done there. Raises ``DivergedError`` where the recipe or the checkpoint forbids it.
    """
    good, offending = saver.published, _offending(model, watch, done)
    if good is None or not resumable or not watch.may_rewind():
        raise watch.error(what, good)
    with model.gathered():
        state = distributed.load(good, model.chunks, optimizer=model.optimizer)
    watch.rewind(offending)
    back, passed = int(state["step"]), [step + 1 for step in offending]
    log.rewound(back, {"why": what, "passed_over": passed, "rewinds": watch.rewinds})
    log.say(f"{what}: back to step {back} ({good}); steps {passed} are passed over")
    return back


def _offending(model: Model, watch: DivergenceWatch, done: int) -> list[int]:
    """The steps that were not finite, and the last update before them if it left weights that are not."""
    try:
        check_finite(model.chunks, model.optimizer)
    except NonFiniteError:
        before = range((watch.streak[0] if watch.streak else done) - 1, -1, -1)
        return [next(step for step in before if step not in watch.skipped), *watch.streak]
    return [*watch.streak]
