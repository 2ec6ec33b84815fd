"""What was written is what was read: every document, in order, closed by one eos, or nothing at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import normalizers

from elastic_megatron.data import cli
from elastic_megatron.data import prepare as prepare_module
from elastic_megatron.data.inputs import Reading, look_into
from elastic_megatron.data.prepare import Job, prepare, run
from elastic_megatron.data.token_writer import PrepareReport
from elastic_megatron.data.tokenizer import byte_tokenizer, encode
from elastic_megatron.errors import UserError

GOOD = b'{"text": "fine"}\n'
TOKENIZER = byte_tokenizer()
EOS = 2


def stored(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    return [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]


def prepare_split(
    inputs: list[Path], output: Path, tokenizer: Path, *, valid_fraction: float
) -> tuple[PrepareReport, ...]:
    return run(look_into(inputs, Reading()), Job(output, tokenizer, valid_fraction=valid_fraction)).datasets


def closed(text: str) -> list[int]:
    return [*map(int, encode(TOKENIZER, text.removesuffix("</s>"))), EOS]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=12))
@example(["</s>", "a</s>", "<s>"])
def test_json_lines_are_stored_document_by_document(tokenizer_dir: Path, tmp_path_factory, texts: list[str]):
    folder = tmp_path_factory.mktemp("prepare")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    report = prepare([source], folder / "v1.2", tokenizer_dir)
    documents = stored(folder / "v1.2")
    assert documents == [closed(text) for text in texts]
    raw = (folder / "v1.2.bin").read_bytes()
    assert report.sha256 == hashlib.sha256(raw).hexdigest()
    assert (report.documents, report.tokens, report.vocab_size) == (len(texts), len(raw) // 2, 261)
    assert report.dtype == "uint16"


def test_batches_change_nothing(tokenizer_dir: Path, tmp_path: Path, json_lines, monkeypatch):
    source = json_lines([{"text": "x" * n} for n in range(1, 60)])
    done: list[int] = []
    job = Job(tmp_path / "whole", tokenizer_dir, progress=done.append)
    [whole] = run(look_into([source], Reading()), job).datasets
    monkeypatch.setattr(prepare_module, "_BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 50)
    small = prepare([source], tmp_path / "small", tokenizer_dir)
    assert small.sha256 == whole.sha256
    assert sum(done) == source.stat().st_size


def test_text_files_are_one_document_each(tokenizer_dir: Path, tmp_path: Path):
    for name, text in {"a.txt": " one\r\n\ntwo ", "b.md": "three\n", "empty.txt": ""}.items():
        (tmp_path / name).write_bytes(text.encode())
    inputs = [tmp_path / name for name in ("b.md", "empty.txt", "a.txt")]
    prepare(inputs, tmp_path / "out", tokenizer_dir)
    assert stored(tmp_path / "out") == [closed("three\n"), closed(" one\r\n\ntwo ")]


def test_eos_is_written_once_or_not_at_all(tokenizer_dir: Path, tmp_path: Path, json_lines):
    source = json_lines([{"body": "a"}, {"body": "b</s>"}])
    prepare([source], tmp_path / "with", tokenizer_dir, json_key="body")
    assert stored(tmp_path / "with") == [closed("a"), closed("b")]
    prepare([source], tmp_path / "without", tokenizer_dir, json_key="body", append_eos=False)
    assert stored(tmp_path / "without") == [closed("a")[:-1], closed("b")]


def test_a_document_without_tokens_is_left_out(tokenizer_dir: Path, tmp_path: Path, json_lines, monkeypatch):
    stripping = byte_tokenizer()
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: stripping)
    report = prepare([json_lines([{"text": " \n"}, {"text": " a "}])], tmp_path / "out", tokenizer_dir)
    assert stored(tmp_path / "out") == [closed("a")] and report.documents == 1


def test_chats_go_through_the_template(tokenizer_dir: Path, tmp_path: Path, json_lines):
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>4</think>4"},
    ]
    prepare([json_lines([{"messages": turns}])], tmp_path / "out", tokenizer_dir, chat=True)
    text = "<s>user\n2+2?</s><s>assistant\n<think>4</think>4"
    assert stored(tmp_path / "out") == [closed(text)]


@given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.99))
def test_split_is_even_and_loses_nothing(count: int, fraction: float):
    documents = [prepare_module.Document(str(i), 1, f"in:{i}") for i in range(count)]
    routed = list(prepare_module._route(iter(documents), fraction))
    assert [document for document, _ in routed] == documents
    sides = np.array([side for _, side in routed])
    assert set(sides) <= {0, 1}
    assert np.all(np.abs(np.cumsum(sides) - fraction * np.arange(1, count + 1)) <= 1 + 1e-9)


def test_split_by_documents(tokenizer_dir: Path, tmp_path: Path, json_lines):
    source = json_lines([{"text": str(i)} for i in range(8)])
    train, valid = prepare_split([source], tmp_path / "s", tokenizer_dir, valid_fraction=0.25)
    assert stored(valid.prefix) == [closed("3"), closed("7")]
    assert stored(train.prefix) == [closed(c) for c in "012456"]
    assert (train.prefix, valid.prefix) == (f"{tmp_path}/s_train", f"{tmp_path}/s_valid")


@given(text=st.text(alphabet="ab\n", min_size=2), fraction=st.floats(0.01, 0.99))
def test_the_tail_of_one_document_is_cut_off(text: str, fraction: float):
    head, tail = prepare_module._cut_tail(text, fraction)
    assert head + tail == text and head and tail


def test_one_document_is_cut_at_a_blank_line(tokenizer_dir: Path, tmp_path: Path):
    source = tmp_path / "play.txt"
    source.write_text("a\nb\n\n" * 20)
    train, valid = prepare_split([source], tmp_path / "s", tokenizer_dir, valid_fraction=0.22)
    assert stored(train.prefix) == [closed("a\nb\n\n" * 16)]
    assert stored(valid.prefix) == [closed("a\nb\n\n" * 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"\n{oops\n", r":3: not JSON .*column 2"),
        (GOOD + b"[1]\n", r":2: a list in JSON"),
        (GOOD + b'{"body": "x"}\n', r":2: no key 'text' \(keys: body\); set --json-key"),
        (GOOD + b'{"messages": []}\n', r":2: no key 'text' .*use --chat"),
        (GOOD + b'{"text": 5}\n', r":2: 'text' is a number"),
        (GOOD + b'{"text": null}\n', r":2: 'text' is null"),
        (GOOD + b'{"text": "a", "text": "b"}\n', r":2: the key 'text' is given twice"),
        (GOOD + b'{"m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", r":2: JSON nested too deeply"),
        (GOOD + b"\r\n[\n", r":3: not JSON .*jq"),
        (GOOD + b'{"text": "\xff"}\n', r":2: not UTF-8"),
        (GOOD + b'{"text": "\\ud83d"}\n', r":2: half of a surrogate pair"),
        (b"", r"no documents"),
    ],
)
def test_bad_lines_are_named_and_leave_nothing(tokenizer_dir, tmp_path: Path, content: bytes, message: str):
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    prepare([source], tmp_path / "out", tokenizer_dir)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    source.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare([source], tmp_path / "out", tokenizer_dir)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


@pytest.mark.parametrize(
    ("record", "message"),
    [({"text": "x"}, "'messages' must be"), ({"messages": [{"content": 1}, {}]}, ":1: ")],
)
def test_bad_chats_are_named(tokenizer_dir, tmp_path: Path, json_lines, monkeypatch, record, message: str):
    template = "{% for m in messages %}{{ raise_exception('no role') if m.role is not defined }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: tokenizer)
    with pytest.raises(UserError, match=message):
        prepare([json_lines([record])], tmp_path / "out", tokenizer_dir, chat=True)


def test_bad_arguments_are_the_users_error(tokenizer_dir: Path, tmp_path: Path, json_lines, monkeypatch):
    source = json_lines([{"text": "abc"}])
    with pytest.raises(UserError, match="no such file"):
        prepare([tmp_path / "nowhere.txt"], tmp_path / "out", tokenizer_dir)
    with pytest.raises(UserError, match="is a directory"):
        prepare([tmp_path], tmp_path / "out", tokenizer_dir)
    with pytest.raises(UserError, match=r"test_prepare.py:1: not JSON"):
        prepare([Path(__file__)], tmp_path / "out", tokenizer_dir, chat=True)
    with pytest.raises(UserError, match="between 0 and 1"):
        prepare_split([source], tmp_path / "out", tokenizer_dir, valid_fraction=1.0)
    with pytest.raises(UserError, match="out_valid: no documents"):
        prepare_split([source, source], tmp_path / "out", tokenizer_dir, valid_fraction=0.1)
    bare = byte_tokenizer()
    bare.eos_token = bare.chat_template = None
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: bare)
    with pytest.raises(UserError, match="--no-eos"):
        prepare([source], tmp_path / "out", tokenizer_dir)
    with pytest.raises(UserError, match="chat template"):
        prepare([source], tmp_path / "out", tokenizer_dir, chat=True, append_eos=False)
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_overwrite_leaves_no_mixed_pair(
    tokenizer_dir, tmp_path: Path, json_lines, monkeypatch
):
    prepare([json_lines([{"text": "old"}])], tmp_path / "out", tokenizer_dir)
    replace = os.replace

    def die_at_the_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        prepare([json_lines([{"text": "newer"}])], tmp_path / "out", tokenizer_dir)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.bin"]


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["prepare-data", *map(str, arguments)])


def test_command_with_built_in_tokenizer(tmp_path: Path, json_lines, capsys):
    source = json_lines([{"t": "ab"}, {"t": "c"}])
    out = tmp_path / "deep" / "out"
    args = parse(source, "--output", out, "--tokenizer", "bytes", "--json-key", "t", "--no-eos", "--json")
    result = args.handler(args)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(result))["tokenizer"] == f"{out}_tokenizer"
    assert [d["tokens"] for d in result["datasets"]] == [3]
    assert stored(out) == [closed("ab")[:-1], closed("c")[:-1]]

    split = ["--json-key", "t", "--valid-fraction", 0.5]
    again = parse(source, "--output", out, "--tokenizer", result["tokenizer"], *split)
    assert [d["documents"] for d in again.handler(again)["datasets"]] == [1, 1]
    assert "out_valid" in capsys.readouterr().out.replace("\n", "")


def test_registering_the_command_imports_nothing_heavy():
    code = (
        "import argparse, sys; from elastic_megatron.data import cli;"
        "cli.add_parser(argparse.ArgumentParser().add_subparsers());"
        "print(sorted({'torch', 'transformers', 'megatron', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
