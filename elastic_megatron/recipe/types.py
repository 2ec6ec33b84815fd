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


# Whole numbers lie below, in files too: those that are larger are slips, and not every library takes them.
LARGEST = 2**63


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


def shown_value(value: object) -> str:
    """A value as the user wrote it, more or less; only the kind of a list or mapping, which may be long."""
    match value:
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return "a secret" if holds_secret(value) else _cut(repr(str(value)))
        case _:
            return repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def expand(text: str) -> str:
    """`text` with every `${NAME}` replaced by that variable of the environment.

    Raises ValueError for one that is not set, for one that holds a secret by its name, for other spellings, and for
    characters that would break a line of a job script.
    """

    def lookup(match: re.Match[str]) -> str:
        if not (name := match[1]):
            raise ValueError(f"{text!r}: a variable of the environment is written ${{NAME}}")
        if is_secret(name):
            raise ValueError(f"${{{name}}} would be written out, and it looks like a secret")
        if not (found := os.environ.get(name, "")):
            raise ValueError(f"${{{name}}} is not set in the environment; set it, or write the value out")
        return found

    whole = re.sub(r"\$(?:\{(\w+)\}|[A-Za-z_{(])", lookup, text)
    if not whole.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", whole):
        raise ValueError(f"must be text on one line, got {whole!r}")
    return whole


def is_secret(variable: str) -> bool:
    """Does the name of a variable say that nobody should read its value?"""
    return bool(_SECRET_NAME.search(variable))


_SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|TOKEN|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?)($|_)|_KEY($|_)", re.IGNORECASE
)
_ASSIGNED = re.compile(r"\b([A-Za-z_]\w*)=(?=[\"']?[^\s\"'$`])")
_SECRET_TEXT = re.compile(
    r"--?(token|password|api-key)\s+[^\s$-]"  # of a command
    r"|\b(hf_|ghp_|github_pat_|glpat-|nvapi-|sk-)\w{16}"  # by the prefixes that services give theirs
    r"|://[^/\s:@$]+:[^/\s@$]+@",  # user:password@host
    re.IGNORECASE,
)


def holds_secret(text: str) -> bool:
    """Is there something in `text` that looks like a password or a key, rather than a reference to one?"""
    return bool(_SECRET_TEXT.search(text)) or any(is_secret(name) for name in _ASSIGNED.findall(text))


def one_line(text: str) -> str:
    """`text`, which goes into a job script. Raises ValueError where it would break its line, or holds a secret."""
    if not text.strip() or not text.isprintable():
        raise ValueError("must be one line of text, and not empty")
    if holds_secret(text):
        raise ValueError(
            "looks like a secret in plain sight; set a variable where you submit, and name it in environment"
        )
    return str(text)


def absolute(value: object) -> Path:
    """`value` as an absolute path: relative to its recipe file, else to the working directory."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be a path" if value is None else f"must be a path, got {shown_value(value)}")
    base = value.base if isinstance(value, Text) else Path.cwd()
    return Path(os.path.abspath(base / os.path.expanduser(expand(str(value)))))


def expanded(value: object) -> object:
    """Text with its variables replaced; the rest is left to pydantic."""
    if value == "":
        raise ValueError("must not be empty; leave the key out for none")
    return expand(value) if isinstance(value, str) else value


def seconds(duration: str) -> int:
    """Seconds of `HOURS:MINUTES:SECONDS` or `DAYS-HOURS:MINUTES:SECONDS`, as Slurm writes them."""
    days, _, clock = duration.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _duration(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if not re.fullmatch(r"([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]", text):
        raise ValueError(f"must be a time such as 0:30:00 or 2-12:00:00, got {shown_value(value)}")
    if not seconds(text):
        raise ValueError("must be more than no time at all")
    return str(text)


def _integral(value: object) -> object:
    """Turn 100e9 into an int, since token counts read best that way; leave the rest to pydantic."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < LARGEST
    return int(value) if isinstance(value, float) and whole else value


def _name_pattern(punctuation: str) -> str:
    """Names that are safe in paths: letters, digits and `punctuation`, a letter or digit first."""
    return rf"^[A-Za-z0-9][A-Za-z0-9{re.escape(punctuation)}]{{0,99}}$"


def _name(pattern: str, allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            rule = f"use up to 100 letters, digits or {allowed}, the first a letter or digit"
            raise ValueError(f"{_cut(repr(value))} is not a name: {rule}")
        return value

    return check


# The two kinds of text in which `${NAME}` is looked up: paths, and what a site decides for each user.
FilePath = Annotated[Path, BeforeValidator(absolute)]
EnvText = Annotated[str, BeforeValidator(expanded), Field(min_length=1)]
Duration = Annotated[str, BeforeValidator(_duration)]
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


def default_tag(key: str, tag: str) -> BeforeValidator:
    """For a union told apart by `key`: a mapping without that key is the variant `tag`."""

    def fill(value: object) -> object:
        return {key: tag, **value} if isinstance(value, dict) and key not in value else value

    return BeforeValidator(fill)


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
    near = closest(word, known)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `word` may stand for.

    First choice: the same but for case and punctuation; then those that begin with it; then those of which few
    letters differ.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text).lower()

    names, wanted = {name: plain(name) for name in known}, plain(word)
    near = [name for name, letters in names.items() if letters == wanted]
    if not near and len(wanted) > 2:
        near = [name for name, letters in names.items() if letters.startswith(wanted)][:2]
    return near or difflib.get_close_matches(word, list(names), n=1, cutoff=0.65)
