"""What a job script says and what checks find, observed without torch: probes over a chain file in the working folder."""

from __future__ import annotations

import re
import shutil
from typing import Any

from elastic_megatron.commands import plan
from elastic_megatron.preflight import preflight
from elastic_megatron.recipe import JobChain, describe
from elastic_megatron.slurm.script import files_of, links
from elastic_megatron.slurm.sending import dependency
from elastic_megatron.slurm.submission import write


def scripts(chain: JobChain) -> Any:
    """Text of the job scripts, and how they are queued; nothing of the resolved documents beside them."""
    texts = {str(path): text for path, text in files_of(chain).items() if path.suffix == ".sbatch"}
    return texts, [[dependency(job.after, links(job))] * links(job) for job in chain.jobs]


def findings(chain: JobChain) -> Any:
    """What preflight says."""
    return [str(finding) for finding in preflight(chain)]


def plans(chain: JobChain) -> Any:
    """What the jobs take, by `plan`."""
    return plan.plan(plan._of_chain(chain, 64))["jobs"]


def derived(chain: JobChain) -> Any:
    """Numbers that `recipe show` derives; without the recipe itself, which stands before them."""
    return [re.findall(r"^#.*", describe(job.recipe, job), re.MULTILINE) for job in chain.jobs]


def written(chain: JobChain) -> Any:
    """Files and links that submitting leaves."""
    shutil.rmtree(chain.run_dir, ignore_errors=True)
    write(chain)
    found = sorted(chain.run_dir.rglob("*"))
    return [(str(path), str(path.readlink()) if path.is_symlink() else "") for path in found]
