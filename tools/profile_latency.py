"""Time the layers of a recipe's model at every choice of its space, for budgets with ``metric: latency``.

python tools/profile_latency.py RECIPE --out table.json [--tokens N] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from elastic_megatron.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="YAML file with model and space")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file's")
    parser.add_argument("--out", type=Path, required=True, help="table to write (JSON)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per pass (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences that share them (default: 1)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timings per point; the median counts (default: 5)"
    )
    parser.add_argument("--backward", action="store_true", help="time forward and backward, for training")
    args = parser.parse_args()
    try:
        _profile(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _profile(args: argparse.Namespace) -> None:
    if min(args.tokens, args.batch, args.repeats) < 1 or args.tokens % args.batch:
        raise UserError(
            f"--tokens {args.tokens} must be a positive multiple of --batch {args.batch}, --repeats above 0"
        )
    from elastic_megatron import runtime
    from elastic_megatron.blocks.profile import profile_layers
    from elastic_megatron.checkpoint.resolve import elastic_space, parent_manifest
    from elastic_megatron.recipe import load
    from elastic_megatron.training.family import DTYPES

    recipe = load(args.recipe, args.overrides)
    manifest = parent_manifest(recipe)
    space = elastic_space(recipe, manifest)
    if space is None:
        raise UserError(f"{args.recipe} has no space.choices, so there are no widths to compare; add them")
    runtime.start()
    table = profile_layers(
        space.parent,
        dict(space.choices),
        tokens=args.tokens,
        batch=args.batch,
        repeats=args.repeats,
        backward=args.backward,
        dtype=DTYPES[recipe.model.dtype],
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
