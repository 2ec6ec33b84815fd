"""Bad input ends in exit status 2 and one ``error:`` line a problem; nothing is written and nothing lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_story import Story, refused, run, snapshot

Copy = Callable[[str], Path]

# a case: what is asked, given the story and an empty folder, and what the only line says
REQUESTS: dict[str, tuple[Callable[[Story, Path], list[Any]], str]] = {
    "typo in an override": (
        lambda s, t: ["train", s.recipe("elastic"), "optimizer.lrr=1"],
        r"command line `optimizer\.lrr=1`: optimizer: unknown key 'lrr', did you mean 'lr'\?",
    ),
    "override of no form": (
        lambda s, t: ["train", s.recipe("elastic"), "fast"],
        r"command line `fast`: write it as key=value",
    ),
    "no recipe": (lambda s, t: ["train", t / "absent.yaml"], r"absent\.yaml: no such file"),
    "recipe is a folder": (lambda s, t: ["recipe", "show", t], r": cannot be read: Is a directory"),
    "no data to rank on": (
        lambda s, t: ["rank", s.recipe("rank"), f"run_dir={t / 'run'}", f"data.train.0.path={t / 'no'}"],
        r"data set .*/no: .*/no\.bin is missing",
    ),
    "train without data": (
        lambda s, t: ["train", s.recipe("parent"), f"run_dir={t / 'run'}", "data.train=[]"],
        r"the recipe has no data\.train",
    ),
    "train without stages": (
        lambda s, t: ["train", s.recipe("rank"), f"run_dir={t / 'run'}"],
        r"the recipe has no stages",
    ),
    "no parent to train": (
        lambda s, t: ["train", s.recipe("elastic"), f"run_dir={t / 'run'}", f"model.checkpoint={t / 'no'}"],
        r"/no does not exist; give a run folder",
    ),
    "no parent to rank": (
        lambda s, t: ["rank", s.recipe("rank"), f"run_dir={t / 'run'}", f"model.checkpoint={t / 'no'}"],
        r"/no does not exist; give a run folder",
    ),
    "no parent to plan": (
        lambda s, t: ["plan", s.recipe("rank"), f"model.checkpoint={t / 'no'}"],
        r"/no holds no checkpoint",
    ),
    "nothing to evaluate": (lambda s, t: ["eval", t / "no", "--text", s.text], r"/no does not exist"),
    "an empty folder to evaluate": (
        lambda s, t: ["eval", t, "--text", s.text],
        r"is neither a Megatron checkpoint nor a Hugging Face directory",
    ),
    "nothing to export": (lambda s, t: ["export", t / "no", t / "hf"], r"/no does not exist"),
    "nothing to slice": (
        lambda s, t: ["slice", t / "no", t / "hf", "--submodel", "small"],
        r"/no does not exist",
    ),
    "nothing to import": (lambda s, t: ["import", t / "no", t / "ckpt"], r"/no does not exist"),
    "unknown submodel of a checkpoint, eval": (
        lambda s, t: ["eval", s.elastic, "--text", s.text, "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has large, medium, small",
    ),
    "unknown submodel of a family, eval": (
        lambda s, t: ["eval", s.root / "elastic_hf", "--text", s.text, "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has large, medium, small",
    ),
    "unknown submodel of a plain model, eval": (
        lambda s, t: ["eval", s.slice("small"), "--text", s.text, "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has none: the checkpoint is not elastic",
    ),
    "unknown submodel, export": (
        lambda s, t: ["export", s.elastic, t / "hf", "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has large, medium, small",
    ),
    "unknown submodel of a family, slice": (
        lambda s, t: ["slice", s.root / "elastic_hf", t / "hf", "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has large, medium, small",
    ),
    "unknown submodel of a checkpoint, slice": (
        lambda s, t: ["slice", s.elastic, t / "hf", "--submodel", "tiny"],
        r"unknown submodel 'tiny'; this checkpoint has large, medium, small",
    ),
    "slice of a slice": (
        lambda s, t: ["slice", s.slice("medium"), t / "hf", "--submodel", "small"],
        r"is not elastic and has no submodels \(it has no elastic_config\.json",
    ),
    "elastic export of a plain model": (
        lambda s, t: ["export", s.root / "runs/parent", t / "hf", "--elastic"],
        r"runs/parent is not elastic and has no submodels",
    ),
    "family in plain order": (
        lambda s, t: ["export", s.elastic, t / "hf", "--elastic", "--plain-order"],
        r"--elastic keeps the stored order, which --plain-order undoes",
    ),
    "choice of no model": (
        lambda s, t: ["train", s.recipe("elastic"), f"run_dir={t / 'run'}", "space.choices.mamba_num_heads=[5, 8]"],
        r"space\.choices\.mamba_num_heads: 5 is .*; nearest legal: 4, 6",
    ),
    "choice above the model": (
        lambda s, t: ["rank", s.recipe("rank"), f"run_dir={t / 'run'}", "space.choices.hidden_size=[32, 48]"],
        r"space\.choices\.hidden_size: 48 is .*; nearest legal: 32",
    ),
    "rank of a sorted model": (
        lambda s, t: ["rank", s.recipe("rank"), f"run_dir={t / 'run'}", f"model.checkpoint={s.root / 'runs/rank'}"],
        r"is sorted already; rank the parent it was made from",
    ),
    "rank without choices": (
        lambda s, t: ["rank", s.recipe("rank"), f"run_dir={t / 'run'}", "space=null"],
        r"the recipe has no space\.choices, so there is nothing to rank",
    ),
    "fewer ranks than tensor parallelism": (
        lambda s, t: ["train", s.recipe("elastic"), f"run_dir={t / 'run'}", "parallel.tensor=2"],
        r"1 rank of .* parallel\.world_size=1 is not a multiple of tensor 2 .*; set parallel\.world_size=2, or set parallel\.tensor=1",
    ),
    "batch of no number of ranks": (
        lambda s, t: ["train", s.recipe("parent"), f"run_dir={t / 'run'}", "stages.0.micro_batch_size=3"],
        r"stages\[0\]\.global_batch_size: 8 is not a multiple of micro_batch_size = 3",
    ),
    "run folder is a file": (
        lambda s, t: ["train", s.recipe("parent"), f"run_dir={s.text}"],
        r"valid\.txt: (Not a directory|File exists)",
    ),
    "export below a file": (lambda s, t: ["export", s.elastic, s.text / "hf"], r"cannot be written \(.*valid\.txt: Not a directory\)"),
    "shards of no size": (
        lambda s, t: ["slice", s.elastic, t / "hf", "--submodel", "small", "--max-shard-size", "5 bananas"],
        r"argument --max-shard-size: '5 bananas' is no size; write 5GB, 500MB or 2GiB; see",
    ),
    "config of no model": (
        lambda s, t: ["export", s.elastic, t / "hf", "--config", t],
        r"has no config\.json; give a Hugging Face model directory",
    ),
    "no text": (lambda s, t: ["eval", s.elastic, "--text", t / "no.txt"], r"no\.txt: no such file"),
    "text is a folder": (lambda s, t: ["eval", s.elastic, "--text", t], r": is a directory; name its files"),
    "windows of one token": (
        lambda s, t: ["eval", s.elastic, "--text", s.text, "--seq-length", 1],
        r"--seq-length 1: a window needs 2 tokens",
    ),
    "run folder without a run": (lambda s, t: ["report", t], r"has no metrics\.jsonl, report\.json or ranking"),
    "no run folder": (lambda s, t: ["report", t / "no"], r"run folder .*/no does not exist"),
    "nothing to prepare": (
        lambda s, t: ["prepare-data", t / "no.txt", "--output", t / "data", "--tokenizer", s.root / "data/tokenizer"],
        r"no\.txt: no such file",
    ),
    "no tokenizer": (
        lambda s, t: ["prepare-data", s.text, "--output", t / "data", "--tokenizer", t / "no"],
        r"tokenizer .*/no: no such directory",
    ),
    "plan of no context": (lambda s, t: ["plan", s.recipe("parent"), "--context", 0], r"--context 0 must be at least"),
    "held-out text alone": (lambda s, t: ["quickstart", "--out", t / "q", "--heldout", s.text], r"come together"),
    "no recipes": (
        lambda s, t: ["quickstart", "--out", t / "q", "--recipes", t / "no", "--text", s.text, "--heldout", s.text],
        r"/no is no folder; give --recipes",
    ),
    "folder without recipes": (
        lambda s, t: ["quickstart", "--out", t / "q", "--recipes", t, "--text", s.text, "--heldout", s.text],
        r"parent\.yaml: no such file",
    ),
    "quickstart of a folder of texts": (
        lambda s, t: ["quickstart", "--out", t / "q", "--text", t, "--heldout", s.text],
        r"is no file; give --text and --heldout",
    ),
    "quickstart into a file": (lambda s, t: ["quickstart", "--out", s.text], r"valid\.txt.*Not a directory"),
    "unknown command": (lambda s, t: ["tarin"], r"invalid choice: 'tarin'.*; see elastic-megatron --help"),
    "unknown option": (lambda s, t: ["eval", s.elastic, "--text", s.text, "--fast"], r"unrecognized arguments: --fast"),
    "missing argument": (lambda s, t: ["slice", s.elastic, t / "hf"], r"required: --submodel; see elastic-"),
    "no number": (
        lambda s, t: ["eval", s.elastic, "--text", s.text, "--seq-length", "long"],
        r"argument --seq-length: invalid int value: 'long'; see elastic-megatron eval --help",
    ),
    "two exports at once": (
        lambda s, t: ["export", s.elastic, t / "hf", "--elastic", "--submodel", "small"],
        r"not allowed with argument",
    ),
}  # fmt: skip


@pytest.fixture
def untouched(story: Story, tmp_path: Path) -> Callable[[], bool]:
    """Are the story and the test's folder as they were when this was made?"""
    before = snapshot(story.root, tmp_path)
    return lambda: snapshot(story.root, tmp_path) == before


@pytest.mark.parametrize("case", REQUESTS)
def test_request_that_cannot_be_met(
    story: Story, tmp_path: Path, untouched: Callable[[], bool], case: str
) -> None:
    request, message = REQUESTS[case]
    [line] = refused(*request(story, tmp_path))
    assert re.search(message, line), line
    assert untouched()


@pytest.mark.parametrize("blend", ["train", "valid"])
def test_training_without_data_starts_nothing(story: Story, copy: Copy, tmp_path: Path, blend: str) -> None:
    missing = f"data.{blend}.0.path={tmp_path / 'no'}"
    message = r"data set .*/no: .*/no\.bin is missing; write it by: elastic-megatron prepare-data"
    [line] = refused("train", story.recipe("parent"), f"run_dir={tmp_path / 'run'}", missing)
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "checkpoints").exists()
    begun = copy("runs/elastic")
    before = snapshot(begun / "checkpoints", begun / "tensorboard"), (begun / "metrics.jsonl").read_text()
    longer = ["stages.1.tokens=4096", missing]
    [line] = refused("train", story.recipe("elastic"), f"run_dir={begun}", *longer)
    assert re.search(message, line), line
    assert (
        snapshot(begun / "checkpoints", begun / "tensorboard"),
        (begun / "metrics.jsonl").read_text(),
    ) == before


def test_every_problem_of_a_recipe_gets_its_line(story: Story, untouched: Callable[[], bool]) -> None:
    lines = refused("train", story.recipe("elastic"), "optimizer.lrr=1", "seed=x", "stages.0.token=3")
    assert len(lines) == 3 and all(line.startswith("command line `") for line in lines)
    assert untouched()


def test_typo_in_a_recipe_is_named_with_its_place(story: Story, tmp_path: Path) -> None:
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(f"extends: {story.recipe('elastic')}\n\nstages:\n  - {{name: a, token: 3}}\n")
    lines = refused("train", recipe)
    assert any(
        line.startswith(f"{recipe}:4:15: stages[0]: unknown key 'token', did you mean 'tokens'?")
        for line in lines
    )
    assert all(line.startswith(f"{recipe}:4:") for line in lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", " is empty"), (b"T", " has fewer than 2 tokens"), (b"A\n\xe9", ":2: not UTF-8")],
)
def test_text_that_cannot_be_scored(story: Story, tmp_path: Path, content: bytes, said: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    [line] = refused("eval", story.root / "elastic_hf", "--text", text, "--json")
    assert f"{text}{said}" in line


def test_internal_failure_is_a_defect(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    from elastic_megatron.commands import recipe

    def fail(_: object) -> None:
        raise RuntimeError("the flux is inverted")

    monkeypatch.setattr(recipe, "_show", fail)
    ran = run("recipe", "show", story.recipe("elastic"), "--json")
    assert ran.status == 1 and ran.out == ""
    assert "Traceback (most recent call last)" in ran.err and "RuntimeError: the flux is inverted" in ran.err
    assert ran.err.splitlines()[-1].startswith("this is a defect of elastic-megatron; please report it")


def test_interruption_by_a_person_is_no_failure(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    from elastic_megatron.commands import recipe

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_show", interrupt)
    ran = run("recipe", "show", story.recipe("elastic"))
    assert (ran.status, ran.out, ran.err) == (130, "", "interrupted\n")
