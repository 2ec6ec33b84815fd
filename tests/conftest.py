"""Fixtures of the law tests: one Megatron process group a session, and fp64 all the way down."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from precision import keep_fp64

from elastic_megatron import runtime

# Threads that spin while other work runs cost far more than they bring. The variable is for child processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("laws", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")


@pytest.fixture(scope="session")
def megatron() -> runtime.Runtime:
    """A world of one process, kept for the session.

    Denormals are kept afterwards: flushing them is for speed, and hypothesis draws no floats without them.
    """
    started = runtime.start(seed=1)
    torch.set_flush_denormal(False)
    return started


@pytest.fixture
def fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fp64 where Megatron rounds to fp32 whatever the model's type is."""
    keep_fp64(monkeypatch)


@pytest.fixture
def fresh_moe_globals() -> Iterator[None]:
    """Megatron keeps auxiliary losses, by layer, and their scale in globals, which tests must not hand on."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def reset() -> None:
        destroy_moe_metrics_tracker()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

    reset()
    yield
    reset()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist loadfile``, files that share a pool of ranks, or a Slurm, stay on one worker."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFolder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            for folder in ("tests/parallel", "tests/slurm"):
                if nodeid.startswith(f"{folder}/"):
                    return folder
            return super()._split_scope(nodeid)

    return LoadFolder(config, log)
