"""``elastic-megatron train RECIPE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """``RECIPE [key=value ...] [--json]``, the arguments of every command that runs a recipe."""
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help="train the recipe's stages; run it again to resume from the newest checkpoint"
    )
    add_recipe_arguments(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train. After a signal the run is saved and the exit status is ``training.signals.exit_status``."""
    from ..recipe import load
    from ..training.checks import check_train
    from ..training.signals import exit_status, leaving_at_once

    with leaving_at_once():
        recipe = load(args.recipe, args.overrides)
        check_train(recipe)
        from ..training.train import train

        outcome = train(recipe)
    if outcome.interrupted is not None:
        raise SystemExit(exit_status(outcome.interrupted))
    if not outcome.main:
        return None
    if args.json:
        return {"checkpoint": str(outcome.checkpoint), "step": outcome.step}
    show_router(recipe.run_dir)
    show_quantized(recipe.run_dir)
    print(f"trained {outcome.step} steps; checkpoint in {outcome.checkpoint}")
    return None


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
