"""``elastic-megatron submit``: render the jobs of a chain or a recipe, check them, queue them."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..preflight import Finding
    from ..recipe import JobChain

_DESCRIPTION = """Write the job scripts of a chain (or of a single recipe) into its run folder and queue them, each
after those that it needs. Everything is checked first: layouts, memory, paths, room. With --dry-run the very same
files are printed instead, nothing is written, and Slurm is asked whether it would take them.

Overrides of a chain say whose they are: stage1.optimizer.lr=2e-4 is of the recipe of job stage1,
cluster.partition=debug of the cluster file, run_dir=/elsewhere of the chain. Those of a single recipe are its own."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "submit",
        help="queue the jobs of a chain or recipe on a SLURM cluster",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="CHAIN|RECIPE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the files'")
    parser.add_argument(
        "--dry-run", "--dryrun", action="store_true", help="print what would be sent, and send nothing"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="over a chain that was submitted before and is not in the queue: write its files anew, and queue what "
        "has not succeeded",
    )
    parser.add_argument("--force", action="store_true", help="submit although the checks found errors")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Raises ``UserError`` for bad files, for errors that the checks found, and where Slurm refuses."""
    from ..preflight import preflight
    from ..recipe import load_jobs
    from ..slurm import scheduler

    chain = load_jobs(args.recipe, args.overrides)
    findings = preflight(chain)
    if args.dry_run:
        return _dry_run(args, chain, findings)
    _report(findings, args.force)
    if not scheduler.available():
        raise UserError("sbatch is not installed here; submit on a login node, or look at it with --dry-run")
    from ..recipe.jobs import shown_path
    from ..slurm.submission import submit

    command = ["elastic-megatron", "submit", str(args.recipe), *args.overrides]
    queued = submit(chain, command, again=args.again)
    if args.json:
        return {"run_dir": str(chain.run_dir), "jobs": {name: list(ids) for name, ids in queued.items()}}
    for job in chain.jobs:
        ids = ", ".join(map(str, queued.get(job.name, ())))
        print(f"{job.name}: {f'job {ids}' if ids else 'succeeded before'}")
    print(f"watch with: elastic-megatron status {shlex.quote(shown_path(chain.run_dir))}")
    return None


def _report(findings: list[Finding], force: bool) -> None:
    """Warnings on stderr; errors all at once, as one ``UserError``."""
    errors = [f for f in findings if f.severity == "error"]
    for finding in findings:
        if finding.severity == "warning" or force:
            print(f"warning: {finding}", file=sys.stderr)
    if errors and not force:
        raise UserError("\n".join(str(f) for f in errors))


def _dry_run(args: argparse.Namespace, chain: JobChain, findings: list[Finding]) -> dict[str, Any] | None:
    from ..slurm import scheduler
    from ..slurm.script import files_of, links, script_path
    from ..slurm.submission import dependency

    files = files_of(chain)
    commands = []
    for job in chain.jobs:
        wait = dependency([f"<{name}>" for name in job.after], links(job))
        option = f"--dependency={shlex.quote(wait)} " if wait else ""
        script = shlex.quote(str(script_path(chain.run_dir, job.name)))
        commands += [f"sbatch {option}{script}"] * links(job)
    refusals = _refusals(chain, files) if scheduler.available() else None
    if not args.json:
        for path, text in files.items():
            print(f"==> {path} <==\n{text}")
        print("==> commands <==\n" + "\n".join(commands))
        if refusals is None:
            print("(sbatch is not installed here, so Slurm was not asked)")
    _report(findings, args.force)
    if refusals:
        raise UserError("\n".join(f"{name}: sbatch --test-only: {text}" for name, text in refusals.items()))
    if not args.json:
        return None
    return {
        "run_dir": str(chain.run_dir),
        "files": {str(path): text for path, text in files.items()},
        "commands": commands,
        "asked_slurm": refusals is not None,
    }


def _refusals(chain: JobChain, files: dict[Path, str]) -> dict[str, str]:
    from ..slurm import scheduler
    from ..slurm.script import script_path

    asked = {job.name: scheduler.refusal(files[script_path(chain.run_dir, job.name)]) for job in chain.jobs}
    return {name: text for name, text in asked.items() if text}
