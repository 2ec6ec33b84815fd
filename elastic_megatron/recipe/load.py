"""From a YAML file to a `Recipe` and back."""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import checks, messages
from elastic_megatron.recipe.document import to_yaml
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.sources import Sources
from elastic_megatron.recipe.types import Problem


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, merged over the files that it `extends`, under `key.key=value` overrides.

    Relative paths start from the file that wrote them; those of overrides, from the working directory.
    Raises UserError with one line per problem, each naming file, line and column, or the override.
    """
    sources = Sources()
    root = sources.file(fspath(path))
    if root is None:
        raise UserError("\n".join(sources.problems))
    for override in overrides:
        root = sources.override(root, override)
    data = root.plain()
    assert isinstance(data, dict)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = messages.problems_of(error) + _cross_problems(data, error)
        raise UserError("\n".join(sources.problems + messages.lines(found, root))) from None
    if sources.problems:
        raise UserError("\n".join(sources.problems))
    return recipe


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


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included and paths absolute; it loads back to an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json", exclude_none=True))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe *file*, for editors.

    Nothing is required in it and `extends` is known: a file may leave to another what it does not say.
    """
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    one = {"type": "string", "description": "A recipe file, relative to this one."}
    extends = {
        "anyOf": [one, {"type": "array", "items": one}],
        "description": "Recipes that this one completes; later ones win over earlier, this file over all.",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
