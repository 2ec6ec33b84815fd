"""``key=value`` after a recipe, and the keys that a shell completes it to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def add_overrides(parser: argparse.ArgumentParser, whose: str = "the file's") -> None:
    """``[key=value ...]``, the last positional argument of commands that read a recipe or a chain."""
    action = parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help=f"values that win over {whose}, by key: optimizer.lr=1e-4, stages.0.tokens=1e9",
    )  # fmt: skip
    action.completer = completed  # pyright: ignore[reportAttributeAccessIssue] -- where argcomplete looks for it


def completed(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """What a shell offers behind ``prefix``: keys of a recipe, of a chain behind the name of each job."""
    from ..recipe import Chain, Recipe, is_chain, json_schema, load_jobs
    from ..recipe.cluster import Cluster

    keys = [f"{key}=" for key in keys_of(json_schema(Recipe))]
    file = getattr(parsed_args, "recipe", None) or getattr(parsed_args, "source", None)
    if isinstance(file, Path) and file.is_file() and is_chain(file):
        jobs = [job.name for job in load_jobs(file).jobs]
        keys = [f"{job}.{key}" for job in jobs for key in keys]
        keys += [f"{key}=" for key in keys_of(json_schema(Chain))]
        keys += [f"cluster.{key}=" for key in keys_of(json_schema(Cluster))]
    return [key for key in keys if key.startswith(prefix)]


def keys_of(schema: Mapping[str, Any]) -> list[str]:
    """Every key that a file of this kind takes, dotted; of a list, those of its first item."""
    found = _keys(schema, schema["$defs"], "")
    return sorted({key for key in found if key and key.split(".")[0] != "extends"})


def _keys(node: Mapping[str, Any], definitions: Mapping[str, Any], at: str) -> Iterator[str]:
    if "$ref" in node:
        yield from _keys(definitions[node["$ref"].rsplit("/", 1)[1]], definitions, at)
        return
    inner = [each for kind in ("anyOf", "oneOf", "allOf") for each in node.get(kind, ())]
    for each in inner:
        yield from _keys(each, definitions, at)
    for name, each in node.get("properties", {}).items():
        yield from _keys(each, definitions, f"{at}.{name}" if at else name)
    if isinstance(items := node.get("items"), Mapping):
        yield from _keys(items, definitions, f"{at}.0")
    if not inner and "properties" not in node:
        yield at
