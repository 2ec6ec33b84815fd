"""Measure conversions on a model with the tensor shapes of Nemotron 3 Nano 30B: rates against ``cp``, and memory.

python tools/benchmarks/convert.py [--gigabytes 4 | --full] [--repeats 3] [--sweep] [--json FILE]
python tools/benchmarks/convert.py --table     # write the tables of README.md from results/convert_cpu.json

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic_megatron.errors import UserError
from elastic_megatron.space import ParentShape

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import machine  # noqa: E402
import synthetic  # noqa: E402
import tables  # noqa: E402
from measure import OPERATIONS, flush, size_of  # noqa: E402
from readme_block import read_json  # noqa: E402

RESULTS = HERE / "results" / "convert_cpu.json"
PEAK_RSS = 1_000_000_000
GROWTH = 200_000_000
SWEEP = (1.0, 2.0, 4.0, 8.0)


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.table:
            tables.write(read_json(args.json or RESULTS, "tools/benchmarks/convert.py --sweep --json"))
            return 0
        with _scratch(args.dir) as folder:
            results = _measure_all(args, folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print("\n".join(tables.render(results)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = misses(results)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed and args.check else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--gigabytes", type=float, default=4.0, help="of the weights, 1e9 bytes each (default: 4)"
    )
    size.add_argument(
        "--full", action="store_true", help="the whole model: 63 GB, and three times that of disk"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timings of each operation (default: 3)")
    parser.add_argument("--sweep", action="store_true", help="also 1, 2, 4 and 8 GB, once each")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="for the models (default: temporary)"
    )
    parser.add_argument("--cold", action="store_true", help="sources on the disk, not in the page cache")
    parser.add_argument(
        "--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="operations (default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write (with --table: read) the results here"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="exit with 0 where a target is missed"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, write the tables of README.md")
    return parser.parse_args()


def misses(results: dict[str, Any]) -> list[str]:
    """The targets that a run missed, a line each."""
    found = []
    for name, row in results["operations"].items():
        target = OPERATIONS[name].target
        if target is not None and row["ratio"]["median"] < target:
            found.append(f"{name} runs at {row['ratio']['median']:.2f} of cp, the target is {target}")
        if row["peak_rss"] > PEAK_RSS:
            found.append(f"{name} takes {row['peak_rss'] / 1e9:.2f} GB, the target is {PEAK_RSS / 1e9:.1f}")
    for name in OPERATIONS:
        peaks = [run["operations"][name]["peak_rss"] for run in results["sweep"] if name in run["operations"]]
        if peaks and max(peaks) > PEAK_RSS:
            found.append(
                f"{name} takes {max(peaks) / 1e9:.2f} GB in the sweep, the target is {PEAK_RSS / 1e9:.1f}"
            )
        if peaks and peaks[-1] - peaks[0] > GROWTH:
            found.append(
                f"{name} takes {(peaks[-1] - peaks[0]) / 1e9:.2f} GB more for the largest input than for the smallest"
            )
    return found


def _measure_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    shape = synthetic.nano() if args.full else synthetic.taken(args.gigabytes)
    sweep = [synthetic.taken(g) for g in SWEEP] if args.sweep else []
    largest = max(map(synthetic.nbytes, [shape, *sweep]))
    if problem := machine.check_space(folder, 3 * largest + 1_000_000_000):
        raise UserError(problem)
    cold = args.cold or 2 * largest > machine.memory("MemTotal")
    steady = machine.Steady(folder / "sparse", cold=cold)
    quick = [name for name in args.only if OPERATIONS[name].quick]
    return {
        "machine": machine.facts(folder),
        "versions": machine.versions(),
        "page_cache": "cold" if cold else "warm",
        "repeats": args.repeats,
        **_series(shape, folder / "main", steady, args.only, args.repeats),
        "sweep": [
            _series(s, folder / f"sweep{i}", steady, quick, 1) for i, s in enumerate(sweep)
        ],
    }  # fmt: skip


def _series(
    shape: ParentShape, folder: Path, steady: machine.Steady, names: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Every operation, each after a ``cp`` of its source, ``repeats`` times; the folder is gone afterwards."""
    model = synthetic.describe(shape)
    _say(f"{model['bytes'] / 1e9:.2f} GB: layers {shape.hybrid_layer_pattern}, {shape.num_moe_experts} experts, "
         f"vocabulary {shape.vocab_size}")  # fmt: skip
    synthetic.write(folder / "hf", shape)
    flush(folder / "hf")
    if any(OPERATIONS[name].source == "megatron" for name in names):
        _run("import", folder / "hf", folder / "megatron", folder, None)
    copies: list[float] = []
    busy: list[float] = []
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    out = folder / "out"
    for repeat in range(repeats):
        for name in names:
            source = folder / OPERATIONS[name].source
            steady.prepare(source)
            seconds, cpu = machine.copy(source, out)
            copied = 2 * size_of(source)
            copies.append(copied / seconds)
            busy.append(cpu / copied * 1e9)
            shutil.rmtree(out)
            runs[name].append(_run(name, source, out, folder, steady))
            shutil.rmtree(out)
            _say(f"{repeat + 1}/{repeats} {name}: cp {copies[-1] / 1e9:.2f} GB/s, {_line(runs[name][-1])}")
    shutil.rmtree(folder)
    rate = statistics.median(copies)
    return {
        "model": model,
        "copy": {"rate": _spread(copies), "cpu_seconds_per_gb": _spread(busy)},
        "operations": {name: _summary(found, rate) for name, found in runs.items()},
    }


def _run(
    name: str, source: Path, destination: Path, folder: Path, steady: machine.Steady | None
) -> dict[str, Any]:
    """One operation in a fresh process, which has imported everything before the clock starts."""
    rehearsal, log = folder / "rehearsal", folder / "log"
    command = [sys.executable, HERE / "measure.py", name, source, destination, rehearsal]
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        if process.stdout.readline() and steady is not None:
            steady.prepare(source)
        out, _ = process.communicate("go\n", timeout=120 + size_of(source) / 2e7)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} did not end in time; run it with a smaller --gigabytes") from None
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(rehearsal, ignore_errors=True)
    if process.returncode:
        reason = (log.read_text().strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{name} failed with status {process.returncode}: {reason}")
    return json.loads(out)


def _summary(runs: Sequence[dict[str, Any]], copy_rate: float) -> dict[str, Any]:
    """Of the repeats of one operation; ``ratio`` is its rate of bytes read and written, in rates of ``cp``."""
    moved = runs[0]["read"] + runs[0]["written"]
    rates = [moved / run["seconds"] for run in runs]
    return {
        "read": runs[0]["read"],
        "written": runs[0]["written"],
        "seconds": _spread([run["seconds"] for run in runs]),
        "rate": _spread(rates),
        "ratio": _spread([rate / copy_rate for rate in rates]),
        "cpu_seconds_per_gb": _spread(
            [(run["user_seconds"] + run["system_seconds"]) / moved * 1e9 for run in runs]
        ),
        "peak_rss": max(run["peak_rss"] for run in runs),
        "idle_rss": max(run["idle_rss"] for run in runs),
        "page_faults": max(run["page_faults"] for run in runs),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A folder of our own there; gone afterwards, also after an interruption."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give one with --dir")
    folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _line(run: dict[str, Any]) -> str:
    cpu = run["user_seconds"] + run["system_seconds"]
    return (
        f"{(run['read'] + run['written']) / run['seconds'] / 1e9:.2f} GB/s, {run['seconds']:.1f} s ({cpu:.1f} CPU), "
        f"{run['peak_rss'] / 1e6:.0f} MB"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
