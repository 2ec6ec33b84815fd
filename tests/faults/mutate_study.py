"""Thousands of damaged and hostile files: no code runs, nothing hangs or runs away, and every answer is one line.

A trial changes one file of a copy and runs a command that reads it. Where the command ends with 0, its result is the
one of the sound file, or the file carries neither a length nor a digest that could tell.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from binary_mutations import ARCHIVE, ARRAY, INDEX, PICKLE, SAFETENSORS, SHARDS
from fault_cases import snapshot
from mutations import JSON, LINES, TEXT, YAML, Mutation
from tally import Lane, Lanes, Tally
from worlds import World, fresh
from zygote import Ran, Run

# of CPU; what waits for ever is ended after six times that by the clock
SECONDS, MIB = 10.0, 1024.0
MARKED = "code-ran"  # the file that proves it; without a space, as shells see the name
_ITERATION = "checkpoints/iter_0000005"


@dataclass(frozen=True)
class Format:
    """A file that a command reads.

    Args:
        source: folder of the world that is copied to ``it``.
        file: the one that is changed, below it.
        argv: of the command; ``{w}`` is the world.
        sealed: its bytes are covered by a digest, so that a change must be noticed.
        unsealed: files that are removed first: without digests, readers are on their own.
        also: further copies: name in the trial -> name in the world.
    """

    source: str
    file: str
    mutations: Sequence[Mutation]
    argv: tuple[str, ...]
    sealed: bool = False
    unsealed: tuple[str, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    recipes: bool = False
    slurm: bool = False


def _slice(source: str, file: str, mutations: Sequence[Mutation]) -> Format:
    return Format(source, file, mutations, ("slice", "it", "out", "--submodel", "small"))


def _import(file: str, mutations: Sequence[Mutation], source: str = "hf") -> Format:
    return Format(source, file, mutations, ("import", "it", "out"))


def _export(file: str, mutations: Sequence[Mutation], source: str = "train", **how: object) -> Format:
    return Format(source, file, mutations, ("export", "it", "out"), **how)


def _report(source: str, file: str, mutations: Sequence[Mutation]) -> Format:
    return Format(source, file, mutations, ("report", "it"), unsealed=("checkpoints", "plots"))


def _in_run(
    file: str, mutations: Sequence[Mutation], source: str, argv: Sequence[str], **how: object
) -> Format:
    return Format(source, file, mutations, tuple(argv), recipes=True, **how)


_BARE = (f"{_ITERATION}/integrity.json",)
_FOREIGN = ("export", "it", "out", "--config", "{w}/hf")
FORMATS: dict[str, tuple[int, Format]] = {
    # trials of the whole study, and what they try
    "safetensors, imported": (180, _import("model.safetensors", SAFETENSORS)),
    "safetensors, sliced": (180, _slice("family", "model.safetensors", SAFETENSORS)),
    "safetensors index": (180, _slice("sharded", "model.safetensors.index.json", JSON)),
    "config.json, imported": (180, _import("config.json", JSON)),
    "config.json, planned": (90, Format("hf", "config.json", JSON, ("plan", "it", "--json"))),
    "elastic_config.json": (200, _slice("family", "elastic_config.json", JSON)),
    "integrity.json": (150, _export(f"{_ITERATION}/integrity.json", JSON)),
    "elastic.json": (80, _export(f"{_ITERATION}/elastic.json", JSON, sealed=True)),
    "elastic.json without digests": (130, _export(f"{_ITERATION}/elastic.json", JSON, unsealed=_BARE)),
    ".metadata": (100, _export(f"{_ITERATION}/.metadata", PICKLE, sealed=True)),
    ".metadata without digests": (200, _export(f"{_ITERATION}/.metadata", PICKLE, unsealed=_BARE)),
    "distcp": (80, _export(f"{_ITERATION}/__0_0.distcp", SHARDS, sealed=True)),
    "distcp without digests": (150, _export(f"{_ITERATION}/__0_0.distcp", SHARDS, unsealed=_BARE)),
    "foreign .metadata": (120, Format("foreign", ".metadata", PICKLE, _FOREIGN)),
    "foreign common.pt": (140, Format("foreign", "common.pt", ARCHIVE, _FOREIGN, unsealed=("run_config.yaml",))),
    "foreign run_config.yaml": (100, Format("foreign", "run_config.yaml", YAML, _FOREIGN)),
    "amax": (120, _export("checkpoints/iter_0000000/amax.safetensors", SAFETENSORS, "quantize", sealed=True)),
    "tracker": (80, _export("checkpoints/latest_checkpointed_iteration.txt", TEXT)),
    "idx": (50, _in_run("train.idx", INDEX, "data", ("rank", "rank.yaml", "data.train=[{path: it/train, weight: 1}]"))),
    "cache array": (20, _in_run("*shuffle_index.npy", ARRAY, "rank.cache", ("rank", "rank.yaml", "data.cache=it"))),
    "cache description": (10, _in_run("*description.txt", JSON, "rank.cache", ("rank", "rank.yaml", "data.cache=it"))),
    ".metadata, resumed": (30, _in_run(f"{_ITERATION}/.metadata", PICKLE, "train", ("train", "train.yaml", "run_dir=it"), unsealed=_BARE)),
    "distcp, ranked": (
        30, _in_run("iter_0000000/__0_0.distcp", SHARDS, "ckpt", ("rank", "rank.yaml", "model.checkpoint=it"), unsealed=("iter_0000000/integrity.json",)),
    ),
    "recipe": (150, Format("chains", "train.yaml", YAML, ("recipe", "show", "it/train.yaml"))),
    "chain": (80, Format("chains", "chain.yaml", YAML, ("submit", "it/chain.yaml", "--dry-run"), unsealed=("chain",), slurm=True)),
    "cluster file": (80, Format("chains", "cluster.yaml", YAML, ("submit", "it/chain.yaml", "--dry-run"), unsealed=("chain",), slurm=True)),
    "chain.json": (120, Format("chains", "chain/chain.json", JSON, ("status", "it/chain"), slurm=True)),
    "chain.json, resumed": (60, Format("chains", "chain/chain.json", JSON, ("resume", "it/chain"), slurm=True)),
    "metrics.jsonl": (120, _report("train", "metrics.jsonl", LINES)),
    "metrics.jsonl, quantised": (100, _report("quantize", "metrics.jsonl", LINES)),
    "report.json": (100, _report("reported", "report.json", JSON)),
    "ranking.safetensors": (80, _report("rank", "ranking.safetensors", SAFETENSORS)),
    "ranking.json": (60, _report("rank", "ranking.json", JSON)),
    "lock of a target": (80, Format("died.import", "*.lock", JSON, ("import", "{w}/hf", "it/out"))),
    "lock of a run": (20, _in_run("*.lock", JSON, "died.rank", ("rank", "rank.yaml", "run_dir=it/run"))),
    "tokenizer.json": (60, Format("hf", "tokenizer.json", JSON, ("prepare-data", "{w}/valid.txt", "--output", "out/t", "--tokenizer", "it"))),
    "JSON lines": (60, Format("lines", "lines.jsonl", LINES, ("prepare-data", "it/lines.jsonl", "--output", "out/t", "--tokenizer", "{w}/hf"))),
}  # fmt: skip
SAMPLE = {
    "safetensors, sliced": 6, "elastic_config.json": 8, ".metadata without digests": 8, "distcp without digests": 6,
    "recipe": 8, "metrics.jsonl": 6, "chain.json": 6, "foreign common.pt": 6,
}  # fmt: skip


def study(lanes: Lanes, counts: Mapping[str, int], seed: int, tally: Tally) -> None:
    """So many damaged files of each format."""
    rng = random.Random(seed)
    trials: list[Callable[[Lane], None]] = []
    for name, count in counts.items():
        form = FORMATS[name][1]
        sound = _sound(name, form, lanes.first)
        trials += [partial(_trial, name, form, sound, rng.randrange(2**32), tally) for _ in range(count)]
    rng.shuffle(trials)
    lanes(trials)


def _sound(name: str, form: Format, lane: Lane) -> dict[str, str]:
    """The result of the sound file. Raises ``AssertionError`` where there is none: nothing could be compared."""
    folder = _prepare(form, lane)
    [ran] = lane.zygote.run(_run(form, lane.world, folder))
    assert ran.status == 0, f"{name}: {ran.status}\n{ran.err}"
    return _result(folder, ran)


def _prepare(form: Format, lane: Lane) -> Path:
    folder = fresh(lane.folder)
    for name, source in {"it": form.source, **form.also}.items():
        shutil.copytree(lane.world / source, folder / name)
    for name in form.unsealed:
        path = folder / "it" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if form.recipes:
        lane.world.write_recipes(folder)
    return folder


def _run(form: Format, world: World, folder: Path) -> Run:
    environment = {"FAULTS_MARK": str(folder / MARKED)}
    if form.slurm:
        environment |= world.slurm(folder / "queue")
    argv = [a.format(w=world.root) if a.startswith("{") else a for a in form.argv]
    return Run(argv, str(folder), environment, seconds=6 * SECONDS, memory_mib=2048)


def _result(folder: Path, ran: Ran, changed: str = "") -> dict[str, str]:
    """What a command made, and said where it makes nothing; not the file that was changed, which may be endless."""

    def skipped(name: str) -> bool:
        return name == changed or name.startswith(("it/checkpoints", "cache/")) or name.endswith(".yaml")

    made = snapshot(folder, skipped)
    return made | {"stdout": ran.out}


def _trial(name: str, form: Format, sound: dict[str, str], seed: int, tally: Tally, lane: Lane) -> None:
    rng = random.Random(seed)
    folder = _prepare(form, lane)
    [path] = (
        (folder / "it").rglob(Path(form.file).name)
        if form.file.startswith("*")
        else [folder / "it" / form.file]
    )
    words = rng.choice(form.mutations)(path, rng)
    changed = path.relative_to(folder).as_posix()
    [ran] = lane.zygote.run(_run(form, lane.world, folder))
    outcome = "refused" if ran.status in (2, 75) else "other"
    if ran.status == 0:
        result = _result(folder, ran, changed)
        same = all(result.get(n) == d for n, d in sound.items() if n != changed)
        outcome = "the sound result" if same else "read as other values"
    tally.count(name, outcome)
    tally.most(name, "peak MiB", round(ran.mib))
    tally.most(name, "longest CPU ms", round(1000 * ran.cpu))
    moment = f"{words} [seed {seed}]"
    if (folder / MARKED).exists():
        tally.fault(name, "code ran", moment, f"exit {ran.status}: {ran.last}")
    if kind := _badly(ran):
        tally.fault(name, kind, moment, f"exit {ran.status}, {ran.wall:.1f} s, {ran.mib:.0f} MiB: {ran.last}")
    elif outcome == "read as other values" and form.sealed:
        tally.fault(name, "silently different", moment, "exit 0 with another result")


def _badly(ran: Ran) -> str | None:
    if ran.hung or ran.cpu > SECONDS:
        return "hang"
    if ran.mib > MIB:
        return "memory"
    if ran.traceback:
        return "traceback"
    if ran.left:
        return "left running"
    if ran.status not in (0, 2, 75):
        return "status"
    if ran.status and "error: " not in ran.err:
        return "no line"
    return None
