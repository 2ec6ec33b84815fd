"""Jobs that share a run folder: one after the other, and of one curriculum."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.run_folder import check_resumed
from ..cost.remedy import said, written
from ..errors import UserError
from ..recipe import JobChain, PlannedJob
from ..recipe.resume import FIXED_BY_QUANTIZING, Changed, fixed, forbidden
from .family import Found, ancestors


def shared_runs(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    """What is wrong between a job and the jobs above it that write to the same run folder."""
    before, names = ancestors(chain, job), [each.name for each in chain.jobs]
    for other in chain.jobs[: names.index(job.name)]:
        if other.recipe.run_dir != job.recipe.run_dir:
            continue
        if other.name not in before:
            text = f"run_dir: {job.recipe.run_dir} is that of job {other.name} too"
            yield "error", f"{text}; add {other.name} to jobs.{job.name}.after, or choose another run_dir"
        elif "export" in (other.recipe.job, job.recipe.job):
            continue  # it leaves no checkpoints there
        elif other.recipe.job == "quantize" and job.recipe.job == "train" and job.recipe.quantize is not None:
            if changed := next(fixed(other.recipe, job.recipe, FIXED_BY_QUANTIZING), None):
                yield "error", _unlike(other, changed)
        elif other.recipe.job != "train" or job.recipe.job != "train":
            text = f"run_dir: {job.recipe.run_dir} holds the checkpoints of job {other.name}"
            yield "error", f"{text}, which {job.recipe.job} would take for its own; choose another run_dir"
        else:
            for text in _continued(other, job):
                yield "error", text


def existing_run(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    """What the job would refuse about the checkpoints that its run folder has now, if no job before it adds to them."""
    command = job.recipe.job
    others = ancestors(chain, job).values()
    if command == "export" or any(other.recipe.run_dir == job.recipe.run_dir for other in others):
        return
    try:
        check_resumed(job.recipe, command)
    except UserError as error:
        yield "error", str(error)


def _continued(first: PlannedJob, then: PlannedJob) -> Iterator[str]:
    """Two jobs of one run: the same training, and the second goes further than the first."""
    if changed := next(forbidden(first.recipe, then.recipe), None):
        yield _unlike(first, changed)
    elif then.recipe.last_step <= first.recipe.last_step:
        text = f"training ends at step {then.recipe.last_step}, to which {first.name} has come already"
        ends = [stage.name for stage in first.recipe.stages]
        stop = first.recipe.stop_after
        if stop is None or stop == ends[-1]:
            yield f"{text}; take this job out, or set {first.name}.stop_after to an earlier stage"
        else:
            yield f"{text}; set stop_after=null"


def _unlike(first: PlannedJob, changed: Changed) -> str:
    """What a job has otherwise than one before it in the same run folder."""
    verb = "trains" if first.recipe.job == "train" else "quantises"
    return (
        f"{changed.key}={written(changed.after)} is {written(changed.before)} in {first.name}, which {verb} in the "
        f"same run_dir; {said({changed.key: changed.before})}"
    )
