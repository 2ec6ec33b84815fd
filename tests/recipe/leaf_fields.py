"""The leaf fields of a kind of document, found in its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from elastic_megatron.recipe.annotations import bare, is_section, members_of


def leaf_fields(kind: type[BaseModel], at: str = "") -> Iterator[str]:
    """Dotted names: `[]` and `{}` stand for an item of a list or mapping of sections, `<Name>` for a union's variant."""
    for name, field in kind.model_fields.items():
        yield from _inside(field.annotation, f"{at}.{name}" if at else name)


def _inside(annotation: Any, at: str) -> Iterator[str]:
    members = [bare(member) for member in members_of(annotation)]
    if len(members) > 1:
        for member in members:
            yield from (
                leaf_fields(member, f"{at}<{member.__name__}>")
                if is_section(member)
                else [f"{at}<{_word(member)}>"]
            )
        return
    [kind] = members
    arguments = get_args(kind)
    if is_section(kind):
        yield from leaf_fields(kind, at)
    elif get_origin(kind) is dict and any(is_section(bare(m)) for m in members_of(arguments[1])):
        yield from _inside(arguments[1], f"{at}{{}}")
    elif get_origin(kind) is tuple and is_section(bare(arguments[0])):
        yield from _inside(arguments[0], f"{at}[]")
    else:
        yield at


def _word(kind: Any) -> str:
    return "table" if get_origin(kind) is dict else "word"
