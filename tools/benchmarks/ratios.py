"""Results of benchmarks that compare times and memory side by side: their tables, their targets, their command line.

A result is ``{machine, versions, device, dtype, clock, rounds, model (a sentence), rows, growth}``. A row is

    {title, ratio: {median, min, max}, target, memory, memory_target, note}

where ``ratio`` is of times, ``memory`` of peak memory, targets are the most that may be reached, and everything but
the title and the ratio may be ``None``. A row of ``growth`` is ``{title, sizes, seconds, off}``, with ``off`` the
distance of the middle point from the straight line through the outer ones. ``peaks``, which may be absent, holds
``{title, tokens, bytes}``: peak memory at several sizes; where a contender names its ``flops`` and ``tokens``, and the
results the device's ``peak_tflops`` or ``None``, there is a table of rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_block import read_json, replace_block, table

from elastic_megatron.errors import UserError

README = Path(__file__).resolve().parent / "README.md"
OFF = 0.10
_HEADINGS = ("benchmark", "time", "least to most", "target", "peak memory", "target", "beside it")


def row(
    title: str,
    ratio: Mapping[str, float],
    target: float | None = None,
    *,
    memory: float | None = None,
    memory_target: float | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """One comparison, as the module says."""
    return {"title": title, "ratio": dict(ratio), "target": target, "memory": memory,
            "memory_target": memory_target, "note": note}  # fmt: skip


def growth(title: str, sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Seconds at three sizes, and how far the middle one is from the line through the others, by its own size."""
    low, middle, high = seconds
    share = (sizes[1] - sizes[0]) / (sizes[2] - sizes[0])
    line = low + share * (high - low)
    return {"title": title, "sizes": list(sizes), "seconds": list(seconds), "off": middle / line - 1}


def misses(results: Mapping[str, Any]) -> list[str]:
    """The targets that a run missed, a line each."""
    found = []
    for r in results["rows"]:
        if r["target"] is not None and r["ratio"]["median"] > r["target"]:
            found.append(f"{r['title']}: time {r['ratio']['median']:.2f}, the target is {r['target']:.2f}")
        if r["memory_target"] is not None and r["memory"] > r["memory_target"]:
            found.append(
                f"{r['title']}: peak memory {r['memory']:.3f}, the target is {r['memory_target']:.2f}"
            )
    for g in results["growth"]:
        if abs(g["off"]) > OFF:
            found.append(
                f"{g['title']}: {100 * g['off']:+.0f} % off the line, the target is {100 * OFF:.0f} %"
            )
    return found


def render(results: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown. Raises ``UserError`` where ``results`` are not those of a run."""
    try:
        return [*_lead(results), "", *_rows(results), *_rates(results), *_growth(results), *_peaks(results)]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(
            f"these are no results of a benchmark ({type(e).__name__}: {e}); run it again"
        ) from None


def write(results: Mapping[str, Any], block: str, readme: Path = README) -> None:
    """Put the tables into the page. Raises ``UserError`` where ``results`` or the page are not as expected."""
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replace_block(text, block, "\n".join(render(results))), encoding="utf-8")


def arguments(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options that these benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts (default: 7)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write (with --table: read) the results here"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="exit with 0 where a target is missed"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help=f"measure nothing, write the tables of README.md from {results.name}",
    )
    return parser


def main(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    results: Path,
    block: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Measure and print the tables, or write them to the page. Exit status 1 where a target is missed."""
    args = parser.parse_args(argv)
    try:
        if args.table:
            write(read_json(args.json or results, f"{parser.prog} --json {results}"), block)
            return 0
        found = measure(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print("\n".join(render(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    missed = misses(found)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed and args.check else 0


def say(text: str) -> None:
    """Progress, which is not part of the results."""
    print(text, file=sys.stderr, flush=True)


def _lead(results: Mapping[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    kind = "virtual machine, " if machine["virtual"] else ""
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB memory, {kind}"
        f"Linux {machine['kernel']}; {versions}."
    )
    yield (
        f"{results['device']}, {results['dtype']}, {results['clock']}; medians of {results['rounds']} rounds. "
        f"{results['model']}"
    )


def _rows(results: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        (
            r["title"],
            number(r["ratio"]["median"]),
            f"{r['ratio']['min']:.2f} to {r['ratio']['max']:.2f}",
            number(r["target"]),
            number(r["memory"]),
            number(r["memory_target"]),
            r["note"] or "",
        )
        for r in results["rows"]
    ]
    return table(_HEADINGS, [":---"] + ["---:"] * (len(_HEADINGS) - 2) + [":---"], rows)


def _growth(results: Mapping[str, Any]) -> list[str]:
    if not results["growth"]:
        return []
    headings = ("growth", "sizes", "seconds", "middle off the line", "target")
    rows = [
        (
            g["title"],
            ", ".join(f"{n:,}" for n in g["sizes"]),
            ", ".join(f"{s:.2f}" for s in g["seconds"]),
            f"{100 * g['off']:+.1f} %",
            f"{100 * OFF:.0f} %",
        )
        for g in results["growth"]
    ]
    return ["", *table(headings, [":---"] + ["---:"] * 4, rows)]


def _peaks(results: Mapping[str, Any]) -> list[str]:
    if not results.get("peaks"):
        return []
    sizes = sorted({n for p in results["peaks"] for n in p["tokens"]})
    cells = [dict(zip(p["tokens"], p["bytes"], strict=True)) for p in results["peaks"]]
    rows = [
        (p["title"], *(f"{cell[n] / 1e6:,.0f} MB" if n in cell else "" for n in sizes))
        for p, cell in zip(results["peaks"], cells, strict=True)
    ]
    headings = ("peak memory for", *(f"{n:,} tokens" for n in sizes))
    return ["", *table(headings, [":---"] + ["---:"] * len(sizes), rows)]


def _rates(results: Mapping[str, Any]) -> list[str]:
    found = {name: c for name, c in results.get("contenders", {}).items() if "flops" in c}
    if not found:
        return []
    peak = results["peak_tflops"]
    rows = []
    for name, c in found.items():
        took = c["seconds"]["median"]
        rate = c["flops"] / took / 1e12
        share = [f"{100 * rate / peak:.1f} %"] if peak else []
        rows.append((name, f"{took:.3f}", f"{c['tokens'] / took:,.0f}", f"{rate:.3f}", *share))
    headings = ["step", "seconds", "tokens/s", "TFLOP/s of the submodel", *(["of the peak"] if peak else [])]
    return ["", *table(headings, [":---"] + ["---:"] * (len(headings) - 1), rows)]
