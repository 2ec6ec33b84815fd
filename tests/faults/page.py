"""``docs/reliability.md``: its tables are rendered from what the studies printed, between marks; the prose is by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
JSON, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
_MARKED = re.compile(r"(<!-- (\w+): rendered by tests/faults/run\.py -->\n).*?(<!-- end -->)", re.DOTALL)
# promise, study, kinds of faults that break it
PROMISES = (
    ("The same command finishes with the bytes of an undisturbed run", "kill", ("does not finish", "different", "queued", "hang", "status", "traceback", "more than undisturbed")),
    ("Nothing that was there before is lost", "kill", ("lost",)),
    ("Nothing half has a final name", "kill", ("half",)),
    ("No debris after the finishing run, no process left running", "kill", ("debris", "left running")),
    ("One line (`submit`: and one on what it cancelled), and exit 2 or 75", "disk", ("traceback", "not one line", "status", "hang", "left running")),
    ("The last good state is as it was, and the same command finishes later", "disk", ("lost", "half", "different", "does not finish", "queued", "debris", "more than undisturbed")),
    ("Two writers: no wrong result", "race", ("wrong result", "lost", "status", "traceback", "hang", "left running")),
    ("Two writers: the second is told who the first is", "race", ("first not named",)),
    ("Damaged and hostile files: no code runs", "mutate", ("code ran",)),
    ("Damaged and hostile files: one line, no traceback", "mutate", ("traceback", "status", "no line", "left running")),
    ("Damaged and hostile files: nothing hangs, or takes 10 s of CPU or 1 GiB", "mutate", ("hang", "memory")),
    ("What a digest covers is never silently different", "mutate", ("silently different",)),
)  # fmt: skip
_UNIT = {"kill": "deaths", "disk": "points", "race": "races", "mutate": "files"}


def render(found: Mapping[str, Any]) -> dict[str, str]:
    """The text between each pair of marks."""
    studies = found["studies"]
    return {
        "promises": _table(("promise", "tested by", "count", "broken"), _promises(studies)),
        "counts": "\n\n".join(_rows(name, study) for name, study in studies.items()),
        "machine": _machine(found),
    }


def write(found: Mapping[str, Any]) -> None:
    """The JSON, and the page with its tables."""
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), found))


def filled(page: str, found: Mapping[str, Any]) -> str:
    texts = render(found)
    return _MARKED.sub(lambda m: f"{m[1]}{texts[m[2]]}\n{m[3]}", page)


def _promises(studies: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for promise, name, kinds in PROMISES:
        if study := studies.get(name):
            broken = sum(fault["kind"] in kinds for fault in study["faults"])
            test = f"`tests/faults/{name}_study.py`"
            rows.append((promise, test, f"{study['trials']:,} {_UNIT[name]}", str(broken)))
    return rows


def _rows(name: str, study: Mapping[str, Any]) -> str:
    """A table of a study: what was tried, how often, how it ended."""
    broken = [fault["row"] for fault in study["faults"]]
    rows = []
    for row, counts in study["rows"].items():
        outcomes = ", ".join(f"{k} {v:,}" for k, v in counts.items() if k != "trials")
        rows.append((row, f"{counts['trials']:,}", outcomes, str(broken.count(row))))
    return _table((f"{name}: what", _UNIT[name], "of which", "broken"), rows)


def _machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    user = "root" if machine["root"] else "an ordinary user"
    disk = "a small tmpfs" if machine["tmpfs"] else "a limit of file sizes (mounting is not allowed there)"
    other = (
        "by a process that had given up root" if machine["root"] else "in a folder without write permission"
    )
    return (
        f"Run as {user} on {machine['cores']} cores in {found['seconds'] / 60:.0f} minutes, seed {found['seed']}. "
        f"Full disks were {disk}; the folder of another user was tried {other}."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
