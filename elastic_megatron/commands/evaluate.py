"""``elastic-megatron eval SRC``: loss of one or all submodels on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="loss of one or all submodels on a text file")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="Megatron checkpoint or Hugging Face directory"
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file to score")
    parser.add_argument(
        "--submodel", default="all", metavar="NAME|all", help="which submodels (default: all)"
    )
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per window (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    results = evaluate_source(args.source, args.text, args.seq_length, args.submodel)
    if args.json:
        return {"submodels": results}
    for name, r in results.items():
        print(
            f"{name:>12}  loss {r['loss']:.4f} nats/token  {r['tokens']} tokens  "
            f"{r['total_params']:,} parameters, {r['active_params']:,} active"
        )
    return None


def evaluate_source(
    source: Path, text: Path, seq_length: int, submodel: str = "all"
) -> dict[str, dict[str, Any]]:
    """``{name: {"loss" (nats per token), "tokens", "total_params", "active_params"}}``.

    The text is tokenised whole without special tokens, cut into consecutive windows of ``seq_length`` and
    scored on positions 2..n of each. Raises ``UserError`` for a missing text, tokenizer or submodel.
    """
    from .. import runtime
    from ..blocks import build_elastic_model, build_model
    from ..checkpoint.source import open_source
    from ..cost import account
    from ..data.blend import windows
    from ..data.tokenizer import encode, load_tokenizer
    from ..training.evaluate import evaluate

    opened = open_source(source)
    manifest = opened.manifest
    if opened.hf_files is None:
        raise UserError(f"{source} carries no tokenizer; export it with a model that has one")
    token_windows = list(windows(encode(load_tokenizer(opened.hf_files), _read(text)), seq_length))
    if not token_windows:
        raise UserError(f"{text} has fewer than 2 tokens; give a longer text")
    largest = max(int(w.max()) for w in token_windows)
    if largest >= manifest.shape.vocab_size:
        raise UserError(
            f"the tokenizer in {opened.hf_files} gives token {largest}, but the model's vocabulary has "
            f"{manifest.shape.vocab_size}; put the tokenizer of the model there"
        )
    elastic = manifest.space is not None and manifest.submodels
    if submodel != "all" and not elastic and submodel != "parent":
        manifest.submodel(submodel)
    runtime.start()
    if not elastic:
        chunks = [build_model(manifest.shape)]
        opened.fill(chunks)
        costs = {"parent": account(manifest.shape)}
        results = evaluate(chunks, None, {}, token_windows)
    else:
        assert manifest.space is not None
        names = list(manifest.submodels) if submodel == "all" else [submodel]
        chosen = {n: manifest.submodel(n) for n in names}
        chunks = [build_elastic_model(manifest.space)]
        opened.fill(chunks)
        costs = {n: account(manifest.space, s) for n, s in chosen.items()}
        results = evaluate(chunks, manifest.space, chosen, token_windows)
    return {
        n: {**r, "total_params": costs[n].total_params, "active_params": costs[n].active_params}
        for n, r in results.items()
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"--text {path} cannot be read ({e.strerror}); give a UTF-8 text file") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is no UTF-8 text; convert it first") from None
