"""``elastic-megatron train RECIPE``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .overrides import add_overrides

if TYPE_CHECKING:
    from ..recipe import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """``RECIPE [key=value ...] [--json]``, the arguments of every command that runs a recipe."""
    parser.add_argument("recipe", type=Path, help="YAML file")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help="train the recipe's stages; run it again to resume from the newest checkpoint"
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--accept-missed-budgets", action="store_true", help="short for router.accept_missed_budgets=true"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train. After a signal the run is saved and the exit status is ``training.signals.exit_status``."""
    from ..recipe import load
    from ..training.checks import check_train
    from ..training.signals import exit_status, leaving_at_once

    with leaving_at_once():
        accepted = ["router.accept_missed_budgets=true"] if args.accept_missed_budgets else []
        recipe = load(args.recipe, [*args.overrides, *accepted])
        check_train(recipe)
        from ..training.train import train

        outcome = train(recipe)
    if outcome.interrupted is not None:
        raise SystemExit(exit_status(outcome.interrupted))
    if not outcome.main:
        return None
    if not args.json:
        show_router(recipe.run_dir)
        show_quantized(recipe.run_dir)
    check_budgets(recipe, outcome.checkpoint)
    if args.json:
        return {"checkpoint": str(outcome.checkpoint), "step": outcome.step}
    print(f"trained {outcome.step} steps; checkpoint in {outcome.checkpoint}")
    return None


def check_budgets(recipe: Recipe, checkpoint: Path) -> None:
    """Say which sizes miss their budgets, when the last stage has ended.

    Raises ``UserError`` where one misses it by more than ``router.missed.REFUSED``, unless the recipe accepts that.
    """
    from ..checkpoint import tracker
    from ..checkpoint.manifest import FILE, Manifest
    from ..router import missed

    if recipe.router_frozen or not recipe.budgets or recipe.last_step < sum(s.steps for s in recipe.stages):
        return
    manifest = Manifest.read(tracker.resolve(checkpoint) / FILE)
    assert manifest.space is not None
    found = missed(manifest.space, manifest.budgets, manifest.submodels)
    refused = [size for size in found if size.refused and not recipe.router.accept_missed_budgets]
    for size in found:
        if size not in refused:
            print(f"warning: {size}", file=sys.stderr)
    if refused:
        raise UserError(
            f"{'; '.join(map(str, refused))}; the checkpoint {checkpoint} is whole: accept it with "
            "router.accept_missed_budgets=true, or train a new run with more tokens, a greater router.lr or "
            "router.loss_weight, or other space.choices"
        )


def show_quantized(run_dir: Path) -> None:
    """Print what rounding cost and what distillation won back, where the run quantises."""
    from rich.console import Console

    from ..report.console import quantized_table

    if (table := quantized_table(run_dir)) is not None:
        Console(stderr=True).print(table)


def show_router(run_dir: Path) -> None:
    """Print what the budget router chose last, where the run has one."""
    from rich.console import Console

    from ..files.json_files import parse_line
    from ..report.console import router_table

    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text(errors="replace").splitlines() if metrics.exists() else []
    routed = [line for text in lines if text.startswith('{"router"') and (line := parse_line(text))]
    if routed:
        Console(stderr=True).print(router_table(routed[-1]["router"]))
