"""One writer for one target: the second is told who the first is, and what is there is wholly of one of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cli_story import Story, done, refused, run, snapshot

from elastic_megatron.cli import main
from elastic_megatron.conversion import hf_target, megatron_target
from elastic_megatron.conversion.safetensors_shards import SafetensorsShards
from elastic_megatron.data.token_writer import TokenWriter
from elastic_megatron.files import lock
from elastic_megatron.training.log import RunLog

# command line (S: the story's folder, T: the target) and the lock that it takes
COMMANDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "import": ("import S/elastic_hf T", lock.within),
    "export": ("export S/runs/elastic T --elastic", lock.beside),
    "slice": ("slice S/elastic_hf T --submodel small", lock.beside),
    "rank": ("rank S/recipes/rank.yaml run_dir=T", lock.within),
    "train": ("train S/recipes/elastic.yaml run_dir=T", lock.within),
    "prepare-data": ("prepare-data S/valid.txt --output T --tokenizer bytes", lock.beside),
    "quickstart": ("quickstart --out T", lock.within),
}
# pairs of command lines that differ in what they write
RACES = {
    "import": ("import S/elastic_hf T", "import S/slices/small T"),
    "export": ("export S/runs/elastic T --submodel small", "export S/runs/elastic T --submodel medium"),
    "slice": ("slice S/elastic_hf T --submodel small", "slice S/elastic_hf T --submodel medium"),
    "prepare-data": (
        "prepare-data S/valid.txt --output T --tokenizer S/data/tokenizer",
        "prepare-data S/train.txt --output T --tokenizer S/data/tokenizer",
    ),
}


def spelled(command: str, story: Story, target: Path) -> list[str]:
    return [word.replace("S/", f"{story.root}/", 1).replace("T", str(target)) if word[0] in "ST" or "=T" in word else word
            for word in command.split()]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_told_who_writes_to_its_target(story: Story, tmp_path: Path, name: str) -> None:
    command, lock_of = COMMANDS[name]
    target = tmp_path / "folder" / "out"
    with lock.locked(lock_of(target), "the first"):
        before = snapshot(tmp_path)
        (line,) = refused(*spelled(command, story, target))
        assert f"held by the first (process {os.getpid()} on " in line
        assert snapshot(tmp_path) == before
    assert not any(tmp_path.iterdir())


def raced(start: Any, outcome: Path, arguments: Sequence[str]) -> None:
    """In a fork of the tests' process: a command, begun when all are ready; its status and errors go to a file."""
    with open(outcome, "w") as out, contextlib.redirect_stderr(out), contextlib.redirect_stdout(sys.stderr):
        start.wait(60)
        status = main(list(arguments))
        out.write(f"\n{status}")


def race(folder: Path, commands: Sequence[list[str]]) -> list[tuple[int, str]]:
    """Commands at once; status and errors of each."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(len(commands))
    outcomes = [folder / f"{i}.txt" for i in range(len(commands))]
    children = [
        fork.Process(target=raced, args=(start, *each)) for each in zip(outcomes, commands, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    told = [outcome.read_text().rpartition("\n") for outcome in outcomes]
    return [(int(status), text) for text, _, status in told]


def written(folder: Path, name: str) -> Mapping[str, str]:
    """What lies under a name, or under a prefix. torch puts the path and a number drawn at random into its metadata."""
    found = {Path(path): digest for path, digest in snapshot(folder).items()}
    assert all(path.relative_to(folder).parts[0].startswith(name) for path in found)
    drawn = (".metadata", "integrity.json")
    return {str(path.relative_to(folder)): digest for path, digest in found.items() if path.name not in drawn}


@pytest.mark.parametrize("writers", [2, 4])
@pytest.mark.parametrize("name", RACES)
def test_of_writers_at_once_one_has_written(story: Story, tmp_path: Path, name: str, writers: int) -> None:
    """The others are told whom they met, or that there is something already. prepare-data writes over what is there."""
    wanted = []
    for i, command in enumerate(RACES[name]):
        (tmp_path / f"alone{i}").mkdir()
        done(*spelled(command, story, tmp_path / f"alone{i}" / "out"))
        wanted.append(written(tmp_path / f"alone{i}", "out"))
    assert wanted[0] != wanted[1]
    for turn in range(4):
        place, said = tmp_path / f"turn{turn}", tmp_path / f"said{turn}"
        place.mkdir()
        said.mkdir()
        commands = [spelled(RACES[name][i % 2], story, place / "out") for i in range(writers)]
        outcomes = race(said, commands)
        assert written(place, "out") in [
            wanted[i % 2] for i, (status, _) in enumerate(outcomes) if status == 0
        ]
        if name != "prepare-data":
            assert [status for status, _ in outcomes].count(0) == 1
        for status, text in outcomes:
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            assert (status, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in text, text
            assert all("held by" in line or "already" in line for line in lines), lines


@pytest.mark.parametrize(
    ("name", "module"), [("import", megatron_target), ("export", hf_target), ("slice", hf_target)]
)
def test_what_is_written_between_a_look_and_the_lock_is_seen(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType
) -> None:
    (tmp_path / "here").mkdir()
    first, second = (spelled(command, story, tmp_path / "here/out") for command in RACES[name])

    def meanwhile(*_: object) -> None:
        monkeypatch.undo()
        done(*first)

    monkeypatch.setattr(module, "check_space", meanwhile)
    ran = run(*second)
    assert ran.status == 2 and "already" in ran.err, ran.err
    (tmp_path / "alone").mkdir()
    done(*spelled(RACES[name][0], story, tmp_path / "alone" / "out"))
    assert written(tmp_path / "here", "out") == written(tmp_path / "alone", "out")


def held_until_killed(file: Path, begun: Path) -> None:
    held = lock.acquire(file, "the first")
    begun.touch()
    held._over.wait(60)


@pytest.mark.parametrize("name", ["import", "export", "slice", "prepare-data"])
def test_what_a_killed_writer_held_is_taken_over(story: Story, tmp_path: Path, name: str) -> None:
    """And that is said; the result is that of an undisturbed run, and nothing of the lock is left."""
    command, lock_of = COMMANDS[name]
    for place in ("here", "alone"):
        (tmp_path / place).mkdir()
    child = multiprocessing.get_context("fork").Process(
        target=held_until_killed, args=(lock_of(tmp_path / "here/out"), tmp_path / "begun")
    )
    child.start()
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.01)
    child.kill()
    child.join(60)
    told = done(*spelled(command, story, tmp_path / "here/out")).err
    assert f"taken over from the first (process {child.pid} on " in told
    done(*spelled(command, story, tmp_path / "alone/out"))
    assert written(tmp_path / "here", "out") == written(tmp_path / "alone", "out")


def test_a_run_is_reported_while_it_trains(story: Story, copy: Callable[[str], Path]) -> None:
    folder = copy("runs/elastic")
    with lock.locked(lock.within(folder), "train"):
        done("report", folder)
        done("export", folder, folder.parent / "hf", "--elastic")
        done("eval", folder, "--text", story.text, "--submodel", "small")


# where a folder is removed under a command: below tmp_path, when a method is called the n-th time
REMOVED: dict[str, tuple[type, str, int, str]] = {
    "train": (RunLog, "step", 5, "folder/out"),
    "export": (SafetensorsShards, "check", 1, "folder"),
    "slice": (SafetensorsShards, "write", 3, "folder"),
    "prepare-data": (TokenWriter, "finish", 1, "folder"),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_folder_removed_under_a_command_ends_it_in_one_line(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing more is written there: the folder is not made again."""
    owner, method, at, where = REMOVED[name]
    before, calls = getattr(owner, method), []

    def then_gone(*arguments: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) == at:
            shutil.rmtree(tmp_path / where)
        return before(*arguments, **options)

    monkeypatch.setattr(owner, method, then_gone)
    ran = run(*spelled(COMMANDS[name][0], story, tmp_path / "folder" / "out"))
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.status == 2 and len(errors) == 1 and "Traceback" not in ran.err, ran.err
    assert f"was removed while {name.replace('slice', 'export')} was running" in errors[0]
    assert not (tmp_path / where).exists()
