"""Is everything right on this machine's GPU? Every step that a CPU could not prove, the largest risk first.

python tools/gpu_check.py                # one GPU, under 12 minutes
python tools/gpu_check.py --rehearse     # the same code on a CPU, at tiny shapes: proves nothing about a GPU

Every step runs in a process of its own with a time limit, prints its numbers, and the next one runs whatever became
of it. Results go to ``tools/benchmarks/results/gpu_check_<GPU>.json``, those of a rehearsal to ``--json`` alone.

Exits with 1 where a step has failed, with 2 where there is no GPU to check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]

from gpu import processes, report  # noqa: E402
from gpu.bench import Step  # noqa: E402
from gpu.steps import STEPS  # noqa: E402

RESULTS = HERE / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    args = _arguments(argv, steps)
    chosen = [s for s in steps if not args.only or s.name in args.only]
    if args.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        _import(chosen)
    elif not report.gpus():
        print("error: nvidia-smi finds no GPU here; --rehearse runs the same steps on a CPU", file=sys.stderr)
        return 2
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=args.scratch) as folder:
        (scratch := Path(folder) / "shared").mkdir()
        for step in chosen:
            print(f"{time.strftime('%H:%M:%S')}  {step.title} ...", file=sys.stderr, flush=True)
            outcome = processes.run(
                step, Path(folder), scratch, rehearse=args.rehearse, limit=args.slower * step.seconds
            )
            outcomes.append(outcome)
            print("\n".join(report.lines(outcome)), flush=True)
    found = report.results(outcomes, rehearse=args.rehearse)
    if file := args.json or (None if args.rehearse else report.file_name(found, RESULTS)):
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"results in {file}")
    print(report.summary(outcomes))
    return int(any(outcome["outcome"] == "fail" for outcome in outcomes))


def _import(steps: Sequence[Step]) -> None:
    """Once, for all processes that fork from this one."""
    with warnings.catch_warnings(action="ignore"):
        for step in steps:
            import_module(step.function.partition(":")[0])


def _arguments(argv: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on the CPU, at tiny shapes, with torch where a kernel is missing",
    )
    parser.add_argument(
        "--only", action="append", choices=[s.name for s in steps], help="this step; again for more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for checkpoints of a few GB (default: the system's)"
    )
    parser.add_argument(
        "--slower",
        type=float,
        default=1.0,
        metavar="N",
        help="times the seconds that a step may take (default: 1)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
