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
from elastic_megatron.recipe.variants import without_abandoned

KINDS: dict[str, type[Section]] = {"recipe": Recipe, "cluster": Cluster, "chain": Chain}
WORDS: dict[type[Section], str] = {Recipe: "recipe", Cluster: "cluster file", Chain: "chain"}


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, merged over the files that it `extends`, under `key.key=value` overrides.

    Relative paths start from the file that wrote them; those of overrides, from the working directory.
    Raises UserError with one line per problem, each naming file, line and column, or the override.
    """
    problems: list[str] = []
    document = read(Recipe, fspath(path), overrides, problems)
    if document is None or document.value is None or problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return document.value


@dataclass(frozen=True)
class Document[T: Section]:
    """What a file says (None if that is not valid), and where each part of it was written."""

    value: T | None
    root: Node


@dataclass(frozen=True)
class Opened:
    """A file merged over those that it extends; not `complete` where one of these cannot be used."""

    root: Node
    complete: bool


def open_file(shown: str, problems: list[str], word: str, asked_at: str = "") -> Opened | None:
    """The keys in a file, whatever it describes; None if it cannot be read.

    What is wrong is added to `problems`, a line each. `word` is what messages call the file; `asked_at` stands
    before complaints about the file as a whole: the place that named it.
    """
    sources = Sources(problems, word)
    root = sources.file(shown, asked_at=asked_at)
    return None if root is None else Opened(root, sources.complete)


def parse[T: Section](
    kind: type[T], opened: Opened, overrides: Sequence[str], problems: list[str], prefix: str = ""
) -> Document[T] | None:
    """The document of this kind in an open file; whatever is wrong with it is added to `problems`, a line each.

    None where the file describes something else. `prefix` stands before overrides, as the user wrote them.
    """
    if other := _other_kind(kind, opened.root):
        problems.append(other)
        return None
    root, sources = opened.root, Sources(problems)
    for override in overrides:
        root = sources.override(root, override, prefix)
    root = without_abandoned(root, kind)
    value, found = _parsed(kind, root, opened.complete)
    problems += found
    return Document(value, root)


def read[T: Section](
    kind: type[T],
    shown: str,
    overrides: Sequence[str],
    problems: list[str],
    asked_at: str = "",
    prefix: str = "",
) -> Document[T] | None:
    """`open_file` and `parse`; None where there is nothing to look into."""
    opened = open_file(shown, problems, WORDS[kind], asked_at)
    return None if opened is None else parse(kind, opened, overrides, problems, prefix)


def kind_of(root: Node) -> type[Section] | None:
    """What a file describes, by the keys at its top: the kind that knows the most of them, if it is only one."""
    assert isinstance(root.value, dict)
    known = {kind: len(root.value.keys() & kind.model_fields.keys()) for kind in WORDS}
    most = max(known.values())
    best = [kind for kind in WORDS if known[kind] == most]
    return best[0] if len(best) == 1 else None


def _other_kind(kind: type[Section], root: Node) -> str | None:
    """Complaint about a file that describes something else than `kind`."""
    found = kind_of(root)
    if found in (kind, None):
        return None
    assert isinstance(root.value, dict) and found is not None
    file = root.mark.where.rsplit(":", 2)[0]
    foreign = {
        key: node.mark.where
        for key, node in root.value.items()
        if key in found.model_fields and key not in kind.model_fields
    }
    # rather a key of this file than of one that it extends
    key, where = min(foreign.items(), key=lambda entry: not entry[1].startswith(f"{file}:"))
    return f"{where}: a {WORDS[kind]} belongs here, but {key!r} is a key of a {WORDS[found]}"


def _parsed[T: Section](kind: type[T], root: Node, complete: bool) -> tuple[T | None, list[str]]:
    """The document, and what is wrong with it; an incomplete one is not blamed for what it lacks."""
    data = cast(dict[str, Any], root.plain())
    try:
        return kind.model_validate(data), []
    except ValidationError as error:
        found = messages.problems_of(error, kind, WORDS, complete)
        if kind is Recipe and complete:
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
