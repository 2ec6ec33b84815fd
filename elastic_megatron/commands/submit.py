"""``elastic-megatron submit``: render the jobs of a chain or a recipe, check them, queue them."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .overrides import add_overrides

if TYPE_CHECKING:
    from ..preflight import Finding
    from ..recipe import JobChain

_DESCRIPTION = """Write the job scripts of a chain (or of a single recipe) into its run folder and queue them, each
after those that it needs. Everything is checked first: layouts, memory, paths, room. With --dry-run the very same
files are printed instead, nothing is written, and Slurm is asked whether it would take them; the last line says what
would have come of it.

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
    add_overrides(parser, "the files'")
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
    _stop_at(_reported(findings, args.force))
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


def _reported(findings: list[Finding], force: bool) -> list[str]:
    """Warnings go to stderr; the errors, which forbid to submit."""
    for finding in findings:
        if finding.severity == "warning" or force:
            print(f"warning: {finding}", file=sys.stderr)
    return [] if force else [str(f) for f in findings if f.severity == "error"]


def _stop_at(problems: list[str]) -> None:
    """Raises ``UserError`` of all problems at once, with the verdict last."""
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise UserError("\n".join([*problems, f"{count}; nothing was submitted"]))


def _dry_run(args: argparse.Namespace, chain: JobChain, findings: list[Finding]) -> dict[str, Any] | None:
    from ..slurm import scheduler
    from ..slurm.record import done
    from ..slurm.script import files_of, links, script_path
    from ..slurm.sending import dependency

    files = files_of(chain)
    commands = []
    for job in chain.jobs:
        wait = dependency([f"<{name}>" for name in job.after], links(job))
        option = f"--dependency={shlex.quote(wait)} " if wait else ""
        script = shlex.quote(str(script_path(chain.run_dir, job.name)))
        commands += [f"sbatch {option}{script}"] * links(job)
    asked = scheduler.available()
    refusals = _refusals(chain, files, args.again) if asked else []
    if not args.json:
        for path, text in files.items():
            print(f"==> {path} <==\n{text}")
        print("==> commands <==\n" + "\n".join(commands))
    _stop_at([*_reported(findings, args.force), *refusals])
    count = sum(links(job) for job in chain.jobs if not done(chain.run_dir, job.name))
    verdict = f"would submit {count} job{'s' * (count != 1)}"
    if not asked:
        verdict += "; Slurm was not asked, for sbatch is not installed here"
    if not args.json:
        print(verdict)
        return None
    return {
        "run_dir": str(chain.run_dir),
        "files": {str(path): text for path, text in files.items()},
        "commands": commands,
        "asked_slurm": asked,
        "verdict": verdict,
    }


def _refusals(chain: JobChain, files: dict[Path, str], again: bool) -> list[str]:
    """What stands against submitting: what is in the queue or was submitted before, and Slurm's own words."""
    from ..slurm import scheduler
    from ..slurm.script import script_path
    from ..slurm.submission import check

    found = []
    try:
        check(chain, again)
    except UserError as error:
        found.append(str(error))
    for job in chain.jobs:
        if words := scheduler.refusal(files[script_path(chain.run_dir, job.name)]):
            found.append(f"{job.name}: sbatch --test-only: {words}")
    return found
