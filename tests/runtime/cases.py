"""Cases for :mod:`driver`: each runs in a fresh process that has imported Megatron and adapted nothing."""

import logging
import os
import warnings
from typing import Any

import tiny
import torch

from elastic_megatron import runtime
from elastic_megatron.runtime import cpu

SEEN: list[str] = []


class _Remember(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        SEEN.append(record.name)


def import_megatron() -> None:
    """Import what a training process imports, noting the warnings."""
    for name in cpu.NOISY_LOGGERS:
        logging.getLogger(name).addHandler(_Remember())
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: SEEN.append(str(message))
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.distributed
    import megatron.core.models.hybrid.hybrid_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    import elastic_megatron.runtime.leaves  # noqa: F401


def _children() -> list[str]:
    import psutil

    return [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]


def _whole_run() -> dict[str, Any]:
    """Train, save, load into other weights, go on: the losses of both must agree from there."""
    first = tiny.Trainer(tiny.model())
    losses = [first.step() for _ in range(3)]
    os.mkdir("checkpoint")
    first.save("checkpoint")
    spawned = any("spawn_main" in command for command in _children())
    torch.manual_seed(99)
    second = tiny.Trainer(tiny.model())
    second.load("checkpoint")
    went_on, resumed = ([t.step(), t.step()] for t in (first, second))
    return {"losses": losses, "went_on": went_on, "resumed": resumed, "spawned": spawned, "seen": SEEN}


def _latent() -> None:
    tiny.loss(tiny.model("E", moe_latent_size=16)).backward()


def _start_without(adaptation: Any) -> None:
    cpu.ADAPTATIONS = tuple(a for a in cpu.ADAPTATIONS if a is not adaptation)
    runtime.start(seed=3)


def everything() -> dict[str, Any]:
    runtime.start(seed=3)
    return _whole_run()


def latent_projections() -> None:
    runtime.start()
    _latent()


def without_quiet_upstream() -> dict[str, Any]:
    _start_without(cpu.quiet_upstream)
    return _whole_run()


def without_eager_instead_of_compiled() -> None:
    import torch._inductor.compile_fx as inductor

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("inductor was asked to compile")

    inductor.compile_fx = refuse
    _start_without(cpu.eager_instead_of_compiled)
    tiny.loss(tiny.model())


def without_current_device_is_cpu() -> None:
    _start_without(cpu.current_device_is_cpu)
    tiny.model()


def without_cuda_literals_mean_cpu() -> None:
    _start_without(cpu.cuda_literals_mean_cpu)
    tiny.Trainer(tiny.model(), distributed_optimizer=False).step()


def without_streams_are_synchronous() -> None:
    _start_without(cpu.streams_are_synchronous)
    tiny.model()


def without_rng_tracker_on_cpu() -> None:
    _start_without(cpu.rng_tracker_on_cpu)


def without_mamba_kernels_in_torch() -> None:
    _start_without(cpu.mamba_kernels_in_torch)
    tiny.model()


def without_final_norm_in_torch() -> None:
    _start_without(cpu.final_norm_in_torch)
    tiny.model()


def without_split_sizes_as_numpy() -> None:
    cpu.ADAPTATIONS = tuple(a for a in cpu.ADAPTATIONS if a is not cpu.split_sizes_as_numpy)
    expert_parallel()


def expert_parallel() -> float:
    runtime.start(expert=2)
    return float(tiny.loss(tiny.model("E", expert_model_parallel_size=2)))


def without_latent_projections_in_torch() -> None:
    _start_without(cpu.latent_projections_in_torch)
    _latent()


def without_adam_with_group_step() -> None:
    _start_without(cpu.adam_with_group_step)
    _whole_run()


def without_checkpoint_queue_by_fork() -> bool:
    _start_without(cpu.checkpoint_queue_by_fork)
    trainer = tiny.Trainer(tiny.model("-"))
    trainer.step()
    os.mkdir("checkpoint")
    trainer.save("checkpoint")
    return any("spawn_main" in command for command in _children())


without_split_sizes_as_numpy.ranks = expert_parallel.ranks = 2  # type: ignore[attr-defined]


def recomputation_draws_the_same_dropout() -> float:
    """Largest gradient difference between a plain and a recomputed backward pass, with dropout."""
    gradients = []
    for recompute in (
        {},
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    ):
        runtime.start(seed=3)
        model = tiny.model(hidden_dropout=0.2, **recompute)
        torch.autograd.backward(tiny.loss(model))
        gradients.append([p.grad for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))


def sharded_keys() -> dict[str, list[int]]:
    runtime.start()
    metadata = {"dp_cp_group": runtime.groups().dp_cp}
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = tiny.model().sharded_state_dict(metadata=metadata)
    apply_factories(state)  # splits in_proj and conv1d into their components
    return {t.key: list(t.global_shape) for t in nested_values(state) if isinstance(t, ShardedTensor)}


def multi_token_prediction() -> list[str]:
    runtime.start()
    model = tiny.model("M*-/*E", mtp_num_layers=1)
    b = tiny.batch()
    mask = torch.ones_like(b["labels"], dtype=torch.float32)
    model(b["tokens"], b["positions"], None, labels=b["labels"], loss_mask=mask).mean().backward()
    return [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]


def patience() -> list[float]:
    """Minutes that a collective may take, of the world's group and of one of Megatron's."""
    runtime.start(timeout_minutes=7)
    groups = (torch.distributed.group.WORLD, runtime.groups().tp)
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for g in groups]  # type: ignore


def start_twice() -> dict[str, Any]:
    first = runtime.start(seed=3)
    drawn = torch.rand(3).tolist()
    again = runtime.start(seed=3)
    redrawn = torch.rand(3).tolist()
    runtime.stop()
    after = runtime.start(seed=3)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return {
        "same": first is again,
        "drawn": drawn,
        "redrawn": redrawn,
        "equal": after == first,
        "sum": float(total),
    }


def other_sizes() -> list[list[int]]:
    sizes = []
    for arguments in (dict(tensor=2), dict(pipeline=2), dict(expert=2), dict(context=2)):
        runtime.start(**arguments)
        g = runtime.groups()
        sizes.append([g.tp.size(), g.pp.size(), g.ep.size(), g.cp.size(), g.dp.size()])
    runtime.stop()
    return sizes


def two_runs_at_once() -> list[float]:
    """Two worlds of one, started together, with one port in the environment that neither may want."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    read, write = os.pipe()
    child = os.fork()
    runtime.start()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if child == 0:
        os.write(write, str(float(total)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return [float(total), float(os.read(read, 100))]


def tensor_parallel_loads_replicated() -> list[list[float]]:
    """Losses of a data-parallel run, and of a tensor- and sequence-parallel one from the same weights."""
    from megatron.core import dist_checkpointing

    folder, losses = "../checkpoint", []
    layout = dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2)
    for sizes in ({}, layout | dict(expert_tensor_parallel_size=1)):
        groups = dict(tensor=2, sequence=True, expert_tensor=1, expert=2) if sizes else {}
        rank = runtime.start(seed=3, **groups).rank
        model = tiny.model(moe_latent_size=16, **sizes)
        metadata = {"dp_cp_group": runtime.groups().dp_cp}
        if sizes:
            model.load_state_dict(
                dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), folder)
            )
        else:
            if rank == 0:
                os.mkdir(folder)
            torch.distributed.barrier()
            dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), folder)
        trainer = tiny.Trainer(model)
        losses.append([trainer.step() for _ in range(4)])
    return losses


def expert_parallel_resumes_replicated() -> list[list[float]]:
    """Two losses after a data-parallel checkpoint, and those of an expert-parallel run that loads it."""
    folder, losses = "../checkpoint", []
    for expert in (1, 2):
        rank = runtime.start(seed=3, expert=expert).rank
        trainer = tiny.Trainer(tiny.model(expert_model_parallel_size=expert))
        if expert == 1:
            trainer.step()
            if rank == 0:
                os.mkdir(folder)
            torch.distributed.barrier()
            trainer.save(folder)
        else:
            trainer.load(folder)
        losses.append([trainer.step(), trainer.step()])
    return losses


def denormals_left() -> int:
    torch.set_num_threads(2)
    runtime.start()
    return int((torch.full((1_000_000,), 1e-38) * 0.01).count_nonzero())


def context_parallel_equals_whole() -> list[float]:
    """Largest differences of token losses and of gradients between the whole sequence and two zig-zag halves."""
    results = []
    for cp in (1, 2):
        rank = runtime.start(seed=3, context=cp).rank
        model = tiny.model("*M*-", context_parallel_size=cp)
        b = tiny.batch()
        chunks = torch.arange(tiny.LENGTH).view(2 * cp, -1)
        mine = torch.cat([chunks[rank % cp], chunks[2 * cp - 1 - rank % cp]])
        local = {k: v[:, mine] for k, v in b.items()}
        losses = model(local["tokens"], local["positions"], None, labels=local["labels"])
        losses.sum().backward()
        whole = torch.zeros(tiny.BATCH, tiny.LENGTH)
        whole[:, mine] = losses.detach()
        gradients = [p.grad.clone() for p in model.parameters()]
        if cp == 2:
            for t in (whole, *gradients):
                torch.distributed.all_reduce(t)
        results.append([whole, *gradients])
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]


for _case in (
    other_sizes,
    tensor_parallel_loads_replicated,
    expert_parallel_resumes_replicated,
    context_parallel_equals_whole,
):
    _case.ranks = 2  # type: ignore[attr-defined]


def adapt_twice() -> list[str]:
    cpu.adapt()
    before = (torch.zeros, torch.Tensor.to, torch.cuda.Stream)
    names = cpu.adapt()
    assert before == (torch.zeros, torch.Tensor.to, torch.cuda.Stream)
    return list(names)


def forked_generators() -> dict[str, list[float]]:
    """Draws inside and around forks of the tracker; ``nested`` interrupts ``model-parallel-rng`` for another."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw() -> float:
        return float(torch.rand(1))

    draws: dict[str, list[float]] = {}
    for name in ("plain", "nested"):
        runtime.start(seed=3)
        fork = get_cuda_rng_tracker().fork
        outer = [draw()]
        with fork():
            inner = [draw()]
            if name == "nested":
                with fork("expert-parallel-rng"):
                    draw()
            inner.append(draw())
        outer.append(draw())
        with fork():
            inner.append(draw())
        draws[name] = outer + inner
    runtime.start(seed=3)
    draws["unforked"] = [draw(), draw()]
    return draws


def literals() -> list[str]:
    """Where tensors land that are asked for on CUDA, the last one from inside ``torch.autograd.backward``."""
    cpu.adapt()
    x = torch.ones(2, requires_grad=True)
    devices = [torch.zeros(2, device="cuda"), x.cuda(), x.to("cuda"), x.to(device=torch.device("cuda", 0)),
               torch.nn.Linear(2, 2).cuda().weight]  # fmt: skip
    y = x * 2
    y.register_hook(lambda grad: devices.append(torch.ones_like(grad, device="cuda")))
    torch.autograd.backward(y.sum())
    return [str(d.device) for d in devices] + [x.type()]
