"""The types of a document's parts, found by the keys that lead there."""

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, Tag

Path = tuple[str | int, ...]


def is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Is a type one of ours that has fields?"""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@dataclass(frozen=True)
class Place:
    """What pydantic means by a location.

    `at` is the path of keys, `kind` the type there, `variants` the types that could have been there instead (of a
    union), `optional` whether the key may be left out.
    """

    at: Path
    kind: Any
    variants: tuple[Any, ...] = ()
    optional: bool = False


def follow(location: tuple[str | int, ...], root: type[BaseModel]) -> Place:
    """The place of a pydantic location in a `root`.

    pydantic adds the tag of a union's member and a `[key]` marker, neither of which the user wrote.
    """
    place = Place((), root)
    for part in location:
        if part == "[key]":
            break
        members = members_of(place.kind)
        chosen = [member for member in members if part in tags_of(member)] if len(members) > 1 else []
        if chosen:
            others = tuple(member for member in members if member is not chosen[0])
            place = Place(place.at, bare(chosen[0]), others, place.optional)
        else:
            kind, optional = child(members[0], part)
            place = Place((*place.at, part), kind, (), optional)
    return Place(place.at, members_of(place.kind)[0], place.variants, place.optional)


def bare(kind: Any) -> Any:
    """A type without `Annotated`, and without `None` where that is the only alternative."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    members = [member for member in get_args(kind) if member is not NoneType]
    return bare(members[0]) if get_origin(kind) in (Union, UnionType) and len(members) == 1 else kind


def members_of(kind: Any) -> list[Any]:
    """The alternatives of a type: those of a union without None, else the type alone."""
    kind = bare(kind)
    if get_origin(kind) in (Union, UnionType):
        return [member for member in get_args(kind) if member is not NoneType]
    return [kind]


def tags_of(member: Any) -> tuple[object, ...]:
    """The tags by which a union knows a member: its `Tag`, or the values of the field that its class names."""
    if get_origin(member) is Annotated:
        return tuple(extra.tag for extra in get_args(member)[1:] if isinstance(extra, Tag))
    return get_args(member.model_fields[member.discriminator].annotation)


def child(kind: Any, part: str | int) -> tuple[Any, bool]:
    """The type at a key or index of a container type, and whether it has a default; `object` below an unknown key."""
    if is_section(kind):
        field = kind.model_fields.get(str(part))
        return (field.annotation, not field.is_required()) if field else (object, False)
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1], True
    return (arguments[0] if arguments else object), False
