"""Device, process groups and seeds of a training process."""

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch

from elastic_megatron.errors import UserError
from elastic_megatron.runtime.cpu import adapt

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Runtime:
    """Where this process computes and which of how many it is."""

    device: torch.device
    backend: str
    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, named as in a recipe's ``parallel`` section."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1


_running: tuple[Runtime, Layout] | None = None


def start(
    *,
    seed: int = 1234,
    tensor: int = 1,
    sequence: bool = False,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    timeout_minutes: int = 10,
) -> Runtime:
    """Start (or keep) the process groups of Megatron-Core with these parallel sizes, and seed all generators.

    Rank and world size come from torchrun's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``MASTER_ADDR``, ``MASTER_PORT``); without it the process is a world of its own and opens no port.
    ``timeout_minutes`` bounds the rendezvous and every later collective; the default is torch's of NCCL.  Calling
    it again with the same sizes returns the same ``Runtime`` and seeds again; with other sizes, the model-parallel
    groups are made anew, which every rank must do together.

    Raises ``UserError`` if the sizes do not divide the world.
    """
    global _running
    sizes = Layout(tensor, sequence, pipeline, virtual_pipeline, context, expert, expert_tensor or tensor)
    _check(sizes, int(os.environ.get("WORLD_SIZE", "1")))
    if _running is not None and _running[1] == sizes:
        _seed(seed)
        return _running[0]
    on_cuda = torch.cuda.is_available()
    if on_cuda and sequence:
        # One hardware queue keeps the order of kernels, which overlapped sequence-parallel
        # communication relies on; it must be set before CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not on_cuda:
        # Soft router masks decay into denormals, which slow training up to 3.5 times.  The flag belongs to a
        # thread, and a thread inherits it from its creator: set before torch's first parallel operation it
        # holds in every intra-op thread, set later only in this one.
        torch.set_flush_denormal(True)
        adapt()
    runtime = _init_distributed(on_cuda, timeout_minutes)
    _init_model_parallel(sizes, timeout_minutes)
    _running = (runtime, sizes)
    _seed(seed)
    return runtime


def stop() -> None:
    """Destroy the model-parallel and the default process groups; ``start`` may follow."""
    global _running
    _running = None
    if not torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def adopt(sizes: Layout) -> Runtime:
    """Take over process groups of these sizes that Megatron-LM has started; ``layout`` answers for them.

    Nothing is started, seeded or adapted.
    """
    global _running
    on_cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _running = (Runtime(device, torch.distributed.get_backend(), rank, world, local_rank), sizes)
    return _running[0]


def on_gpus() -> bool:
    """Does this process compute on a GPU?"""
    return torch.cuda.is_available()


def layout() -> Layout:
    """The running layout; every size is 1 before ``start``."""
    return _running[1] if _running is not None else Layout()


def groups() -> "ProcessGroupCollection":
    """The process groups of the running layout, as Megatron modules take them.  Needs ``start`` first."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def _check(sizes: Layout, world: int) -> None:
    model = sizes.tensor * sizes.pipeline * sizes.context
    if world % model:
        raise UserError(
            f"parallel: tensor {sizes.tensor} x pipeline {sizes.pipeline} x context {sizes.context} = {model} "
            f"does not divide the {world} started processes; start a multiple of {model} or shrink parallel"
        )
    expert = sizes.expert_tensor * sizes.expert * sizes.pipeline
    if world % expert:
        raise UserError(
            f"parallel: expert_tensor {sizes.expert_tensor} x expert {sizes.expert} x pipeline {sizes.pipeline} "
            f"= {expert} does not divide the {world} started processes; start a multiple of {expert}"
        )
    if sizes.sequence and sizes.tensor == 1:
        raise UserError("parallel: sequence = true needs tensor > 1; remove it or raise parallel.tensor")
    if sizes.virtual_pipeline is not None and sizes.pipeline == 1:
        raise UserError("parallel: virtual_pipeline needs pipeline > 1; remove it or raise parallel.pipeline")


def _init_distributed(on_cuda: bool, timeout: int) -> Runtime:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if on_cuda else "gloo"
    if not torch.distributed.is_initialized():
        arguments = {"backend": backend, "timeout": timedelta(minutes=timeout)}
        if on_cuda:
            arguments["device_id"] = device
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            # A store in this process needs no port, so two runs on one machine cannot collide.
            torch.distributed.init_process_group(
                store=torch.distributed.HashStore(), rank=0, world_size=1, **arguments
            )
        else:
            _need_rendezvous()
            torch.distributed.init_process_group(**arguments)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Runtime(device, backend, rank, world, local_rank)


def _need_rendezvous() -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; launch with torchrun"
        )


def _init_model_parallel(sizes: Layout, timeout: int) -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        distributed_timeout_minutes=timeout,
    )


def _seed(seed: int) -> None:
    """As ``megatron.training``: pipeline stages differ, everything else draws alike."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
