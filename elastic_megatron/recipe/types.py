"""The scalar types of a recipe, and `Problem`, a complaint that knows which key it is about."""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from elastic_megatron.space.axes import AXIS_NAMES

if TYPE_CHECKING:
    Axis = str
else:
    # The names live in the space; a type checker cannot follow, and needs no more than str.
    Axis = Literal[*AXIS_NAMES]


class Section(BaseModel):
    """Base of every part of a recipe: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Text(str):
    """A string of a recipe that remembers the directory of the file that wrote it.

    Path fields need it: a relative path belongs to its own file, which may be anywhere in the `extends`
    chain. Every other field sees an ordinary string.
    """

    base: Path

    def __new__(cls, value: str, base: Path) -> Self:
        text = super().__new__(cls, value)
        text.base = base
        return text


def _absolute(value: object) -> object:
    """`value` as an absolute path: relative to its recipe file, else to the working directory."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be a path" if value is None else f"must be a path, got {value!r}")
    base = value.base if isinstance(value, Text) else Path.cwd()
    return Path(os.path.abspath(base / os.path.expanduser(value)))


def _integral(value: object) -> object:
    """Turn 100e9 into an int, since token counts read best that way; leave the rest to pydantic."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name_pattern(punctuation: str) -> str:
    """Names that are safe in paths: letters, digits and `punctuation`, a letter or digit first."""
    return rf"^[A-Za-z0-9][A-Za-z0-9{re.escape(punctuation)}]{{0,99}}$"


def _name(pattern: str, allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            rule = f"use up to 100 letters, digits or {allowed}, the first a letter or digit"
            raise ValueError(f"{value!r} is not a name: {rule}")
        return value

    return check


FilePath = Annotated[Path, BeforeValidator(_absolute)]
_NAME, _KEY = _name_pattern("_-."), _name_pattern("_-")
Name = Annotated[str, AfterValidator(_name(_NAME, "_ - .")), Field(json_schema_extra={"pattern": _NAME})]
# A name that is also a key: a dot would be read as a step of a `key.key=value` override.
Key = Annotated[str, AfterValidator(_name(_KEY, "_ -")), Field(json_schema_extra={"pattern": _KEY})]
Switch = Annotated[bool, Strict()]

# Strict, or pydantic would read `true` as 1 and '12' as 12.
_Whole = BeforeValidator(_integral)
Count = Annotated[int, Strict(), Field(ge=0), _Whole]
Positive = Annotated[int, Strict(), Field(gt=0), _Whole]
Rate = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a recipe.

    `at` is the path of keys and list indices, relative to whoever reports it. With `of_parent` the last
    key of `at` is itself the subject (unknown, missing), so the text is about the section that holds it.
    """

    at: tuple[str | int, ...]
    text: str
    of_parent: bool = False


class Problems(ValueError):
    """Several problems at once, raised inside a pydantic validator."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{show_path(p.at)}: {p.text}" for p in self.problems))


def raise_any(problems: Iterable[Problem]) -> None:
    """Raise `Problems` if there are any."""
    if found := tuple(problems):
        raise Problems(found)


def show_path(at: Iterable[str | int]) -> str:
    """`("stages", 1, "lr")` as `stages[1].lr`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'small'?` if one of `known` is close to `word`, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
