"""``elastic-megatron quantize RECIPE``."""

from __future__ import annotations

import argparse
from typing import Any

from .train import add_recipe_arguments, show_quantized


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="round a trained family to FP8 or NVFP4: calibrate through every submodel, save and judge",
    )
    add_recipe_arguments(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..recipe import load
    from ..training.checks import check_quantize

    recipe = load(args.recipe, args.overrides)
    check_quantize(recipe)
    from ..training.quantize import quantize

    done = quantize(recipe)
    if not done.main:
        return None
    if args.json:
        return {"checkpoint": str(done.checkpoint), "unseen": done.unseen}
    for layer, experts in (done.unseen or {}).items():
        print(
            f"warning: {layer}: calibration never reached experts {experts}; they have the range of the others"
        )
    show_quantized(recipe.run_dir)
    before = " before" if done.unseen is None else ""
    print(f"quantised{before}; checkpoint in {done.checkpoint}")
    return None
