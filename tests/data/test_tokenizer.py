"""The byte tokenizer is the UTF-8 bytes of a text, and an ordinary Hugging Face tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from elastic_megatron.data.tokenizer import (
    FIRST_BYTE_ID,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    byte_tokenizer,
    encode,
    encode_batch,
    load_tokenizer,
    vocab_size,
)
from elastic_megatron.errors import UserError

TOKENIZER = byte_tokenizer()
NAMES = (*SPECIAL_TOKENS, *THINK_TOKENS)


def utf8_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + FIRST_BYTE_ID


def test_ids_are_the_promised_ones():
    assert [TOKENIZER.convert_tokens_to_ids(name) for name in NAMES] == [0, 1, 2, 3, 4]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == vocab_size(TOKENIZER) == 261


@given(st.text())
@example("")
@example("<think> a </s>")
@example("  leading and trailing  \n\n")
@example("\x00\r\n\t\u2014 👩‍🚀🏳️‍🌈 e\u0301 \ufeff\U0010ffff")
def test_text_is_its_bytes_and_comes_back(text: str):
    ids = encode(TOKENIZER, text)
    assert ids.dtype == np.int32 and TOKENIZER.decode(ids) == text
    if not any(name in text for name in NAMES):
        assert np.array_equal(ids, utf8_ids(text))


@given(st.lists(st.sampled_from([*NAMES, " ", "\n", "a", "<", "é"])))
def test_special_names_become_their_tokens_and_come_back(parts: list[str]):
    expected = [[NAMES.index(part)] if part in NAMES else list(utf8_ids(part)) for part in parts]
    ids = encode(TOKENIZER, "".join(parts))
    assert list(ids) == [i for row in expected for i in row]
    assert TOKENIZER.decode(ids) == "".join(parts)


@settings(max_examples=25)
@given(st.lists(st.text()))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]):
    rows = encode_batch(TOKENIZER, texts)
    assert len(rows) == len(texts)
    assert all(np.array_equal(row, encode(TOKENIZER, text)) for row, text in zip(rows, texts, strict=True))


def test_plain_autotokenizer_loads_the_directory(tokenizer_dir: Path):
    text = " <think>un deux…\n</think>👍 </s>"
    loaded = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert loaded(text, add_special_tokens=False)["input_ids"] == list(encode(TOKENIZER, text))
    assert loaded(text)["input_ids"] == list(encode(TOKENIZER, text))
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert np.array_equal(encode(load_tokenizer(tokenizer_dir), text), encode(TOKENIZER, text))


def test_think_tags_survive_skipping_special_tokens():
    ids = encode(TOKENIZER, "<s><think>a</think>b</s>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>a</think>b"


def test_chat_turns_end_in_eos():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "<s>user\nhi</s><s>assistant\nyes</s>"


@pytest.mark.parametrize("content", [None, {}, {"config.json": "{}"}, {"tokenizer.json": "nonsense"}])
def test_a_directory_without_tokenizer_is_the_users_error(tmp_path: Path, content: dict[str, str] | None):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    with pytest.raises(UserError, match="model: .*tokenizer.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
