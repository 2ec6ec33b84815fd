"""The scalar types of a recipe, and `Problem`, a complaint that knows which key it is about."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

Axis = Literal[
    "hidden_size",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "num_moe_experts",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "num_attention_heads",
    "num_layers",
]
"""The dimensions that may be elastic, by their Megatron `TransformerConfig` names."""

AXES: tuple[str, ...] = get_args(Axis)


class Section(BaseModel):
    """Base of every part of a recipe: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Text(str):
    """A string of a recipe that remembers the directory of the file that wrote it.

    Path fields need it: a relative path belongs to its own file, which may be anywhere in the `extends`
    chain. Every other field sees an ordinary string.
    """

    base: Path

    def __new__(cls, value: str, base: Path) -> "Text":
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


FilePath = Annotated[Path, BeforeValidator(_absolute)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
# Names that are keys too: a dot would be read as a step of a `key.key=value` override.
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
Switch = Annotated[bool, Strict()]

# Strict, or pydantic would read `true` as 1 and '12' as 12.
_Int = Annotated[int, Strict(), BeforeValidator(_integral)]
_Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[_Int, Field(ge=0)]
Positive = Annotated[_Int, Field(gt=0)]
Rate = Annotated[_Float, Field(ge=0)]
PositiveFloat = Annotated[_Float, Field(gt=0)]
Fraction = Annotated[_Float, Field(ge=0, le=1)]


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
