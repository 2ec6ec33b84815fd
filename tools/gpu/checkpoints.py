"""Step ``checkpoints``: what is saved, resumed after a kill, and loaded into modules of another kind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import distributed, tracker
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.recipe import Recipe
from elastic_megatron.training.train import train
from gpu.bench import Bench
from gpu.models import VOCABULARY, losses, parent, recipe, relative, saved_shape, scale
from gpu.processes import apart, end

STEPS, KILLED_AFTER = 4, 2
_MOMENT = 0.05


def checkpoints(bench: Bench) -> None:
    """A run that saves in the background and is killed goes on as one that saves in the foreground and is not."""
    # nothing runs in this process before: without CUDA the others fork from it
    _made(apart(bench, parent, bench))
    undisturbed = _recipe(bench, "saved", async_save=False)
    killed = _recipe(bench, "killed", async_save=True)
    process = apart(bench, train, killed)
    while process.is_alive() and _saved(killed) < KILLED_AFTER:
        time.sleep(_MOMENT)
    end(process)
    at = _saved(killed)
    bench.number("killed after the checkpoint of step", at)
    bench.at_most("steps that were left when it was killed (0: some)", int(at >= STEPS), 0)
    began = time.perf_counter()
    train(killed)
    bench.number("resumed and finished", time.perf_counter() - began, "s")
    train(undisturbed)
    after, whole = losses(killed), losses(undisturbed)
    limit = 1e-6 if bench.rehearse else 2e-2
    off = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(after, whole, strict=True)]
    bench.at_most("killed and resumed against undisturbed, loss", max(off), limit)
    _other_modules(bench, tracker.resolve(undisturbed.run_dir))


def _recipe(bench: Bench, name: str, *, async_save: bool) -> Recipe:
    return recipe(
        bench, name, steps=STEPS, loss={"ce_weight": 1.0},
        checkpoint={"interval": 1, "keep_last": 2, "async_save": async_save},
    )  # fmt: skip


def _made(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"making the parent ended with {process.exitcode}")


def _saved(run: Recipe) -> int:
    found = tracker.newest(run.run_dir / "checkpoints")
    return 0 if found is None else tracker.iteration(found)


def _other_modules(bench: Bench, saved: Path) -> None:
    """The same checkpoint in Megatron's own modules and in Transformer Engine's, one saved from the other."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    other = "te" if HAVE_TE else "local"
    if not HAVE_TE:
        bench.stands_in("Megatron's own linears on both sides, for want of Transformer Engine")
    shape, manifest = saved_shape(bench), Manifest.read(saved / "elastic.json")
    manifest = Manifest(shape, manifest.space)
    local = _filled(bench, "local", saved)
    expected = _logits(bench, local)
    limit = 1e-6 if bench.rehearse else 5e-2
    for name, source in (
        (other, saved),
        (f"{other} of what local saved", _resaved(bench, "l", local, manifest)),
    ):
        found = _filled(bench, other, source)
        bench.at_most(f"logits of local against {name}", relative(_logits(bench, found), expected), limit)
    back = _filled(bench, "local", _resaved(bench, "o", found, manifest))
    bench.at_most("weights that differ after the way there and back", _differ(local, back), 0)


def _filled(bench: Bench, impl: Any, folder: Path) -> Any:
    device = runtime.start(seed=9).device
    grouped = {"moe_grouped_gemm": impl == "te"}
    spec = runtime.hybrid_stack_spec(impl)
    model = (
        build_model(saved_shape(bench), dtype=scale(bench).torch_dtype, spec=spec, **grouped)
        .to(device)
        .eval()
    )
    distributed.load(folder, [model])
    return model


def _resaved(bench: Bench, name: str, model: Any, manifest: Manifest) -> Path:
    distributed.save(bench.scratch / f"resaved_{name}", 0, [model], manifest)
    return tracker.resolve(bench.scratch / f"resaved_{name}")


@torch.no_grad()
def _logits(bench: Bench, model: Any) -> Tensor:
    device = next(model.parameters()).device
    length = scale(bench).length // 4
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    return model(ids, torch.arange(length, device=device)[None], None)


def _differ(a: Any, b: Any) -> int:
    theirs = dict(b.named_parameters())
    return sum(not torch.equal(p, theirs[n]) for n, p in a.named_parameters())
