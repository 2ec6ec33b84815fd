"""From a text to the tokens that a model continues, with the marks of its thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True)
class Marks:
    """How a thought begins and ends in a model's language.

    Args:
        begin: text before a thought.
        end: the token after one.
        cut: tokens that close a thought which the model did not end itself, ``end`` the last of them: a blank line
            before it, as NVIDIA's budget control for Nemotron 3 Nano has.
    """

    begin: str
    end: int
    cut: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Marks | None:
        """``<think>`` and ``</think>``; ``None`` where the tokenizer does not have both as tokens."""
        ids = tokenizer.get_vocab()
        if BEGIN not in ids or END not in ids:
            return None
        return cls(f"{BEGIN}\n", ids[END], _encode(tokenizer, f"\n\n{END}"))


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    vocab_size: int,
    *,
    plain: bool = False,
    thinking: Marks | None = None,
) -> list[int]:
    """Tokens of a prompt, in the tokenizer's chat template where it has one.

    Args:
        vocab_size: the model's.
        plain: the text as it is, although there is a template.
        thinking: the marks of the thought to be written next, unless the template has begun it.

    Raises ``UserError`` for a prompt without a token, or with one that the model does not have.
    """
    if tokenizer.chat_template is not None and not plain:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    if thinking is not None and not text.rstrip().endswith(BEGIN):
        text += thinking.begin
    tokens = _encode(tokenizer, text)
    if not tokens:
        raise UserError("the prompt is empty; give at least one character")
    if max(tokens) >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {max(tokens)}, but the model's vocabulary has {vocab_size}; put the "
            "tokenizer of the model into its directory"
        )
    return tokens


def end_tokens(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> set[int]:
    """What ends a text: by the tokenizer, and by the model's ``config.json``."""
    stated = config.get("eos_token_id")
    found = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    return {token for token in found if isinstance(token, int)}


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    from ..data.tokenizer import encode

    return encode(tokenizer, text).tolist()
