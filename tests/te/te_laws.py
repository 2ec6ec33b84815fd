"""The laws of ``blocks``, ``importance`` and ``checkpoint`` on Transformer Engine's modules: prints errors as JSON.

A program of its own, run by ``test_te_laws``: the stand-in changes what this process imports for good.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import standin  # noqa: E402

standin.install()

import laws  # noqa: E402
import torch  # noqa: E402
from megatron.core.transformer.moe import experts  # noqa: E402
from torch import Tensor  # noqa: E402

from elastic_megatron import runtime  # noqa: E402
from elastic_megatron.blocks import SlicedModel, build_elastic_model  # noqa: E402
from elastic_megatron.checkpoint import distributed  # noqa: E402
from elastic_megatron.checkpoint.manifest import Manifest  # noqa: E402
from elastic_megatron.checkpoint.sort import sort_model  # noqa: E402
from elastic_megatron.importance import collect  # noqa: E402
from elastic_megatron.ops import SubmodelMix  # noqa: E402
from elastic_megatron.ops.locate import locate, weights  # noqa: E402
from elastic_megatron.runtime.leaves import TorchCoreAttention  # noqa: E402

SPACE = laws.subspace()
SPECS = {
    "smallest": SPACE.smallest(),
    "heterogeneous": laws.spec_of(SPACE, **laws.HETEROGENEOUS),
    "hidden alone": laws.spec_of(SPACE, hidden_size=16),
    "experts alone": laws.spec_of(SPACE, num_moe_experts=4),
    "expert widths alone": laws.spec_of(SPACE, moe_ffn_hidden_size=3),
}
Gradients = dict[Any, Tensor]


def te_spec() -> Any:
    """Megatron's stock spec; only the attention kernel, of which there is no stand-in, is torch's."""
    spec = copy.deepcopy(runtime.hybrid_stack_spec("te"))
    spec.submodules.attention_layer.submodules.self_attention.submodules.core_attention = TorchCoreAttention
    return spec


def build(te: bool) -> Any:
    runtime.start(seed=0)
    spec = te_spec() if te else runtime.hybrid_stack_spec("local")
    fused = {"moe_grouped_gemm": te, "use_fused_weighted_squared_relu": te}
    model = build_elastic_model(SPACE, dtype=torch.float32, spec=spec, **fused)
    return laws.randomise(model).train()


def by_place(model: Any) -> dict[Any, Tensor]:
    """Tensors by where the fact table has them, which is the same for both kinds of modules."""
    found = {}
    for name, tensor in weights(model.state_dict(keep_vars=True)).items():
        layer, layout, expert = locate(SPACE.parent, name)
        found[layer, layout.name, expert] = tensor
    return found


def pair() -> tuple[Any, Any]:
    """The same model of Transformer Engine's modules and of Megatron's own."""
    te, local = build(te=True), build(te=False)
    where = by_place(te)
    for place, tensor in by_place(local).items():
        tensor.data.copy_(where[place].data)
    return te, local


def soft() -> SubmodelMix:
    probs = laws.soft_mix(SPACE, 3).probs
    return SubmodelMix(SPACE, {a: p.detach().float().requires_grad_() for a, p in probs.items()})


def hard(name: str) -> SubmodelMix:
    mix = SubmodelMix.one_hot(SPACE, SPECS[name], dtype=torch.float32)
    return SubmodelMix(SPACE, {a: p.requires_grad_() for a, p in mix.probs.items()})


def passed(model: Any, mix: SubmodelMix, forward: Callable[..., Tensor]) -> tuple[Tensor, Gradients]:
    """Logits, and the gradients of weights and choices."""
    model.zero_grad()
    out = forward(mix, laws.tokens(SPACE, 2, 11))
    laws.scalar(out).backward()
    leaves = {p: t for p, t in by_place(model).items() if isinstance(t, torch.nn.Parameter)}
    found = {p: torch.zeros_like(t) if t.grad is None else t.grad.clone() for p, t in leaves.items()}
    choices = {
        ("mix", a): torch.zeros_like(p) if p.grad is None else p.grad.clone() for a, p in mix.probs.items()
    }
    return out.detach(), found | choices


def error(a: tuple[Tensor, Gradients], b: tuple[Tensor, Gradients]) -> float:
    named = [{str(k): v for k, v in g.items()} for _, g in (a, b)]
    return max(laws.relative(a[0], b[0]), laws.worst(*named, 1e-4)[0])


def masked(model: Any, mix: SubmodelMix) -> tuple[Tensor, Gradients]:
    return passed(model, mix, lambda mix, ids: laws.run(model, mix, ids))


def execution() -> Iterator[tuple[str, float]]:
    te, local = pair()
    kinds = {type(m).__name__ for m in te.modules()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEGroupedMLP"} <= kinds, kinds
    with mock.patch.object(
        experts, "weighted_squared_relu_impl", wraps=experts.weighted_squared_relu_impl
    ) as fused:
        whole = masked(te, soft())
    assert fused.called
    yield "soft masks, TE against local", error(whole, masked(local, soft()))
    with laws.recomputing(te, "uniform"):
        yield "soft masks, recomputed against kept", error(masked(te, soft()), whole)
    for name in SPECS:
        reference = masked(te, hard(name))
        yield f"{name}, TE against local", error(reference, masked(local, hard(name)))
        sliced = SlicedModel(te, stock=te_spec())
        found = passed(te, hard(name), lambda mix, ids, sliced=sliced: sliced.forward(mix, *ids, None))
        found[1].update(
            {p: g for p, g in reference[1].items() if p[0] == "mix"}
        )  # fixed widths teach no choice
        yield f"{name}, sliced against masked", error(found, reference)


def ranking() -> Iterator[tuple[str, float]]:
    te, local = (model.eval() for model in pair())
    batches = [{"tokens": laws.tokens(SPACE, 2, 24, seed)[0]} for seed in range(3)]
    found, expected = (
        collect([m], SPACE.parent, batches, axes=list(SPACE.axes), head_dim_kept=3) for m in (te, local)
    )
    yield (
        "orders of components that differ",
        sum(not torch.equal(found.orders[k], expected.orders[k]) for k in expected.orders),
    )
    finite = [k for k in expected.scores if bool(expected.scores[k].isfinite().all())]
    yield "scores", max(laws.relative(found.scores[k], expected.scores[k]) for k in finite)
    ids = laws.tokens(SPACE, 2, 11)
    before = laws.run(te, None, ids).detach()
    sort_model([te], SPACE, found)
    yield "sorting", laws.relative(laws.run(te, None, ids), before)


def checkpoints() -> Iterator[tuple[str, float]]:
    ids, manifest = laws.tokens(SPACE, 2, 11), Manifest(shape=SPACE.parent, space=SPACE)
    te, local = pair()
    for name, saved, other in (("TE to local", te, build(te=False)), ("local to TE", local, build(te=True))):
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        with tempfile.TemporaryDirectory() as folder:
            distributed.load(distributed.save(Path(folder), 1, [saved], manifest), [other])
        yield f"checkpoint, {name}", laws.relative(laws.run(other, None, ids), laws.run(saved, None, ids))


if __name__ == "__main__":
    runtime.start(seed=1)  # before: it would look for NCCL
    torch.cuda.is_available = lambda: True
    print(json.dumps({part.__name__: dict(part()) for part in (execution, ranking, checkpoints)}))
