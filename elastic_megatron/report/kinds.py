"""What a run folder must hold for the page to draw it: kinds of values, checked once, where they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_megatron.report.format import finite
from elastic_megatron.space.stated import shown


@dataclass(frozen=True)
class Value:
    """Anything that ``fits``; ``words`` say what that is."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Record:
    """An object with ``keys``, where they are there and not null, and ``required`` ones; others hold anything."""

    keys: Mapping[str, Kind]
    required: Mapping[str, Kind] = field(default_factory=dict)
    words = "an object"


@dataclass(frozen=True)
class Each:
    """An object whose keys are names."""

    kind: Kind
    words = "an object"


@dataclass(frozen=True)
class Items:
    """A list of at least ``least``; ``alike``: of lists of one length."""

    kind: Kind
    least: int = 1
    alike: bool = False
    words = "a list"


@dataclass(frozen=True)
class Either:
    """A value of one of several kinds."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:
        return " or ".join(kind.words for kind in self.kinds)


Kind = Value | Record | Each | Items | Either


def misfit(value: Any, kind: Kind, at: str = "it") -> str | None:
    """What is wrong with the first value that is not of its kind; ``None`` where all are.

    Args:
        at: what to call the value.
    """
    match kind, value:
        case Value(), _ if kind.fits(value):
            return None
        case Record(), dict():
            inner = _entries(value, kind, at)
        case Each(), dict():
            inner = ((value[key], kind.kind, f"{at}.{key[:40]}") for key in value)
        case Items(), list() if len(value) >= kind.least and not (kind.alike and _uneven(value)):
            inner = ((each, kind.kind, f"{at}[{number}]") for number, each in enumerate(value))
        case Either(), _ if any(misfit(value, each) is None for each in kind.kinds):
            return None
        case _:
            return f"{at} is {shown(value)}; it must be {kind.words}"
    return next((found for found in (misfit(*each) for each in inner) if found is not None), None)


def _uneven(value: list[Any]) -> bool:
    return len({len(each) for each in value if isinstance(each, list)}) > 1


def _entries(value: Mapping[str, Any], kind: Record, at: str) -> Iterator[tuple[Any, Kind, str]]:
    yield from ((value.get(key), each, f"{at}.{key}") for key, each in kind.required.items())
    yield from (
        (value[key], each, f"{at}.{key}") for key, each in kind.keys.items() if value.get(key) is not None
    )


def _number(value: Any) -> bool:
    """NaN and infinities are numbers of a run that went wrong; they are left out where they cannot be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not 1e30 < abs(value) < math.inf


ANYTHING = Value("anything", lambda value: True)
TEXT = Value("text", lambda value: isinstance(value, str))
NUMBER = Value("a number", _number)
AMOUNT = Value("a number from 0", lambda value: finite(value) and 0 <= value <= 1e30)
WHOLE = Value(
    "a whole number", lambda value: isinstance(value, int) and finite(value) and 0 <= value < 1 << 62
)
WIDTH = Value("a whole number above 0", lambda value: WHOLE.fits(value) and value > 0)
SHARE = Value("a number from 0 to 1", lambda value: finite(value) and 0 <= value <= 1 + 1e-6)
LIST = Value("a list", lambda value: isinstance(value, list))
_WIDTHS = Each(Either((WIDTH, Items(WIDTH))))
_MODEL = {"total_params": AMOUNT, "active_params": AMOUNT, "loss": NUMBER, "weights_bytes": Each(NUMBER)}
_LOSSES = ("loss_unsorted_slice", "loss_sorted_slice", "loss_trained", "gap_closed")
_COSTS = ("target_cost", "realised_cost", "cost_error")
REPORT = Record(
    {
        "created": TEXT,
        "command": TEXT,
        "parent": Record({**_MODEL, "pattern": TEXT}),
        "submodels": Each(
            Record({**_MODEL, **dict.fromkeys(_LOSSES + _COSTS, NUMBER), "widths": _WIDTHS, "sample": TEXT})
        ),
        "baselines": Each(ANYTHING),
        "phases": Items(Record({"seconds": AMOUNT}, required={"name": TEXT}), least=0),
        "data": Record({"unit": TEXT, "train_tokens": AMOUNT, "eval_tokens": AMOUNT}),
        "machine": Each(ANYTHING),
        "versions": Each(ANYTHING),
    }
)
_EVALUATED = Each(Record({"loss": NUMBER, "kl": NUMBER}))
_CHOSEN = Record(
    {
        **dict.fromkeys(("cost", "realised", "target"), NUMBER),
        "widths": _WIDTHS,
        "probs": Each(Either((Items(SHARE), Items(Items(SHARE), alike=True)))),
    }
)
LINE = Record(
    {
        **dict.fromkeys(("loss", "kd_loss", "router_loss", "lr", "grad_norm", "step_ms"), NUMBER),
        "step": WHOLE,
        "tokens": AMOUNT,
        "budget": Either((TEXT, Each(ANYTHING))),
        "stage": TEXT,
        "eval": Record({"step": WHOLE, "tokens": AMOUNT, "weights": TEXT, "submodels": _EVALUATED}),
        "calibration": Record({"step": WHOLE, "tokens": AMOUNT, "unseen": Each(LIST)}),
        "router": Record(
            {"tau": NUMBER, "choices": Each(Items(WIDTH)), "budgets": Each(_CHOSEN)}, required={"step": WHOLE}
        ),
    }
)
