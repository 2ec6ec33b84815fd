"""Forks of a rank live beside its process groups."""

from __future__ import annotations

import os
import subprocess
import sys

_CODE = """
import gc, os
import torch
from torch import distributed as dist
from elastic_megatron.runtime import begin_fork

gc.disable()
dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, is_master=True), rank=0, world_size=1)
group = dist.new_group([0])
dist.all_reduce(torch.ones(3), group=group)
garbage = [group]
garbage.append(garbage)  # a circle, which only a collection finds
dist.destroy_process_group()
del garbage, group
if pid := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
begin_fork()
gc.collect()  # as happens at any time
os._exit(0)
"""


def test_a_collection_in_a_fork_leaves_process_groups_of_the_rank_alone() -> None:
    """Their threads are not in the fork: to destroy one there hangs. (A hang is ended by the limit.)"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CODE], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert ran.returncode == 0
