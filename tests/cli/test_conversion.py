"""``import``, ``export`` and ``slice`` by their flags."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from cli_story import Story, config, done, refused, snapshot, tensors
from quantised_dirs import bits

from elastic_megatron.checkpoint import stored, tracker
from elastic_megatron.cli import main


def content(directory: Path) -> dict[str, str]:
    """Digests by name inside the directory."""
    return {str(Path(f).relative_to(directory)): digest for f, digest in snapshot(directory).items()}


def test_several_submodels_come_out_of_one_pass(story: Story, tmp_path: Path) -> None:
    names = ["--submodel", "small", "--submodel", "medium", "--submodel", "small"]
    ran = done("slice", story.root / "elastic_hf", tmp_path / "out", *names, "--verify", "--json")
    assert ran.json["written"] == [str(tmp_path / "out" / n) for n in ("small", "medium")]
    assert ran.json["verified"] is True
    for name in ("small", "medium"):
        assert content(tmp_path / "out" / name) == content(story.slice(name))
    sizes = [f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors")]
    assert 0 <= sum(sizes) - ran.json["bytes_written"] < 100_000


def test_a_slice_of_a_slice_is_the_slice(story: Story, tmp_path: Path) -> None:
    done("slice", story.root / "elastic_hf", tmp_path / "medium", "--submodel", "medium", "--elastic")
    assert config(tmp_path / "medium") == config(story.slice("medium"))
    done("slice", tmp_path / "medium", tmp_path / "small", "--submodel", "small")
    once, twice = content(story.slice("small")), content(tmp_path / "small")
    assert once.pop("README.md") != twice.pop("README.md")  # which tells what it was cut from
    assert once == twice


def test_shards_have_the_size_that_was_asked_for(story: Story, tmp_path: Path) -> None:
    done("export", story.elastic, tmp_path / "hf", "--elastic", "--max-shard-size", "30KB", "--verify")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert len(files) > 5 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 30_000 + 10_000 for f in files)
    whole = tensors(story.root / "elastic_hf")
    parts = tensors(tmp_path / "hf")
    assert whole.keys() == parts.keys() and all(whole[n].equal(parts[n]) for n in whole)
    done("import", tmp_path / "hf", tmp_path / "checkpoint", "--verify")
    assert tracker.newest(tmp_path / "checkpoint") == tmp_path / "checkpoint/iter_0000000"


def test_what_was_verified_is_said(story: Story, tmp_path: Path) -> None:
    ran = done("slice", story.elastic, tmp_path / "a", "--submodel", "small", "--verify")
    assert ran.out.splitlines()[0] == f"wrote {tmp_path / 'a'}"
    assert ran.out.rstrip().endswith("GB, read back and equal to its source")
    ran = done("slice", story.elastic, tmp_path / "b", "--submodel", "small")
    assert "read back" not in ran.out


def test_a_changed_byte_of_a_checkpoint_is_noticed_unless_it_is_trusted(story: Story, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(story.elastic, run)
    [file] = run.glob("checkpoints/iter_0000012/*.distcp")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    [line] = refused("export", run, tmp_path / "hf")
    assert line.startswith(f"{file} is damaged: its bytes are not those that were saved; ")
    assert not (tmp_path / "hf").exists()
    done("export", run, tmp_path / "hf", "--trust-source")


COMMANDS = {
    "import": ("import", "elastic_hf", ()),
    "export": ("export", "runs/elastic", ("--elastic", "--max-shard-size", "50KB")),
    "slice": ("slice", "elastic_hf", ("--submodel", "small", "--submodel", "medium")),
    "export quantised": ("export", "quantised/nvfp4", ("--elastic", "--max-shard-size", "50KB")),
}


def slowly(begun: Path, *arguments: str) -> None:
    """The command, copying so slowly that there is time to kill it."""
    rows = stored.StoredModel.rows

    def late(*call: Any) -> Any:
        begun.touch()
        time.sleep(0.05)
        return rows(*call)

    stored.StoredModel.rows = late  # type: ignore[method-assign]
    main(arguments)


@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.usefixtures("quantised")
def test_kill_9_leaves_nothing_that_looks_finished_and_the_same_command_finishes(
    story: Story, tmp_path: Path, case: str
) -> None:
    """Killed in the middle of copying, at random moments; what is left at the destination's name is whole or absent."""
    command, source, options = COMMANDS[case]
    arguments = [command, str(story.root / source), str(tmp_path / "out"), *options]
    rng = random.Random(case)
    for attempt in range(6):
        begun = tmp_path / f"begun{attempt}"
        child = multiprocessing.get_context("fork").Process(target=slowly, args=(begun, *arguments))
        child.start()
        try:
            until = time.monotonic() + 60
            while not begun.exists():
                assert child.is_alive() and time.monotonic() < until
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
        finally:
            child.kill()
            child.join(60)
        assert child.exitcode == -9
        finished = [p for p in tmp_path.rglob("*") if p.name in ("config.json", tracker.TRACKER)]
        hidden = (".partial", ".incomplete")
        assert not [p for p in finished if not any(name in str(p) for name in hidden)]
    done(*arguments, "--verify")
    assert {p.name for p in tmp_path.iterdir()} - {"out"} == {f"begun{i}" for i in range(6)}
    assert not list((tmp_path / "out").glob(".*"))
    if command == "import":
        done("export", tmp_path / "out", tmp_path / "hf", "--elastic")
        assert content(tmp_path / "hf") == content(story.root / "elastic_hf")
    elif command == "export":
        done("export", story.root / source, tmp_path / "whole", "--elastic")
        whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
        assert bits(whole) == bits(parts)
    else:
        for name in ("small", "medium"):
            assert content(tmp_path / "out" / name) == content(story.slice(name))
