"""``elastic-megatron generate SRC``: text from one submodel, or from one that thinks and another that answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..checkpoint.source import Source
    from ..serving.budget import Generated, Watch, Writer
    from ..serving.decode import Choose, Written
    from ..serving.model import Served


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="text from one submodel, or from one that thinks and another that answers",
        description="Continue a prompt with the model as it will be served: inputs of quantised linears are rounded "
        "too. With --think, --answer and --budget, one submodel thinks for at most so many tokens, or until it ends "
        "its thought, and another answers.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="Megatron checkpoint or Hugging Face directory, quantised or not",
    )
    parser.add_argument("--submodel", metavar="NAME", help="which submodel writes (default: the whole model)")
    parser.add_argument("--think", metavar="NAME", help="which submodel thinks")
    parser.add_argument("--answer", metavar="NAME", help="which submodel answers")
    parser.add_argument("--budget", type=int, metavar="N", help="tokens that a thought has at most")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--plain", action="store_true", help="the prompt as it is, not in the tokenizer's chat template"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens of the answer (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable token (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the most probable tokens of this sum (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from .arguments import check_served, text_of

    _check(args)
    check_served(args.source, [name for name in (args.submodel, args.think, args.answer) if name is not None])
    text = args.prompt if args.prompt is not None else text_of(args.prompt_file, as_text=True)
    from ..checkpoint.source import open_source
    from ..data.tokenizer import load_tokenizer

    opened = open_source(args.source)
    if opened.hf_files is None:
        raise UserError(f"{args.source} carries no tokenizer; export it with a model that has one")
    tokenizer = load_tokenizer(opened.hf_files)
    started = time.perf_counter()
    watch, end = (_unseen, _unseen) if args.json else _on_stdout(tokenizer)
    found = _generate(args, opened, tokenizer, text, watch)
    end()
    return _summary(args, tokenizer, found, time.perf_counter() - started) if args.json else None


def _check(args: argparse.Namespace) -> None:
    """Raise ``UserError`` for options that do not fit together, or numbers out of range."""
    from .arguments import at_least

    asked = [o for o, value in (("--think", args.think), ("--answer", args.answer), ("--budget", args.budget))
             if value is not None]  # fmt: skip
    if asked and len(asked) < 3:
        raise UserError(
            f"{' and '.join(asked)} alone; thinking needs --think NAME, --answer NAME and --budget N"
        )
    if asked and args.submodel is not None:
        raise UserError("--submodel and --think exclude each other; leave one out")
    if asked:
        at_least("--budget", args.budget, 0)
    at_least("--max-new-tokens", args.max_new_tokens, 1)
    at_least("--temperature", args.temperature, 0)
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}; give a number above 0 and at most 1")


def _generate(
    args: argparse.Namespace, opened: Source, tokenizer: PreTrainedTokenizerFast, text: str, watch: Watch
) -> Generated:
    from ..serving.budget import answered, thought_and_answered
    from ..serving.decode import Sampling
    from ..serving.model import build_served
    from ..serving.prompt import Marks, encode_prompt, end_tokens

    manifest, thinking = opened.manifest, args.think is not None
    marks = Marks.of(tokenizer) if thinking else None
    prompt = encode_prompt(tokenizer, text, manifest.shape.vocab_size, plain=args.plain, thinking=marks)
    ends = end_tokens(tokenizer, manifest.hf_config)
    choose = Sampling(args.temperature, args.top_p, args.seed).chooser()
    served = build_served(opened)
    if not thinking:
        return answered(_writer(served, args.submodel, choose), prompt, args.max_new_tokens, ends, watch)
    think, answer = (_writer(served, name, choose) for name in (args.think, args.answer))
    return thought_and_answered(think, answer, prompt, args.budget, args.max_new_tokens, ends, marks, watch)


def _writer(served: Served, name: str | None, choose: Choose) -> Writer:
    from ..serving.decode import write

    def writer(prompt: Sequence[int], limit: int, stops: Container[int], watch: Watch) -> Written:
        with served.running(name) as model:
            return write(model, prompt, limit, stops=stops, choose=choose, watch=watch)

    return writer


def _on_stdout(tokenizer: PreTrainedTokenizerFast) -> tuple[Watch, Callable[[], object]]:
    """Shows the text word by word as it is written."""
    import torch
    from transformers import TextStreamer

    streamer: Any = TextStreamer(tokenizer)  # its annotation asks for slow tokenizers
    return lambda token: streamer.put(torch.tensor([token])), streamer.end


def _unseen(*_: int) -> None:
    pass


def _summary(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, found: Generated, seconds: float
) -> dict[str, Any]:
    thought = {}
    if found.thought is not None:
        thought = {
            "thought": tokenizer.decode(found.thought),
            "thought_tokens": found.thought,
            "thought_closed_by": found.closed,
        }
    return {
        "submodels": {"think": args.think, "answer": args.answer} if thought else {"answer": args.submodel},
        "prompt_tokens": found.prompt,
        **thought,
        "text": tokenizer.decode(found.answer),
        "tokens": found.answer,
        "finished": found.finished,
        "seconds": round(seconds, 3),
    }
