"""A run folder as data. Everything is optional: what a run has not produced is simply absent."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from elastic_megatron.errors import UserError
from elastic_megatron.files.json_files import parse, read_object
from elastic_megatron.files.reading import open_regular
from elastic_megatron.report.kinds import LINE, REPORT, misfit
from elastic_megatron.report.quantized import Quantized, read_quantized, split
from elastic_megatron.report.ranking import Ranking, read_ranking

Json = dict[str, Any]
_REMEDY = "delete it, or write it again"
_LONGEST_LINE, _LARGEST = 4 << 20, 256 << 20


@dataclass(frozen=True)
class RunData:
    """Contents of one run folder; lines are sorted by step, and each step occurs once.

    ``evals`` of a quantised run are of its quantised weights; what it was before is in ``quantized``.
    """

    title: str
    report: Json = field(default_factory=dict)
    steps: list[Json] = field(default_factory=list)
    evals: list[Json] = field(default_factory=list)
    routers: list[Json] = field(default_factory=list)
    rewinds: list[Json] = field(default_factory=list)
    quantized: Quantized | None = None
    unreadable_lines: int = 0
    ranking: Ranking | None = None
    recipe: str | None = None

    @property
    def parent(self) -> Json:
        return self.report.get("parent") or {}

    @property
    def submodels(self) -> dict[str, Json]:
        """From ``report.json``, largest active size first."""
        found = self.report.get("submodels") or {}
        return dict(sorted(found.items(), key=lambda item: -(item[1].get("active_params") or 0)))

    @property
    def names(self) -> list[str]:
        """Every submodel named anywhere in the run; the position of a name decides its colour."""
        seen = dict.fromkeys(self.submodels)
        for line in reversed(self.routers):
            budgets = line.get("budgets") or {}
            seen |= dict.fromkeys(sorted(budgets, key=lambda name: -(budgets[name].get("target") or 0)))
        for line in self.evals:
            seen |= dict.fromkeys(line.get("submodels") or {})
        seen |= dict.fromkeys(self.quantized.names if self.quantized else [])
        for line in self.steps:
            seen |= dict.fromkeys([] if (name := budget_of(line)) is None else [name])
        return list(seen)

    @property
    def loss_unit(self) -> str:
        return (self.report.get("data") or {}).get("unit") or "nats per token"


def budget_of(step: Json) -> str | None:
    """The budget a step trained; None where its micro-batches drew several, or where none is logged."""
    budget = step.get("budget")
    if isinstance(budget, dict):
        return next(iter(budget)) if len(budget) == 1 else None
    return budget


def read_run(run_dir: Path, report_json: Path | None = None) -> RunData:
    """Read ``run_dir``; ``report_json`` defaults to the one inside it.

    Raises `UserError` if the folder does not exist, holds nothing to show, or holds JSON that is not
    an object. A line of ``metrics.jsonl`` that does not parse (a run killed while writing), or holds what no
    run writes, is counted and left out; a step logged twice (a resumed run) keeps its last line.
    """
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist; give the run_dir of a recipe that was run")
    if report_json is not None and not report_json.is_file():
        raise UserError(f"{report_json} does not exist; leave it out to use {run_dir / 'report.json'}")
    report = _read_object(report_json or run_dir / "report.json")
    lines, unreadable = _read_lines(run_dir / "metrics.jsonl")
    evaluated, calibrations = _objects(lines, "eval"), _objects(lines, "calibration")
    plain, quantised = split(evaluated)
    ranking = read_ranking(run_dir / "ranking.safetensors")
    if not report and not lines and ranking is None:
        raise UserError(
            f"{run_dir} has no metrics.jsonl, report.json or ranking.safetensors; give the run_dir of a run"
        )
    return RunData(
        title=str(report.get("name") or run_dir.resolve().name),
        report=report,
        steps=_by_step(line for line in lines if "step" in line),
        evals=_by_step(quantised or [line for line in plain if "weights" not in line]),
        routers=_by_step(_objects(lines, "router")),
        rewinds=_objects(lines, "rewind"),
        quantized=read_quantized(run_dir, evaluated, calibrations),
        unreadable_lines=unreadable,
        ranking=ranking,
        recipe=_read_text(run_dir / "recipe.yaml"),
    )


def _read_text(path: Path) -> str | None:
    if not path.exists():
        return None
    with _opened(path) as file:
        return file.read(_LONGEST_LINE).decode("utf-8", errors="replace").replace("\0", "\ufffd")


def _read_object(path: Path) -> Json:
    if not path.exists():
        return {}
    found = read_object(path, _REMEDY, _REMEDY)
    if odd := misfit(found, REPORT, "the report"):
        raise UserError(f"{path}: {odd}; {_REMEDY}")
    return found


def _read_lines(path: Path) -> tuple[list[Json], int]:
    lines: list[Json] = []
    unreadable = 0
    if not path.exists():
        return lines, unreadable
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST:
            raise UserError(f"{path} is larger than {_LARGEST >> 20} MiB, which no run's is; {_REMEDY}")
        while text := file.readline(_LONGEST_LINE):
            if not text.strip():
                continue
            try:
                line = parse(text)
            except ValueError:
                line = None
            if misfit(line, LINE) is None:
                lines.append(line)
            else:
                unreadable += 1
    return lines, unreadable


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None


def _objects(lines: list[Json], key: str) -> list[Json]:
    return [line[key] for line in lines if isinstance(line.get(key), dict)]


def _by_step(lines: Iterable[Json]) -> list[Json]:
    latest = {line.get("step", 0): line for line in lines}
    return [latest[step] for step in sorted(latest)]
