"""``elastic-megatron rank RECIPE``."""

from __future__ import annotations

import argparse
from typing import Any

from .train import add_recipe_arguments


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("rank", help="score every component of the parent and sort its weights")
    add_recipe_arguments(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..recipe import load
    from ..training.checks import check_rank

    recipe = load(args.recipe, args.overrides)
    check_rank(recipe)
    from ..report.ranking_plots import plot_ranking
    from ..training.rank import rank

    ranked = rank(recipe)
    if not ranked.main:
        return None
    plots = plot_ranking(recipe.run_dir / "ranking.safetensors", recipe.run_dir / "plots")
    unseen = ranked.ranking.unseen()
    if args.json:
        return {
            "checkpoint": str(ranked.checkpoint),
            "tokens": ranked.ranking.token_count,
            "logits_error": ranked.logits_error,
            "unseen": unseen,
        }
    for key, components in unseen.items():
        print(f"warning: {key}: the calibration data never reached {components}; they are ranked last")
    print(
        f"ranked on {ranked.ranking.token_count:,} tokens; sorting moved the logits by {ranked.logits_error:.1e} "
        f"(rounding)\nsorted checkpoint in {ranked.checkpoint}\n{len(plots)} plots in {recipe.run_dir / 'plots'}"
    )
    return None
