"""Step ``layers``: one layer of each kind at true widths, masked, sliced and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import SlicedModel, build_elastic_model, build_sliced_model, running
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, SubmodelSpec
from gpu.bench import Bench
from gpu.models import VOCABULARY, Scale, config, loud, relative, scale

KINDS = {"M": "Mamba", "E": "experts", "*": "attention", "-": "MLP"}
# of nine tokens in ten: rounding sends some tokens to another expert, a wrong weight moves all of them
LOGITS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
GRADIENTS = {torch.float32: 3e-2, torch.bfloat16: 1e-1}


def layers(bench: Bench) -> None:
    """For every kind of layer, ``hidden_size`` cut alone and everything cut: three ways to run the submodel agree."""
    sizes, device = scale(bench), runtime.start(seed=1).device
    if bench.rehearse:
        bench.stands_in("Megatron's own linears, and Mamba and attention in torch")
    for symbol, kind in KINDS.items():
        for dtype in LOGITS:
            space = sizes.space(symbol, vocab_size=VOCABULARY)
            with config(
                gradient_accumulation_fusion=False, **(runtime.fused_experts() if symbol == "E" else {})
            ):
                for what, error, limit in _compared(space, sizes, dtype, device):
                    bench.at_most(f"{kind}, {str(dtype).removeprefix('torch.')}, {what}", error, limit)


def _compared(
    space: ElasticSpace, sizes: Scale, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float, float]]:
    """(what, how far off, the most it may be)."""
    runtime.start(seed=1)
    model = loud(build_elastic_model(space, dtype=dtype).to(device)).train()
    sliced = SlicedModel(model)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (1, sizes.length // 4), generator=generator).to(device)
    inputs = ids, torch.arange(ids.shape[1], device=device)[None], None
    specs = {"hidden_size alone cut": sizes.narrow(space, "hidden_size"), "everything cut": space.smallest()}
    for name, spec in specs.items():
        mix = SubmodelMix.one_hot(space, spec, device)
        with running(model, mix):
            masked, expected = _passed(model, model(*inputs))
        found, gradients = _passed(model, sliced.forward(mix, *inputs))
        sliced.release()
        yield f"{name}: sliced against masked, logits", _most_tokens(found, masked), LOGITS[dtype]
        yield f"{name}: sliced against masked, gradients", _worst(gradients, expected), GRADIENTS[dtype]
        exported = _exported(model, space, spec, dtype, device)
        yield (
            f"{name}: exported against masked, logits",
            _most_tokens(exported(*inputs), masked),
            LOGITS[dtype],
        )


def _exported(
    model: Any, space: ElasticSpace, spec: SubmodelSpec, dtype: torch.dtype, device: torch.device
) -> Any:
    """The plain model that the fact table cuts out, which is what exports write."""
    plain = build_sliced_model(space, spec, dtype=dtype).to(device).train()
    loaded = plain.load_state_dict(
        dict(slice_state(space, spec, weights(model.state_dict()).items())), strict=False
    )
    assert not loaded.unexpected_keys and all("_extra_state" in key for key in loaded.missing_keys), loaded
    return plain


def _passed(model: nn.Module, logits: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Logits, and the gradients of a loss that weighs every one of them differently, which are taken away."""
    generator = torch.Generator().manual_seed(3)
    (logits.float() * torch.randn(logits.shape, generator=generator).to(logits.device)).mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return logits.detach(), found


def _most_tokens(found: Tensor, truth: Tensor) -> float:
    """The relative error that nine tokens in ten keep, of [1, tokens, vocabulary]."""
    found, truth = found.detach().double()[0], truth.double()[0]
    return float(((found - truth).norm(dim=-1) / truth.norm(dim=-1)).quantile(0.9))


def _worst(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest relative error of a gradient that counts; infinite where one is missing or cannot be there."""
    norms = {n: float(t.double().norm()) for n, t in truth.items()}
    floor = 1e-3 * max(norms.values())
    counted = [n for n, norm in norms.items() if norm > floor]
    if any(float(t.double().norm()) > floor for n, t in found.items() if n not in truth):
        return float("inf")
    return max(relative(found[n], truth[n]) if n in found else float("inf") for n in counted)
