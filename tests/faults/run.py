"""All studies, with fixed seeds, and the page that says what they found.

    python tests/faults/run.py             # everything: docs/reliability.json and the tables of docs/reliability.md
    python tests/faults/run.py --only kill mutate --scale 0.1 --json /tmp/some.json

Ends with 1 where a promise was broken. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import disk_study  # noqa: E402
import kill_study  # noqa: E402
import mutate_study  # noqa: E402
import quickstart_study  # noqa: E402
import race_study  # noqa: E402
from page import JSON, render, write  # noqa: E402
from tally import Lanes, Tally  # noqa: E402
from worlds import build  # noqa: E402
from zygote import Zygote  # noqa: E402

SEED = 20
STUDIES = ("kill", "disk", "race", "mutate")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the trials; below 1 the page stays as it is"
    )
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="write the counts here, and leave the page as it is")
    args = parser.parse_args()
    whole = args.scale == 1 and args.only == STUDIES and args.rows is None and args.json is None
    os.environ["OMP_NUM_THREADS"] = "1"
    found = run(args.only, args.scale, args.seed, args.rows)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    elif whole:
        write(found)
        print(f"wrote {JSON} and its page")
    print(render(found)["counts"])
    return 1 if any(study["faults"] for study in found["studies"].values()) else 0


def run(only: tuple[str, ...], scale: float, seed: int, rows: list[str] | None = None) -> dict[str, Any]:
    """Counts and faults by study, and how long it took."""

    def share(counts: Mapping[str, int]) -> dict[str, int]:
        return {n: max(1, round(scale * c)) for n, c in counts.items() if rows is None or n in rows}

    formats = {name: count for name, (count, _) in mutate_study.FORMATS.items()}
    studies: dict[str, Callable[[Lanes, Tally], None]] = {
        "kill": lambda lanes, tally: kill_study.study(lanes, share(kill_study.MOMENTS), seed, tally),
        "disk": lambda lanes, tally: disk_study.study(
            lanes, share(disk_study.POINTS), seed, tally, rows is None
        ),
        "race": lambda lanes, tally: race_study.study(lanes, share(race_study.RACES), seed, tally),
        "mutate": lambda lanes, tally: mutate_study.study(lanes, share(formats), seed, tally),
    }
    begun, found = time.monotonic(), {}
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    root.chmod(0o755)  # another user runs commands in it
    try:
        with ExitStack() as stack:
            zygotes = [stack.enter_context(Zygote()) for _ in range(min(2, os.cpu_count() or 1))]
            lanes = Lanes(build(zygotes[0], root / "world"), zygotes, root)
            for name in only:
                tally, start = Tally(), time.monotonic()
                studies[name](lanes, tally)
                if name == "kill" and (rows is None or "quickstart" in rows):
                    deaths = max(1, round(scale * quickstart_study.DEATHS))
                    quickstart_study.study(lanes.first, deaths, seed, tally)
                found[name] = {
                    "seconds": round(time.monotonic() - start),
                    "trials": tally.trials,
                    **tally.to_dict(),
                }
                print(
                    f"{name}: {tally.trials} trials, {len(tally.faults)} faults", file=sys.stderr, flush=True
                )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    machine = {"cores": os.cpu_count(), "root": os.getuid() == 0, "tmpfs": disk_study.may_mount()}
    return {"seed": seed, "machine": machine, "seconds": round(time.monotonic() - begun), "studies": found}


if __name__ == "__main__":
    sys.exit(main())
