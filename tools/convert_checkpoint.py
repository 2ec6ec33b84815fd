"""Convert between Megatron checkpoints and Hugging Face directories, with the flags of Megatron's converter.

python tools/convert_checkpoint.py --loader hf   --saver core --load-dir HF_DIR --save-dir CKPT
python tools/convert_checkpoint.py --loader core --saver hf   --load-dir CKPT   --save-dir HF_DIR [--submodel NAME]
python tools/convert_checkpoint.py --loader hf   --saver hf   --load-dir HF_DIR --save-dir HF_DIR --submodel NAME

The three lines are `elastic-megatron import`, `export` and `slice`; exit codes and messages are theirs.
"""

from __future__ import annotations

import argparse
import sys

from elastic_megatron import cli

COMMANDS = {("hf", "core"): "import", ("core", "hf"): "export", ("hf", "hf"): "slice"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loader", required=True, choices=("hf", "core"), help="format of --load-dir")
    parser.add_argument("--saver", required=True, choices=("hf", "core"), help="format of --save-dir")
    parser.add_argument("--load-dir", required=True, metavar="DIR", help="what to read")
    parser.add_argument("--save-dir", required=True, metavar="DIR", help="what to write; must not exist yet")
    parser.add_argument("--submodel", metavar="NAME", help="write this submodel instead of the whole model")
    args, rest = parser.parse_known_args()
    command = COMMANDS.get((args.loader, args.saver))
    if command is None:
        print("error: --loader core --saver core converts nothing; go through hf", file=sys.stderr)
        return 2
    submodel = ["--submodel", args.submodel] if args.submodel is not None else []
    return cli.main([command, args.load_dir, args.save_dir, *submodel, *rest])


if __name__ == "__main__":
    sys.exit(main())
