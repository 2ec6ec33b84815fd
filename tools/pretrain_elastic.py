"""Elastic training inside Megatron-LM: its arguments, and a recipe for what it has no arguments for.

torchrun ... tools/pretrain_elastic.py MEGATRON_ARGUMENTS --elastic-recipe FILE [--elastic-rank]

docs/megatron_lm.md lists the arguments that a model needs. Exit status 2 and one `error:` line where arguments,
recipe and files do not fit together; everything else is Megatron's.
"""

from __future__ import annotations

import sys


def main() -> int:
    # Megatron and torch are imported here: writers of checkpoints and loaders of data may import this file again
    from megatron.training.arguments import parse_and_validate_args

    from elastic_megatron.errors import UserError
    from elastic_megatron.integrations.megatron_lm import ElasticPretraining, add_arguments

    try:
        ElasticPretraining(parse_and_validate_args(extra_args_provider=add_arguments)).run()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
