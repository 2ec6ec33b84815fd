"""Damaged checkpoints and directories are told from sound ones by every command, and left as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_story import Story, refused, snapshot
from safetensors.torch import load_file, save_file

Copy = Callable[[str], Path]


def _newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000012"


def _tracker(content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / "checkpoints/latest_checkpointed_iteration.txt").write_bytes(content)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(run: Path) -> None:
        file = _newest(run) / "elastic.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return apply


def _halve(pattern: str) -> Callable[[Path], object]:
    def apply(run: Path) -> None:
        for file in _newest(run).glob(pattern):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return apply


def _remove(pattern: str) -> Callable[[Path], object]:
    return lambda run: [file.unlink() for file in _newest(run).glob(pattern)]


RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tracker of another kind": (_tracker(b"twelve\n"), r"says 'twelve', but complete .*: iter_0000008, iter_0000012"),
    "tracker of another iteration": (_tracker(b"10\n"), r"says '10', but complete checkpoints are"),
    "empty tracker": (_tracker(b""), r"says '', but complete checkpoints are"),
    "binary tracker": (_tracker(b"\xff\x00\xb2"), r"but complete checkpoints are"),
    "superscript tracker": (_tracker("¹²".encode()), r"but complete checkpoints are"),
    "half a shard": (_halve("*.distcp"), r"iter_0000012/\S*\.distcp has \d+ bytes instead of \d+; name an older"),
    "half the metadata": (_halve(".metadata"), r"iter_0000012/\.metadata has \d+ bytes instead of \d+"),
    "no shards": (_remove("*.distcp"), r"iter_0000012/\S*\.distcp is missing; name an older"),
    "no metadata": (_remove(".metadata"), r"iter_0000012/\.metadata is missing"),
    "no description": (_remove("elastic.json"), r"says '12', but complete checkpoints are: iter_0000008"),
    "half a description": (_halve("elastic.json"), r"elastic\.json is no valid JSON"),
    "later format": (
        _manifest(lambda d: d.update(format_version=99)),
        r"has format_version 99, this release reads 1; use the elastic-megatron release that wrote it",
    ),
    "description without sizes": (_manifest(lambda d: d.pop("shape")), r"elastic\.json is damaged \(it has no 'shape'\)"),
    "description of other sizes": (
        _manifest(lambda d: d["shape"].update(hidden_size=64)),
        r"elastic\.json is damaged \(shape and space disagree\)",
    ),
    "description is a list": (
        lambda run: (_newest(run) / "elastic.json").write_text("[]"),
        r"elastic\.json holds a list, not an object",
    ),
    "binary description": (
        lambda run: (_newest(run) / "elastic.json").write_bytes(b"\xff\xfe"),
        r"elastic\.json is no valid JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", RUNS)
def test_damaged_run(story: Story, copy: Copy, tmp_path: Path, damage: str) -> None:
    """Every command that reads it says so, resuming included, and leaves what is there as it is."""
    change, message = RUNS[damage]
    run_dir = copy("runs/elastic")
    change(run_dir)
    before = snapshot(tmp_path)
    for command in (
        ["eval", run_dir, "--text", story.text],
        ["export", run_dir, tmp_path / "hf"],
        ["train", story.recipe("elastic"), f"run_dir={run_dir}"],
    ):
        [line] = refused(*command)
        assert re.search(message, line), line
    assert snapshot(tmp_path) == before


def test_resuming_with_another_model_is_refused(story: Story, copy: Copy, tmp_path: Path) -> None:
    run_dir = copy("runs/parent")
    before = snapshot(tmp_path)
    [line] = refused("train", story.recipe("parent"), f"run_dir={run_dir}", "model.sizes.hidden_size=16")
    assert "model.sizes.hidden_size=16 is 32 in" in line and "cannot go on with another one" in line
    assert snapshot(tmp_path) == before


def _tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        file = directory / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return apply


def _index(directory: Path) -> None:
    found = load_file(directory / "model.safetensors")
    names = dict.fromkeys(found, "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        r"is neither a Megatron|config\.json is missing; is it a Hugging Face model directory",
    ),
    "half the weights": (_cut, r"model\.safetensors is truncated"),
    "missing shard": (_index, r"shard model-00002-of-00002\.safetensors is missing \(1 of 2\)"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has neither model\.safetensors"),
    "wrong shape": (
        _tensor(lambda t: t.update({"backbone.norm_f.weight": torch.ones(31)})),
        r"'backbone\.norm_f\.weight' has shape \[31\], the model's sizes say \[32\]",
    ),
    "no such tensor": (_tensor(lambda t: t.pop("lm_head.weight")), r"tensor 'lm_head\.weight' is missing"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config\.json is no valid JSON"),
    "broken elastic config": (
        lambda d: (d / "elastic_config.json").write_text('{"format_version": 0}'),
        r"elastic_config\.json has format_version 0, this release reads 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DIRECTORIES)
def test_damaged_directory_of_a_family(story: Story, copy: Copy, tmp_path: Path, damage: str) -> None:
    change, message = DIRECTORIES[damage]
    directory = copy("elastic_hf")
    change(directory)
    before = snapshot(tmp_path)
    for command in (
        ["eval", directory, "--text", story.text],
        ["slice", directory, tmp_path / "hf", "--submodel", "small"],
        ["import", directory, tmp_path / "checkpoint"],
    ):
        [line] = refused(*command)
        assert re.search(message, line), line
    assert snapshot(tmp_path) == before


def test_directory_without_tokenizer(story: Story, copy: Copy) -> None:
    directory = copy("elastic_hf")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    [line] = refused("eval", directory, "--text", story.text)
    assert "tokenizer" in line


def test_tokens_beyond_the_vocabulary(story: Story, copy: Copy, tmp_path: Path) -> None:
    small = ["model.sizes.vocab_size=64", f"run_dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
    [line] = refused("rank", story.recipe("parent"), *small, "rank.samples=2", "rank.seq_length=64")
    assert re.search(
        r"data\.train has token \d+, but the model's vocabulary has 64; prepare the data", line
    ), line
    assert not (tmp_path / "run").exists()
    directory = copy("slices/small")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"vocab_size": 64}))
    _tensor(
        lambda t: t.update({n: t[n][:64].clone() for n in ("lm_head.weight", "backbone.embeddings.weight")})
    )(directory)
    [line] = refused("eval", directory, "--text", story.text)
    assert re.search(
        r"gives token \d+, but the model's vocabulary has 64; put the tokenizer of the model", line
    ), line
