"""Tokenizers: any Hugging Face directory, and a built-in one that needs no files.

The byte tokenizer has 261 ids: ``<pad> <s> </s> <think> </think>`` are 0-4 and byte ``b`` is ``5 + b``.
It has no merges, so a text is exactly its UTF-8 bytes and every round trip is lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elastic_megatron.errors import UserError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
THINK_TOKENS = ("<think>", "</think>")
FIRST_BYTE_ID = len(SPECIAL_TOKENS) + len(THINK_TOKENS)

# Each turn is one <s> ... </s> span, so that generation can stop at eos.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token }}{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes in a byte-level vocabulary.

    GPT-2's table (openai/gpt-2 ``src/encoder.py``), built into ``tokenizers``' ``ByteLevel``: printable
    bytes stand for themselves, the others for the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [b for b in range(256) if b not in printable]
    shifted = {b: 256 + i for i, b in enumerate(unprintable)}
    return [chr(shifted.get(b, b)) for b in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer of this module's docstring.

    ``save_pretrained(dir)`` writes an ordinary directory that plain ``AutoTokenizer`` loads.
    """
    names = (*SPECIAL_TOKENS, *THINK_TOKENS, *_byte_characters())
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    # Without merges the words that the regex would cut make no difference, and cutting costs half the time.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    # Not "special": skip_special_tokens=True must leave the tags for reasoning parsers to find.
    backend.add_tokens([AddedToken(name, normalized=False) for name in THINK_TOKENS])
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory; never looks on the network, runs no remote code.

    Raises ``UserError`` if ``path`` is no directory or holds no tokenizer that transformers can load.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"tokenizer {path}: no such directory; give a Hugging Face directory with tokenizer.json"
        )
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, TypeError or ImportError here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tokenizer {path}: transformers cannot load it ({reason}); "
            "the directory needs tokenizer.json and tokenizer_config.json"
        ) from error


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id; above ``len(tokenizer)`` where added tokens leave gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (int32, 1-D) of every text, each tokenised whole, without special tokens added.

    Names of special tokens that stand in a text (``<think>``, chat marks) become those tokens. A fast
    tokenizer spreads the texts over the cores.
    """
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.asarray(row, dtype=np.int32) for row in ids["input_ids"]]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Token ids (int32, 1-D) of one text: ``encode_batch`` of one."""
    return encode_batch(tokenizer, [text])[0]
