"""pydantic's complaints about a recipe, as lines that say where, what and the remedy."""

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from elastic_megatron.recipe.document import Node
from elastic_megatron.recipe.types import Problem, Problems, did_you_mean, show_path

Place = tuple[str | int, ...]


def lines(problems: list[Problem], root: Node) -> list[str]:
    """One line per problem: `place: key: what is wrong`."""
    shown = []
    for problem in problems:
        subject = show_path(problem.at[:-1] if problem.of_parent else problem.at)
        # One line each, even if a key or a value holds line breaks.
        text = " ".join(f"{subject + ': ' if subject else ''}{problem.text}".split())
        shown.append(f"{root.locate(problem.at).where}: {text}")
    return shown


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Everything that pydantic found in a document of type `root`, with paths as the user wrote them."""
    return [problem for detail in error.errors() for problem in _problems(detail, root)]


def _problems(detail: ErrorDetails, root: type[BaseModel]) -> Iterator[Problem]:
    at, _ = _follow(detail["loc"], root)
    context: dict[str, Any] = detail.get("ctx", {})
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
            _, section = _follow(detail["loc"][:-1], root)
            yield Problem(at, _unknown_key(str(key), list(section.model_fields), root), of_parent=True)
        case "literal_error" if detail["loc"][-1] == "[key]":
            yield Problem(at, _unknown_key(str(key), _quoted(context["expected"]), root), of_parent=True)
        case "union_tag_not_found" if isinstance(detail["input"], dict):
            name = context["discriminator"].strip("'")
            yield Problem((*at, name), f"required key {name!r} is missing", of_parent=True)
        case "union_tag_invalid":
            tag, known = str(context["tag"]), context["expected_tags"]
            text = f"must be one of {known}, got {tag!r}{did_you_mean(tag, _quoted(known))}"
            yield Problem((*at, context["discriminator"].strip("'")), text)
        case _:
            yield Problem(at, _expectation(detail))


_EXPECTED = {
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "union_tag_not_found": "must be a mapping",
    "tuple_type": "must be a list",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text (put quotes around it)",
}


def _expectation(detail: ErrorDetails) -> str:
    """What a value should have been, and what it was."""
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    text = _EXPECTED.get(kind) or detail["msg"].replace("Input should be", "must be")
    match value:
        case None:
            return f"{text}, but nothing follows the key; leave the key out for the default"
        case dict() | list() | tuple():
            return (
                text
                if kind == "too_long"
                else f"{text}, got a {'mapping' if isinstance(value, dict) else 'list'}"
            )
        case bool():
            return f"{text}, got {str(value).lower()}"
        case str():
            return f"{text}, got {str(value)!r}{did_you_mean(value, _quoted(text))}"
        case _:
            return f"{text}, got {value!r}"


def _quoted(text: str) -> list[str]:
    """The words in single quotes of a pydantic message."""
    return re.findall(r"'([^']*)'", text)


def _unknown_key(key: str, known: list[str], root: type[BaseModel]) -> str:
    """Why `key` is not accepted: a likely slip, the sections that do have it, or else what is accepted."""
    hint = did_you_mean(key, known)
    homes = sorted(_homes(root, key, ""))
    if homes:
        others = ", ".join(homes[:-1])
        hint += f"; {key!r} belongs to {others + ' or ' if others else ''}{homes[-1]}"
    return f"unknown key {key!r}{hint or '; known here: ' + ', '.join(known)}"


def _homes(section: type[BaseModel], key: str, path: str) -> set[str]:
    """Paths of the sections at or below `section` that have a field named `key`; path "" is the top level."""
    found = {path or "the top level"} if key in section.model_fields else set()
    for name, field in section.model_fields.items():
        for model in _models_in(field.annotation):
            found |= _homes(model, key, f"{path}.{name}".removeprefix("."))
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Section classes mentioned anywhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _follow(location: tuple[str | int, ...], root: type[BaseModel]) -> tuple[Place, Any]:
    """The path of keys that a pydantic location in a `root` means, and the type found there.

    pydantic adds the tag of a union's member and a `[key]` marker, neither of which the user wrote.
    """
    at: list[str | int] = []
    kind: Any = root
    for part in location:
        if part == "[key]":
            break
        members = _members(kind)
        if len(members) > 1:
            kind = next(member for member in members if part in _tags(member))
            continue
        at.append(part)
        kind = _child(members[0], part)
    return tuple(at), _members(kind)[0]


def _members(kind: Any) -> list[Any]:
    """The alternatives of a type: those of a union without None, else the type alone."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated and not _is_tagged(kind) else kind
    if get_origin(bare) in (Union, UnionType):
        return [member for member in get_args(bare) if member is not NoneType]
    return [bare]


def _is_tagged(kind: Any) -> bool:
    return any(isinstance(extra, Tag) for extra in get_args(kind)[1:])


def _tags(member: Any) -> tuple[object, ...]:
    """The tags by which a union knows a member: its `Tag`, or the values of the field that its class names."""
    if get_origin(member) is Annotated:
        return tuple(extra.tag for extra in get_args(member)[1:] if isinstance(extra, Tag))
    return get_args(member.model_fields[member.discriminator].annotation)


def _child(kind: Any, part: str | int) -> Any:
    """The type at a key or index of a container type; `object` below an unknown key."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return field.annotation if field else object
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if arguments else object
