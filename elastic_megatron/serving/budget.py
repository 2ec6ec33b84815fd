"""Elastic budget control: one submodel thinks within a budget of tokens, another answers."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .decode import Written
from .prompt import Marks

Watch = Callable[[int], object]


class Writer(Protocol):
    """A submodel that continues tokens: ``decode.write`` of a model in which it is running."""

    def __call__(self, prompt: Sequence[int], limit: int, stops: Container[int], watch: Watch) -> Written: ...


@dataclass(frozen=True)
class Generated:
    """What was written, in tokens.

    Args:
        thought: without the mark that ends it; ``None`` where nothing was to be thought.
        closed: what ended the thought: its ``"mark"``, written by the model, the ``"end"`` of its text, or the
            ``"budget"``. After the latter two the mark was put there.
        answer: without the token that ends it.
        finished: did the model end the answer itself?
    """

    prompt: list[int]
    thought: list[int] | None
    closed: Literal["mark", "end", "budget"] | None
    answer: list[int]
    finished: bool


def answered(
    write: Writer, prompt: Sequence[int], limit: int, ends: Container[int], watch: Watch
) -> Generated:
    """A prompt continued by at most ``limit`` tokens, by one submodel."""
    answer = write(prompt, limit, ends, watch)
    return Generated(list(prompt), None, None, answer.tokens, answer.stopped_at is not None)


def thought_and_answered(
    think: Writer,
    answer: Writer,
    prompt: Sequence[int],
    budget: int,
    limit: int,
    ends: set[int],
    marks: Marks | None,
    watch: Watch,
) -> Generated:
    """A thought of at most ``budget`` tokens by one submodel, then an answer of at most ``limit`` by another.

    The answering submodel reads prompt and thought again: submodels have states of different widths, so that none can
    be handed over.

    Args:
        prompt: which ends where the thought begins.
        ends: tokens that end a text.
        marks: of thoughts; without them only the budget, or the end of the text, ends one.
    """
    stops = ends | ({marks.end} if marks else set())
    thought = think(prompt, budget, stops, watch)
    by_mark = marks is not None and thought.stopped_at == marks.end
    closed = "mark" if by_mark else "budget" if thought.stopped_at is None else "end"
    closing = [] if marks is None else [marks.end] if by_mark else marks.cut
    for token in closing:
        watch(token)
    written = answer([*prompt, *thought.tokens, *closing], limit, ends, watch)
    return Generated(list(prompt), thought.tokens, closed, written.tokens, written.stopped_at is not None)
