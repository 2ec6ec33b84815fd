"""The tables of a run of ``convert.py``, for the screen and for README.md beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import OPERATIONS
from readme_block import replace_block, table

from elastic_megatron.errors import UserError

README = Path(__file__).resolve().parent / "README.md"
BLOCK = "conversion-table"
_HEADINGS = (
    "operation",
    "reads",
    "writes",
    "seconds",
    "of cp's rate",
    "least to most",
    "target",
    "CPU s/GB",
    "peak memory",
)


def write(results: Mapping[str, Any], readme: Path = README) -> None:
    """Put the tables into the page. Raises ``UserError`` where ``results`` or the page are not as expected."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replace_block(text, BLOCK, "\n".join(render(results))), encoding="utf-8")


def render(results: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown. Raises ``UserError`` where ``results`` are not those of a run."""
    try:
        return [*_lead(results), "", *_operations(results), *_sweep(results)]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(
            f"these are no results of the benchmark ({type(e).__name__}: {e}); run tools/benchmarks/convert.py"
        ) from None


def _lead(results: Mapping[str, Any]) -> Iterator[str]:
    machine, model = results["machine"], results["model"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    kind = "virtual machine, " if machine["virtual"] else ""
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {_gb(machine['memory_bytes'], 0)} memory, {kind}"
        f"{machine['filesystem']}, Linux {machine['kernel']}; {versions}."
    )
    yield (
        f"Model: layers `{model['layers']}`, {model['experts']} experts, vocabulary {model['vocabulary']:,}, "
        f"{model['tensors']:,} tensors, {_gb(model['bytes'], 2)}. Medians of {results['repeats']}, page cache "
        f"{results['page_cache']}; `cp` reads and writes {_rate(results['copy']['rate'])} and takes "
        f"{results['copy']['cpu_seconds_per_gb']['median']:.2f} CPU seconds per GB."
    )


def _operations(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, row in results["operations"].items():
        operation, ratio = OPERATIONS[name], row["ratio"]
        rows.append(
            (
                operation.title,
                _gb(row["read"], 2),
                _gb(row["written"], 2),
                f"{row['seconds']['median']:.1f}",
                f"{ratio['median']:.2f}",
                f"{ratio['min']:.2f} to {ratio['max']:.2f}",
                "" if operation.target is None else f"{operation.target:.1f}",
                f"{row['cpu_seconds_per_gb']['median']:.2f}",
                f"{row['peak_rss'] / 1e6:.0f} MB",
            )
        )
    return table(_HEADINGS, [":---"] + ["---:"] * (len(_HEADINGS) - 1), rows)


def _sweep(results: Mapping[str, Any]) -> list[str]:
    """Peak memory over sizes of the input: a row each, a column an operation."""
    runs = results["sweep"]
    if not runs:
        return []
    names = [name for name in OPERATIONS if name in runs[0]["operations"]]
    rows = [
        (_gb(run["model"]["bytes"], 1), *(f"{run['operations'][n]['peak_rss'] / 1e6:.0f} MB" for n in names))
        for run in runs
    ]
    headings = ("peak memory for", *(OPERATIONS[name].title for name in names))
    return ["", *table(headings, ["---:"] * len(headings), rows)]


def _gb(count: float, digits: int) -> str:
    return f"{count / 1e9:.{digits}f} GB"


def _rate(spread: Mapping[str, float]) -> str:
    return f"{_gb(spread['median'], 2)}/s ({spread['min'] / 1e9:.2f} to {spread['max'] / 1e9:.2f})"
