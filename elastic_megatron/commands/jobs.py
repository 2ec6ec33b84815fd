"""``elastic-megatron status``, ``logs``, ``cancel`` and ``resume``: the jobs of a chain after ``submit``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..slurm.record import Record
    from ..slurm.state import JobState

_COLOURS = {
    "done": "green", "running": "cyan", "stopping": "cyan", "waiting": "dim", "failed": "red", "cancelled": "yellow",
    "unfinished": "yellow", "lost": "red", "unknown": "yellow",
}  # fmt: skip
POLL_SECONDS = 1.0


def add_parser(subparsers: Any) -> None:
    _parser(
        subparsers,
        "status",
        "how the jobs of a chain stand",
        _status,
        json=True,
    )
    logs = _parser(
        subparsers, "logs", "the log of a job: of its newest attempt, unless another is named", _logs
    )
    logs.add_argument(
        "job", nargs="?", metavar="JOB", help="default: the one that runs, else the last that ran"
    )
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on with what is appended, over attempts, to the end"
    )
    logs.add_argument("--attempt", type=int, metavar="N", help="default: the newest")
    logs.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")
    for verb, text, handler in (
        ("cancel", "cancel the jobs of a chain; those that run save first", _cancel),
        ("resume", "queue again what has not succeeded, from the newest checkpoints", _resume),
    ):
        parser = _parser(subparsers, verb, text, handler, json=True)
        parser.add_argument("job", nargs="*", metavar="JOB", help="default: all")


def _parser(
    subparsers: Any, verb: str, text: str, handler: Callable[[argparse.Namespace], object], json: bool = False
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(verb, help=text)
    parser.add_argument(
        "target", type=Path, metavar="RUN_DIR|CHAIN|RECIPE", help="run folder, or what was submitted"
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=handler)
    return parser


def _found(args: argparse.Namespace, names: list[str]) -> Record:
    from ..recipe.types import did_you_mean
    from ..slurm.record import find

    record = find(args.target)
    for name in names:
        if name not in record.jobs:
            hint = did_you_mean(name, record.jobs)
            raise UserError(
                f"{record.run_dir}: there is no job {name!r}{hint}; jobs are {', '.join(record.jobs)}"
            )
    return record


def _status(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..slurm.state import states

    record = _found(args, [])
    found = states(record)
    if args.json:
        return {
            "name": record.name,
            "run_dir": str(record.run_dir),
            "jobs": {s.name: s.to_dict() for s in found},
        }
    _show(record, found)
    return None


def _show(record: Record, found: list[JobState]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"{record.name}  {record.run_dir}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("job", "id", "state", "attempt", "progress", ""):
        table.add_column(heading, no_wrap=heading != "")
    for s in found:
        progress = f"step {s.step:,} of {s.steps:,}" if s.steps else ""
        if s.loss is not None:
            progress += f", loss {s.loss:.4f}"
        state = f"[{_COLOURS[s.state]}]{s.state}[/]"
        table.add_row(escape(s.name), str(s.id), state, str(s.attempt or ""), progress, escape(s.detail))
    console = Console(width=None if sys.stdout.isatty() else 160)  # in a pipe nothing needs to wrap
    console.print(table)
    failed = next((s for s in found if s.state in ("failed", "lost")), None)
    if failed is not None:
        console.print(
            f"its log: elastic-megatron logs {record.run_dir} {failed.name}", soft_wrap=True, highlight=False
        )


def _logs(args: argparse.Namespace) -> None:
    from ..slurm.script import log_dir

    record = _found(args, [args.job] if args.job else [])
    name = args.job or _most_recent(record)
    logs = log_dir(record.run_dir, name)
    path = logs / (f"attempt_{args.attempt}.log" if args.attempt else "latest")
    if not path.exists():
        have = sorted(p.name for p in logs.glob("attempt_*.log")) if logs.exists() else []
        if args.attempt or not args.follow:
            raise UserError(f"{path}: no such log; {name} has {', '.join(have) or 'not started yet'}")
    if not args.follow:
        _print_tail(path, args.lines)
        return
    for text in _follow(record, name, path, args.lines):
        sys.stdout.write(text)
        sys.stdout.flush()


def _most_recent(record: Record) -> str:
    """The job whose log grew last."""
    from ..slurm.script import log_dir

    logs = {name: log_dir(record.run_dir, name) / "latest" for name in record.jobs}
    started = [name for name, path in logs.items() if path.exists()]
    if not started:
        raise UserError(
            f"{record.run_dir}: no job has started yet; see `status`, or name a job to wait for it with -f"
        )
    return max(started, key=lambda name: logs[name].stat().st_mtime)


def _print_tail(path: Path, lines: int | None) -> None:
    text = path.read_text(errors="replace")
    sys.stdout.write("".join(text.splitlines(keepends=True)[-lines:]) if lines else text)


def _follow(record: Record, name: str, path: Path, lines: int | None) -> Iterator[str]:
    """What the log holds and what is appended to it, on to the logs of later attempts, until the job has ended."""
    from ..slurm.state import states

    current, offset = path.resolve(), 0
    if lines and current.exists():
        text = current.read_bytes()
        offset = len(text) - len(b"".join(text.splitlines(keepends=True)[-lines:]))
    asked = 0.0
    while True:
        ended = False
        if time.monotonic() - asked > 5 * POLL_SECONDS:  # the queue need not be asked as often as the file
            asked = time.monotonic()
            state = next(s for s in states(record) if s.name == name)
            ended = state.state not in ("running", "waiting", "stopping", "unknown")
        if current.exists():
            with current.open("rb") as f:
                f.seek(offset)
                text = f.read()
            offset += len(text)
            if text:
                yield text.decode(errors="replace")
        newest = path.resolve()
        if newest != current and newest.exists():
            yield f"==> {newest.name} <==\n"
            current, offset = newest, 0
        elif ended:
            return
        else:
            time.sleep(POLL_SECONDS)


def _cancel(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..slurm.submission import cancel

    record = _found(args, args.job)
    ids = cancel(record, args.job)
    if args.json:
        return {"cancelled": ids}
    print(f"cancelled {', '.join(map(str, ids))}" if ids else "none of them is in the queue")
    return None


def _resume(args: argparse.Namespace) -> dict[str, Any] | None:
    from ..slurm.submission import resume

    record = _found(args, args.job)
    queued = resume(record, args.job)
    if args.json:
        return {"jobs": {name: list(ids) for name, ids in queued.items()}}
    for name, ids in queued.items():
        print(f"{name}: job {', '.join(map(str, ids))}")
    if not queued:
        print("nothing to do: every job has succeeded or is in the queue")
    return None
