"""``elastic-megatron eval SRC``: loss of one or all submodels on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.source import Source
    from ..checkpoint.stored import StoredModel

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="loss of one or all submodels on a text file")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="Megatron checkpoint or Hugging Face directory"
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score, compressed or not")
    parser.add_argument(
        "--submodel", default="all", metavar="NAME|all", help="which submodels (default: all)"
    )
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per window (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from .arguments import at_least, check_served, text_of

    at_least("--seq-length", args.seq_length, 2, ": a window needs 2 tokens to predict one")
    check_served(args.source, [] if args.submodel in ("all", "parent") else [args.submodel])
    text = text_of(args.text)
    results = evaluate_source(args.source, text, str(args.text), args.seq_length, args.submodel)
    if args.json:
        return {"submodels": results}
    for name, r in results.items():
        print(
            f"{name:>12}  loss {r['loss']:.4f} nats/token  {r['tokens']} tokens  "
            f"{r['total_params']:,} parameters, {r['active_params']:,} active, "
            f"{r['weights']} weights of {r['weights_bytes'] / 2**30:.3g} GiB"
        )
    return None


def evaluate_source(
    source: Path, text: str, name: str, seq_length: int, submodel: str = "all"
) -> dict[str, dict[str, Any]]:
    """Loss and size of the submodels as they will be served: of a quantised model, inputs of linears are rounded too.

    The text is tokenised whole without special tokens, cut into consecutive windows of ``seq_length`` and
    scored on positions 2..n of each. Messages call it ``name``.

    Returns:
        ``{name: {"loss" (nats per token), "tokens", "total_params", "active_params", "weights", "weights_bytes"}}``:
        the format or dtype of the weights, and their bytes in a directory of the submodel alone.

    Raises ``UserError`` for a text without tokens, a missing tokenizer or submodel.
    """
    from ..checkpoint.source import open_source, open_stored
    from ..cost import account
    from ..serving.model import build_served, space_of
    from ..training.distill import DistilledChunk
    from ..training.evaluate import evaluate

    opened = open_source(source)
    manifest, space = opened.manifest, space_of(opened.manifest)
    windows = _windows(opened, text, name, seq_length)
    if submodel != "all" and space is None and submodel != "parent":
        manifest.submodel(submodel)
    names = [*manifest.submodels] if submodel == "all" else [submodel]
    chosen = {} if space is None else {name: manifest.submodel(name) for name in names}
    served = build_served(opened)
    chunk = DistilledChunk(served.model, submodels=served.submodels)
    with opened.served([served.model]):
        results = evaluate([chunk], space, chosen, windows)
    stored = open_stored(source)
    out: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        cost = account(manifest.shape) if space is None else account(space, chosen[name])
        params = {"total_params": cost.total_params, "active_params": cost.active_params}
        out[name] = {**result, **params, **_stored(stored, None if space is None else name)}
    return out


def _windows(opened: Source, text: str, name: str, seq_length: int) -> list[Tensor]:
    """The text in tokens of the model."""
    from ..data.blend import windows
    from ..data.tokenizer import encode, load_tokenizer

    if opened.hf_files is None:
        raise UserError(f"{opened.path} carries no tokenizer; export it with a model that has one")
    found = list(windows(encode(load_tokenizer(opened.hf_files), text), seq_length))
    if not found:
        raise UserError(f"{name} has fewer than 2 tokens; give a longer text")
    largest, size = max(int(w.max()) for w in found), opened.manifest.shape.vocab_size
    if largest >= size:
        raise UserError(
            f"the tokenizer in {opened.hf_files} gives token {largest}, but the model's vocabulary has "
            f"{size}; put the tokenizer of the model there"
        )
    return found


def _stored(stored: StoredModel, submodel: str | None) -> dict[str, Any]:
    """Format or dtype of the weights of a submodel, and their bytes in a directory of its own."""
    from ..conversion import weights_bytes

    dtype = str(stored.dtype(next(iter(stored.tensors.values())))).removeprefix("torch.")
    weights = _DTYPES[dtype] if stored.quantised is None else stored.quantised.format.name
    return {"weights": weights, "weights_bytes": weights_bytes(stored, submodel)}
