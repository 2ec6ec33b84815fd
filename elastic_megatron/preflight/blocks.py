"""What is wrong with a section ``quantize`` whatever the cluster is like, so that no command goes on with it."""

from __future__ import annotations

from ..checkpoint.quantised_plan import planned_by
from ..cost.block_rules import whole_blocks
from ..cost.remedy import described
from ..errors import UserError
from ..recipe import JobChain
from .family import Families
from .layout import setting_of


def refused_at_once(chain: JobChain) -> list[str]:
    """A line for each recipe that names modules its model lacks, and for each width that tears a block of NVFP4.

    Jobs whose model cannot be read yet are left out.
    """
    families, lines = Families(chain), list[str]()
    for job in chain.jobs:
        if job.recipe.quantize is None:
            continue
        try:
            parent = families.parent(job)
        except UserError:
            continue
        try:
            planned_by(job.recipe.quantize, parent.shape)
        except UserError as error:
            lines.append(f"{job.source}: {error}")
            continue
        try:
            setting = setting_of(chain, job, families.of(job))
        except UserError:
            continue
        if setting is not None:
            lines += [f"{job.source}: {described(setting, problem)}" for problem in whole_blocks(setting)]
    return lines
