"""``elastic-megatron recipe show|schema``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .overrides import add_overrides

if TYPE_CHECKING:
    from ..recipe import JobChain

_KINDS = ("recipe", "cluster", "chain")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("recipe", help="show a resolved recipe, or the JSON schema of recipes")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    show = verbs.add_parser("show", help="the recipe after extends and overrides, with derived numbers")
    show.add_argument("recipe", type=Path, help="a recipe, a chain or a cluster file")
    add_overrides(show)
    show.add_argument("--json", action="store_true", help="print it as JSON, without derived numbers")
    show.set_defaults(handler=_show)
    schema = verbs.add_parser("schema", help="JSON schema for editors")
    schema.add_argument(
        "kind", nargs="?", choices=_KINDS, default="recipe", help="of which files (default: recipe)"
    )
    schema.set_defaults(handler=_schema)


def _show(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..recipe import Cluster, describe, describe_chain, is_chain, load, load_jobs
    from ..recipe.load import kind_of, open_file

    opened = open_file(str(args.recipe), [], "recipe or chain")
    if opened is not None and kind_of(opened.root) is Cluster:
        return _show_cluster(args)
    chain = load_jobs(args.recipe, args.overrides)
    _refuse_torn(chain)
    if is_chain(args.recipe):
        return _resolved(chain) if args.json else print(describe_chain(chain))
    # as `train` reads it: the number of ranks follows from the cluster file and is not written into the recipe
    own = [o for o in args.overrides if not o.lstrip().startswith(("cluster.", "cluster="))]
    recipe = load(args.recipe, own)
    if args.json:
        return recipe.model_dump(mode="json")
    print(describe(recipe, chain.jobs[0] if chain.cluster_file is not None else None))
    return None


def _refuse_torn(chain: JobChain) -> None:
    """Raise ``UserError`` for what quantisation cannot do with a model that can be read."""
    if all(job.recipe.quantize is None for job in chain.jobs):
        return
    from ..preflight.blocks import refused_at_once

    if lines := refused_at_once(chain):
        raise UserError("\n".join(lines))


def _show_cluster(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..recipe import Cluster, dump
    from ..recipe.load import read

    problems: list[str] = []
    document = read(Cluster, str(args.recipe), args.overrides, problems)
    if document is None or document.value is None or problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return document.value.model_dump(mode="json") if args.json else print(dump(document.value), end="")


def _resolved(chain: JobChain) -> dict[str, Any]:
    """The chain with its cluster and recipes, and where each job runs."""
    jobs = {
        job.name: {
            "recipe": job.recipe.model_dump(mode="json"),
            "after": job.after,
            "nodes": job.nodes,
            "ranks": job.ranks,
            "time": job.time,
        }
        for job in chain.jobs
    }
    cluster = chain.cluster.model_dump(mode="json")
    return {"name": chain.name, "run_dir": str(chain.run_dir), "cluster": cluster, "jobs": jobs}


def _schema(args: argparse.Namespace) -> None:
    from ..recipe import json_schema
    from ..recipe.load import KINDS

    print(json.dumps(json_schema(KINDS[args.kind]), indent=2))
