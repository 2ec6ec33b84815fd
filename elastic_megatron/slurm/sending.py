"""Jobs on their way into the queue, one sbatch after the other, whatever it answers."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..errors import UserError, of_os_error
from . import record, scheduler
from .answers import JobId
from .record import Record
from .script import clusters, queue_name, script_path


def dependency(after: Sequence[int | str], link_count: int) -> str:
    """sbatch's ``--dependency``: success of other jobs, and the end of the link before."""
    parts = [f"afterok:{':'.join(map(str, after))}"] if after else []
    return ",".join(parts + ["singleton"] * (link_count > 1))


class Sending:
    """Jobs on their way into the queue; the record on the disk knows every id as soon as it is known at all."""

    def __init__(self, found: Record, seen: Collection[int], restore: Record | None) -> None:
        self.found, self.seen, self.restore = found, {*seen}, restore
        self.sent: list[JobId] = []

    def all(self, counts: Mapping[str, int], last: dict[str, int], some: bool) -> Record:
        """Submit jobs in order, each so often; ``last``: ids of others that are in the queue already."""
        try:
            self.found.save()
            for name, count in counts.items():
                job = self.found.jobs[name]
                after = [last[needed] for needed in job.after if needed in last]
                for _ in range(count):
                    last[name] = self._one(name, dependency(after, job.links))
            self.found = replace(self.found, unfinished=self.found.unfinished and some)
            self.found.save()
        except (UserError, OSError) as error:
            cause = error if isinstance(error, UserError) else of_os_error(error) or UserError(str(error))
            raise type(cause)("\n".join([str(cause), *self._taken_back()])) from None
        except KeyboardInterrupt:
            where = f"{self.found.run_dir / record.FILE} names what was queued"
            print(
                f"{where}; the same command goes on, `elastic-megatron cancel` takes it back", file=sys.stderr
            )
            raise
        return self.found

    def _one(self, name: str, wait: str) -> int:
        """Submit a job once; its id."""
        sent = scheduler.sbatch(script_path(self.found.run_dir, name), wait)
        job = sent.job if sent.ok and sent.job is not None else self._looked_for(name, sent)
        self.sent.append(job)
        self.seen.add(job.number)
        own = self.found.jobs[name]
        # a cluster is named where it is another than the one that answers by itself
        cluster = job.cluster if job.cluster and job.cluster != scheduler.own_cluster() else ""
        jobs = {**self.found.jobs, name: replace(own, ids=(*own.ids, job.number), cluster=cluster)}
        self.found = replace(self.found, jobs=jobs)
        self.found.save()
        return job.number

    def _looked_for(self, name: str, sent: scheduler.Sent) -> JobId:
        """The job in the queue, where sbatch's answer does not tell. Raises ``UserError`` where it was refused."""
        said = _refused(name, sent)
        unique = queue_name(self.found.run_dir, name)
        where = [sent.job.cluster] if sent.job is not None else clusters(self.found.run_dir, name)
        try:
            found = scheduler.find(unique, self.seen, sent.open, where)
        except UserError as error:
            found, said = [], f"{said}\nwhether it is in the queue all the same cannot be known now: {error}"
            sent = replace(sent, open=True)
        if len(found) == 1:
            if not sent.ok:
                print(
                    f"warning: {said}\nwarning: job {found[0].id} is in the queue nevertheless",
                    file=sys.stderr,
                )
            return JobId(found[0].id, found[0].cluster)
        if found:
            said += (
                f"\njobs {', '.join(str(q.id) for q in found)} may be it; scancel those that are not wanted"
            )
        elif sent.open:
            self.restore = self.found  # with the name by which the job is found, should it appear later
            said += (
                f"\nshould job {unique} still appear, `status` shows it, and `submit` does not queue another"
            )
        raise UserError(said)

    def _taken_back(self) -> list[str]:
        """Cancel what was queued and restore the record; what there is to say of it."""
        ids = " ".join(str(job.number) for job in self.sent)
        try:
            scheduler.cancel(self.sent)
        except UserError as error:
            return [f"what was queued before it could not be cancelled: {error}; `scancel {ids}`"]
        try:
            if self.restore is not None:
                self.restore.save()
            else:
                (self.found.run_dir / record.FILE).unlink(missing_ok=True)
        except OSError:
            pass  # what stands there says that the submission was not finished, and its jobs are gone
        if ids:
            return [f"cancelled what was queued before it: {ids}"]
        return [] if self.restore is self.found else ["nothing was submitted"]


def _refused(name: str, sent: scheduler.Sent) -> str:
    """Slurm's words on a job, all of them."""
    said = "sbatch refused" if not sent.open else "sbatch's answer leaves open what became of"
    words = list(sent.words)
    return f"{said} {name}: {words[0]}" if len(words) == 1 else "\n".join([f"{said} {name}:", *words])
