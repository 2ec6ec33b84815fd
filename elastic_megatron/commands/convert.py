"""``elastic-megatron import``, ``export`` and ``slice``: between Megatron checkpoints and Hugging Face directories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError

_DTYPES = ("fp32", "bf16")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="Hugging Face directory -> Megatron checkpoint")
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("destination", type=Path, metavar="CKPT")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=_import)

    parser = subparsers.add_parser("export", help="Megatron checkpoint -> Hugging Face directory")
    parser.add_argument("source", type=Path, metavar="CKPT", help="run folder, checkpoint or iter_* folder")
    parser.add_argument("destination", type=Path, metavar="HF_DIR")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--submodel", metavar="NAME", help="export one submodel")
    what.add_argument(
        "--elastic", action="store_true", help="the full model with elastic_config.json, to slice later"
    )
    parser.add_argument(
        "--plain-order", action="store_true", help="undo the lanes: plain prefixes, best first"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="data type of the weights (default: as stored)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=_export)

    parser = subparsers.add_parser("slice", help="cut one submodel out of an elastic directory or checkpoint")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="elastic Hugging Face directory or checkpoint"
    )
    parser.add_argument("destination", type=Path, metavar="DST")
    parser.add_argument("--submodel", required=True, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=_slice)


def _import(args: argparse.Namespace) -> dict[str, Any] | None:
    from .. import runtime
    from ..blocks import build_model
    from ..checkpoint import distributed, tracker
    from ..checkpoint.source import open_source

    if tracker.is_checkpoint(args.destination):
        raise UserError(f"{args.destination} holds a checkpoint already; choose another folder")
    source = open_source(args.source)
    runtime.start()
    model = build_model(source.manifest.shape)
    source.fill([model])
    distributed.save(args.destination, 0, [model], source.manifest, hf_files=source.hf_files)
    return _done(args)


def _export(args: argparse.Namespace) -> dict[str, Any] | None:
    export(
        args.source,
        args.destination,
        submodel=args.submodel,
        elastic=args.elastic,
        plain_order=args.plain_order,
        dtype=args.dtype,
    )
    return _done(args)


def _slice(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..checkpoint import tracker
    from ..checkpoint.hf import slice_hf

    if tracker.is_checkpoint(args.source):
        export(args.source, args.destination, submodel=args.submodel)
    else:
        slice_hf(args.source, args.destination, args.submodel)
    return _done(args)


def _done(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.json:
        return {"written": str(args.destination)}
    print(f"wrote {args.destination}")
    return None


def export(
    source: Path,
    destination: Path,
    *,
    submodel: str | None = None,
    elastic: bool = False,
    plain_order: bool = False,
    dtype: str | None = None,
) -> None:
    """Write a checkpoint's model, or one of its submodels, as a Hugging Face directory.

    Raises ``UserError`` for an unknown submodel, a destination that exists, or a checkpoint that is damaged.
    """
    import torch

    from .. import runtime
    from ..blocks import build_model
    from ..checkpoint.hf import write_hf
    from ..checkpoint.slice import weights
    from ..checkpoint.source import open_source

    opened = open_source(source)
    if submodel is not None:
        opened.manifest.submodel(submodel)
    if elastic and opened.manifest.space is None:
        raise UserError(f"{source} is not elastic; export it without --elastic")
    runtime.start()
    model = build_model(opened.manifest.shape)
    opened.fill([model])
    write_hf(
        destination,
        opened.manifest,
        weights(model.state_dict()).items(),
        submodel=submodel,
        elastic=elastic,
        tokenizer_dir=opened.hf_files,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[dtype],
        plain_order=plain_order,
    )
