"""pydantic's complaints about a document, as lines that say where, what and the remedy."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from elastic_megatron.recipe.annotations import Path, Place, follow, is_section, tags_of
from elastic_megatron.recipe.document import Node, Unreadable
from elastic_megatron.recipe.types import Problem, Problems, closest, did_you_mean, show_path, shown_value

Kinds = dict[type[BaseModel], str]
_MOST, _LONGEST = 50, 600


def lines(problems: Iterable[Problem], root: Node) -> list[str]:
    """One line per problem: `place: key: what is wrong`. What could not be read is complained about already."""
    shown = []
    for problem in problems:
        node = root.deepest(problem.at)
        if isinstance(node.value, Unreadable):
            continue
        subject = show_path(problem.at[:-1] if problem.of_parent else problem.at)
        # One line each, even if a key or a value holds line breaks.
        text = " ".join(f"{subject + ': ' if subject else ''}{problem.text}".split())
        shown.append(f"{node.mark.where}: {text if len(text) < _LONGEST else text[:_LONGEST] + '...'}")
    return shown


def problems_of(error: ValidationError, root: type[BaseModel], kinds: Kinds, complete: bool) -> list[Problem]:
    """pydantic's complaints about a document of type `root`, with paths as the user wrote them.

    `kinds` are all kinds of documents with their names, to tell where an unknown key belongs. A document that is not
    `complete` is not blamed for what it lacks.
    """
    details = [detail for detail in error.errors() if complete or not _about_absence(detail, root)]
    more, details = len(details) - _MOST, details[:_MOST]
    meant = {place for detail in details for place in _meant(detail, root)}
    found = [
        problem
        for detail in details
        if detail["type"] != "missing" or follow(detail["loc"], root).at not in meant
        for problem in _problems(detail, root, kinds)
    ]
    return [*found, Problem((), f"and {more} problems more")] if more > 0 else found


def _about_absence(detail: ErrorDetails, root: type[BaseModel]) -> bool:
    """Might a complaint go away with keys that are missing? So do rules over a section, and choices of a variant."""
    match detail["type"]:
        case "missing":
            return True
        case "value_error" | "union_tag_not_found":
            return is_section(follow(detail["loc"], root).kind)
        case "extra_forbidden":
            return bool(follow(detail["loc"][:-1], root).variants)
    return False


def _meant(detail: ErrorDetails, root: type[BaseModel]) -> list[Path]:
    """What an unknown key was likely meant to be: it is not missing then, but misspelt."""
    if detail["type"] != "extra_forbidden":
        return []
    section, key = follow(detail["loc"][:-1], root), detail["loc"][-1]
    return [(*section.at, name) for name in closest(str(key), section.kind.model_fields)]


def _problems(detail: ErrorDetails, root: type[BaseModel], kinds: Kinds) -> Iterator[Problem]:
    place = follow(detail["loc"], root)
    at, context = place.at, detail.get("ctx", {})
    key = at[-1] if at else ""
    match detail["type"]:
        case "value_error" if isinstance(context["error"], Problems):
            for problem in context["error"].problems:
                yield Problem((*at, *problem.at), problem.text, problem.of_parent)
        case "missing" if isinstance(key, str):
            yield Problem(at, f"required key {key!r} is missing", of_parent=True)
        case "missing":
            yield Problem(at[:-1], f"is too short: item {key} is missing")
        case "extra_forbidden":
            section = follow(detail["loc"][:-1], root)
            yield Problem(at, _unknown_key(str(key), section, root, kinds), of_parent=True)
        case "literal_error" if detail["loc"][-1] == "[key]":
            known = _quoted(context["expected"])
            yield Problem(at, f"unknown key {key!r}{_hint(str(key), known)}", of_parent=True)
        case "union_tag_not_found" if isinstance(detail["input"], dict):
            name = context["discriminator"].strip("'")
            yield Problem((*at, name), f"required key {name!r} is missing", of_parent=True)
        case "union_tag_invalid":
            name, known = context["discriminator"].strip("'"), context["expected_tags"]
            tag = detail["input"][name]
            hint = did_you_mean(tag, _quoted(known)) if isinstance(tag, str) else ""
            yield Problem((*at, name), f"must be one of {known}, got {shown_value(tag)}{hint}")
        case _:
            yield Problem(at, _expectation(detail, place.optional))


_EXPECTED = {
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "union_tag_not_found": "must be a mapping",
    "tuple_type": "must be a list",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _expectation(detail: ErrorDetails, optional: bool) -> str:
    """What a value should have been, and what it was."""
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    text = _EXPECTED.get(kind) or detail["msg"].replace("Input should be", "must be")
    if value is None:
        return (
            f"{text}, but nothing follows the key{'; leave the key out for the default' if optional else ''}"
        )
    if kind in ("too_long", "too_short", "string_too_short"):
        return text
    got = f"{text}, got {shown_value(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"{got}; put quotes around it"
    return got + (did_you_mean(value, _quoted(text)) if isinstance(value, str) else "")


def _quoted(text: str) -> list[str]:
    """The words in single quotes of a pydantic message."""
    return re.findall(r"'([^']*)'", text)


def _hint(key: str, known: Iterable[str], homes: str = "") -> str:
    """A likely slip, the places that do have such a key, or else what is known."""
    return did_you_mean(key, known) + homes or f"; known here: {', '.join(known)}"


def _unknown_key(key: str, place: Place, root: type[BaseModel], kinds: Kinds) -> str:
    """Why `key` is not accepted in a section: it is another variant's, a slip, or some other section's."""
    section, text = place.kind, f"unknown key {key!r}"
    if key == "extends":
        return f"{text}; extends stands at the top of a file"
    having = [member for member in place.variants if is_section(member) and key in member.model_fields]
    if tags := [str(tag) for member in having for tag in tags_of(member)]:
        return f"{text}; {key!r} belongs to {section.discriminator}: {_either(tags)}"
    homes = _in_order(_homes(root, key, "")) or [
        home for kind in kinds for home in _elsewhere(kind, key, kinds[kind])
    ]
    belongs = f"; {key!r} belongs to {_either(homes)}" if homes else ""
    return text + _hint(key, section.model_fields, belongs)


def _either(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


_TOP = "the top level"


def _homes(section: type[BaseModel], key: str, path: str) -> set[str]:
    """Paths of the sections at or below `section` that have a field named `key`; path "" is the top level."""
    found = {path or _TOP} if key in section.model_fields else set()
    for name, field in section.model_fields.items():
        for model in _models_in(field.annotation):
            found |= _homes(model, key, f"{path}.{name}".removeprefix("."))
    return found


def _in_order(homes: Iterable[str]) -> list[str]:
    """The top level first: a section below it may only make exceptions."""
    return sorted(homes, key=lambda home: (home != _TOP, home))


def _elsewhere(kind: type[BaseModel], key: str, word: str) -> list[str]:
    """Where another kind of document has a key."""
    return [
        f"the {word}" if home == _TOP else f"{home} of the {word}"
        for home in _in_order(_homes(kind, key, ""))
    ]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Section classes mentioned anywhere in a type."""
    if is_section(annotation):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
