"""From YAML files to recipes, clusters and chains, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import checks, messages
from elastic_megatron.recipe.chain import Chain
from elastic_megatron.recipe.cluster import Cluster
from elastic_megatron.recipe.document import Node, to_yaml
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.sources import Sources
from elastic_megatron.recipe.types import Problem, Section

KINDS: dict[str, type[Section]] = {"recipe": Recipe, "cluster": Cluster, "chain": Chain}


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, merged over the files that it `extends`, under `key.key=value` overrides.

    Relative paths start from the file that wrote them; those of overrides, from the working directory.
    Raises UserError with one line per problem, each naming file, line and column, or the override.
    """
    problems: list[str] = []
    document = read(Recipe, fspath(path), overrides, problems)
    if document is None:
        raise UserError("\n".join(problems))
    return document.value


@dataclass(frozen=True)
class Document[T: Section]:
    """What a file says, and where each part of it was written."""

    value: T
    root: Node


def read[T: Section](
    kind: type[T],
    shown: str,
    overrides: Sequence[str],
    problems: list[str],
    asked_at: str = "",
    prefix: str = "",
) -> Document[T] | None:
    """The document of this kind in a file; None after adding to `problems`, one line each.

    `asked_at` stands before complaints about the file as a whole: the place that named it; `prefix` before
    overrides, as the user wrote them.
    """
    sources = Sources()
    root = sources.file(shown, asked_at=asked_at)
    for override in overrides if root is not None else ():
        root = sources.override(root, override, prefix)
    value, found = (None, []) if root is None else _parsed(kind, root)
    problems += sources.problems + found
    return None if root is None or value is None or sources.problems else Document(value, root)


def _parsed[T: Section](kind: type[T], root: Node) -> tuple[T | None, list[str]]:
    data = cast(dict[str, Any], root.plain())
    try:
        return kind.model_validate(data), []
    except ValidationError as error:
        found = messages.problems_of(error, kind)
        if kind is Recipe:
            found += _cross_problems(data, error)
        return None, messages.lines(found, root)


def _cross_problems(data: dict[str, Any], error: ValidationError) -> list[Problem]:
    """Problems between the sections that are valid, which pydantic leaves out when any section is not."""
    locations = [detail["loc"] for detail in error.errors()]
    if () in locations:
        return []
    broken = {location[0] for location in locations}
    sections = {
        name: TypeAdapter(field.annotation).validate_python(data[name]) if name in data else field.default
        for name, field in Recipe.model_fields.items()
        if name not in broken
    }
    return checks.run(sections)


def dump(document: BaseModel) -> str:
    """A resolved document as YAML, defaults included and paths absolute; it loads back to an equal one."""
    return to_yaml(document.model_dump(mode="json", exclude_none=True))


def json_schema(kind: type[Section] = Recipe) -> dict[str, Any]:
    """The JSON schema of a recipe *file* (or a cluster's, a chain's), for editors.

    Nothing is required in it and `extends` is known: a file may leave to another what it does not say.
    """
    schema = kind.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    one = {"type": "string", "description": "A file of the same kind, relative to this one."}
    extends = {
        "anyOf": [one, {"type": "array", "items": one}],
        "description": "Files that this one completes; later ones win over earlier, this file over all.",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
