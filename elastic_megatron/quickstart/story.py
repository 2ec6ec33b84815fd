"""Parent, rank, train, slice, export, evaluate, report: the main path of the project in one file."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import AGAIN, DIVERGED, DivergedError, UserError
from ..files.lock import locked, within
from ..files.shipped import shipped
from ..files.targets import check_writable
from ..files.writing import write_text
from ..recipe import Recipe, dump, load
from .phases import Phases


@dataclass(frozen=True)
class Story:
    """Everything the phases share: folders, recipes and texts."""

    out: Path
    text: Path
    heldout: Path
    parent: Recipe
    rank: Recipe
    elastic: Recipe

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def run(self) -> Path:
        return self.elastic.run_dir

    @property
    def tokenizer(self) -> Path:
        return self.work / "data" / "tokenizer"


def quickstart(
    out: Path, *, recipes: Path | None = None, text: Path | None = None, heldout: Path | None = None
) -> dict[str, Any]:
    """Run the story into ``out`` and return its report.

    Raises ``UserError`` where the project's recipes or texts are not beside the package (give them), and where
    another process tells the story in this folder; ``SystemExit`` with the status of ``train`` after a signal:
    everything is saved, run again to go on.
    """
    story = _story(out.resolve(), recipes, text, heldout)
    check_writable(story.out)
    with locked(within(story.out), "quickstart"):
        return _told(story)


def _told(story: Story) -> dict[str, Any]:
    """The phases that are not done yet, and the report."""
    from . import measure

    console = Console(stderr=True)
    story.work.mkdir(parents=True, exist_ok=True)
    phases = Phases(story.work / "phases.json", _key(story), console)
    if phases.stale:
        console.print("the recipes or texts changed since the last run: starting over")
        for folder in (
            story.work,
            story.run,
            story.out / "slices",
            story.out / "parent_hf",
            story.out / "elastic_hf",
        ):
            shutil.rmtree(folder, ignore_errors=True)
        story.work.mkdir(parents=True)
    for name, title, work in _phases(story):
        phases.run(name, title, work)
    phases.run("evaluate", "8/8 judging every size on held-out text", lambda: measure.evaluate_family(story))
    report = measure.report(story, phases.seconds)
    measure.tell(story, report, console)
    return report


def _phases(story: Story) -> list[tuple[str, str, Callable[[], None]]]:
    parent = story.parent.model.sizes
    assert parent is not None
    return [
        ("data", "1/8 tokenising the text into bytes", lambda: _prepare(story)),
        ("parent", f"2/8 training a parent model, pattern {parent.hybrid_layer_pattern}", lambda: _train(story.parent)),
        ("rank", "3/8 ranking every component and sorting the weights", lambda: _rank(story)),
        ("train", "4/8 training all sizes at once; the router learns their widths", lambda: _train(story.elastic)),
        ("parent_hf", "5/8 exporting the parent for comparison", lambda: _export(story, "parent_hf")),
        ("elastic_hf", "6/8 exporting the family as one directory", lambda: _export(story, "elastic_hf")),
        ("slices", "7/8 slicing every size out of it", lambda: _slice(story)),
    ]  # fmt: skip


def _story(out: Path, recipes: Path | None, text: Path | None, heldout: Path | None) -> Story:
    recipes = recipes or shipped() / "recipes" / "tiny_cpu"
    text = text or shipped() / "examples" / "data" / "shakespeare_train.txt"
    heldout = heldout or shipped() / "examples" / "data" / "shakespeare_valid.txt"
    if not recipes.is_dir():
        raise UserError(f"{recipes} is no folder; give --recipes")
    for path in (text, heldout):
        if not path.is_file():
            raise UserError(f"{path} is no file; give --text and --heldout")
    work = out / "work"
    data = [
        f"data.train=[{{path: {work / 'data' / 'train'}, weight: 1}}]",
        f"data.valid=[{{path: {work / 'data' / 'valid'}, weight: 1}}]",
        f"data.cache={work / 'data' / 'cache'}",
        f"model.tokenizer={work / 'data' / 'tokenizer'}",
    ]
    return Story(
        out=out,
        text=text,
        heldout=heldout,
        parent=load(recipes / "parent.yaml", [*data, f"run_dir={work / 'parent'}"]),
        rank=load(
            recipes / "rank.yaml", [*data, f"run_dir={work / 'rank'}", f"model.checkpoint={work / 'parent'}"]
        ),
        elastic=load(
            recipes / "elastic.yaml", [*data, f"run_dir={out / 'run'}", f"model.checkpoint={work / 'rank'}"]
        ),
    )


def _key(story: Story) -> str:
    digest = hashlib.sha256()
    for recipe in (story.parent, story.rank, story.elastic):
        digest.update(dump(recipe).encode())
    for path in (story.text, story.heldout):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _prepare(story: Story) -> None:
    from ..data.prepare import prepare
    from ..data.tokenizer import byte_tokenizer

    story.tokenizer.parent.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(story.tokenizer)
    prepare([story.text], story.work / "data" / "train", story.tokenizer)
    prepare([story.heldout], story.work / "data" / "valid", story.tokenizer)


def _train(recipe: Recipe) -> None:
    """``elastic-megatron train`` on one data-parallel rank a core, two at most."""
    from ..runtime.launch import run_ranks

    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    resolved = recipe.run_dir / "recipe.yaml"
    write_text(resolved, dump(recipe))
    command = [sys.executable, "-m", "elastic_megatron.cli", "train", str(resolved)]
    if status := run_ranks(command, min(2, os.cpu_count() or 1)):
        if status == 128 + signal.SIGINT:
            raise KeyboardInterrupt  # where only the ranks got it
        if status > 128 or status == AGAIN:  # another signal: saved, and said so
            raise SystemExit(status)
        kind = DivergedError if status == DIVERGED else UserError
        raise kind(f"{' '.join(command[2:])} ended with status {status}; its last lines say why")


def _rank(story: Story) -> None:
    from ..report.ranking_plots import plot_ranking
    from ..training.rank import rank

    rank(story.rank)
    story.run.mkdir(parents=True, exist_ok=True)
    for name in ("ranking.safetensors", "ranking.json"):
        shutil.copy2(story.rank.run_dir / name, story.run / name)
    plot_ranking(story.run / "ranking.safetensors", story.run / "plots")


def _export(story: Story, name: str) -> None:
    from ..checkpoint.source import open_stored
    from ..conversion import Request, to_hf

    shutil.rmtree(story.out / name, ignore_errors=True)
    elastic = name == "elastic_hf"
    source = open_stored(story.run if elastic else story.parent.run_dir)
    to_hf(source, [Request(story.out / name, elastic=elastic)])


def _slice(story: Story) -> None:
    from ..checkpoint.hf_read import read_hf
    from ..conversion import Request, to_hf

    elastic = read_hf(story.out / "elastic_hf")
    shutil.rmtree(story.out / "slices", ignore_errors=True)
    to_hf(elastic, [Request(story.out / "slices" / name, name) for name in elastic.manifest.submodels])
