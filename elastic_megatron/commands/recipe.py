"""``elastic-megatron recipe show|schema``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("recipe", help="show a resolved recipe, or the JSON schema of recipes")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    show = verbs.add_parser("show", help="the recipe after extends and overrides, with derived numbers")
    show.add_argument("recipe", type=Path)
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")
    show.set_defaults(handler=_show)
    schema = verbs.add_parser("schema", help="JSON schema for editors")
    schema.set_defaults(handler=_schema)


def _show(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..recipe import describe, load

    recipe = load(args.recipe, args.overrides)
    if args.json:
        return recipe.model_dump(mode="json")
    print(describe(recipe))
    return None


def _schema(_: argparse.Namespace) -> None:
    from ..recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
