"""A plan counts the teacher where there will be one in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain_files import SHAPE, write_chain

from elastic_megatron.preflight.family import Families
from elastic_megatron.recipe import load_jobs


@pytest.mark.parametrize("only", [False, True])
def test_a_cache_that_has_everything_saves_the_teacher(tmp_path: Path, only: bool) -> None:
    keys = [f"train.teacher.cache={tmp_path}/cache", f"train.teacher.cache_only={str(only).lower()}"]
    chain = load_jobs(write_chain(tmp_path), keys)
    assert Families(chain).of(chain.job("train")).teacher == (None if only else SHAPE)
