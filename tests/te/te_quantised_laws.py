"""Quantised recipes on Transformer Engine's modules against Megatron's own: prints what was found as JSON.

A program of its own, run by ``test_te_quantised``: the stand-in changes what this process imports for good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import standin  # noqa: E402

standin.install()

import laws  # noqa: E402
import te_laws  # noqa: E402
import torch  # noqa: E402
from quantised_dirs import CHOICES, LANES, SHAPE  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from elastic_megatron import runtime  # noqa: E402
from elastic_megatron.blocks import SlicedModel  # noqa: E402
from elastic_megatron.checkpoint.quantised_plan import planned  # noqa: E402
from elastic_megatron.ops import SubmodelMix  # noqa: E402
from elastic_megatron.ops.locate import weights  # noqa: E402
from elastic_megatron.quantization.formats import FORMATS, Format  # noqa: E402
from elastic_megatron.quantization.packing import dequantise, quantise  # noqa: E402
from elastic_megatron.quantization.presets import PRESETS  # noqa: E402
from elastic_megatron.space import ElasticSpace, SubmodelSpec  # noqa: E402
from elastic_megatron.training.quantizers import QuantisedLinears, round_alike  # noqa: E402

SPACE = ElasticSpace.build(SHAPE, CHOICES, LANES)
SPECS = {
    "whole": SPACE.full(),
    "smallest": SPACE.smallest(),
    "hidden alone": laws.spec_of(SPACE, hidden_size=min(CHOICES["hidden_size"])),
    "experts alone": laws.spec_of(SPACE, num_moe_experts=min(CHOICES["num_moe_experts"])),
}


def pair() -> tuple[Any, Any]:
    te_laws.SPACE = SPACE
    return te_laws.pair()


def quantised(model: nn.Module, form: Format, preset: str = "default") -> QuantisedLinears:
    wanted = PRESETS[preset]
    plan = planned(form, SHAPE, wanted.blocks, keep_feeding_mamba=False, version="")
    return QuantisedLinears([model], SHAPE, plan, wanted.configs[form.name])


def one_hot(spec: SubmodelSpec) -> SubmodelMix:
    return SubmodelMix.one_hot(SPACE, spec, dtype=torch.float32)


def enabled(model: nn.Module) -> int:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return sum(isinstance(m, TensorQuantizer) and m.is_enabled for m in model.modules())


def linears() -> Iterator[tuple[str, Any]]:
    """Of every preset and format: linears that only one of both has, and quantisers beside theirs."""
    for preset in PRESETS:
        for form in FORMATS.values():
            te, local = pair()
            found, wanted = (quantised(model, form, preset) for model in (te, local))
            names, others = ({linear.shard.name for linear in q.linears} for q in (found, wanted))
            inputs = len({id(linear.module.input_quantizer) for linear in found.linears})
            beside = enabled(te) - len(found.linears) - inputs
            yield f"{preset} {form.name}", [len(names), len(names ^ others), beside]


def calibrated(model: Any, form: Format, submodels: SlicedModel | None) -> tuple[Any, Any, Any]:
    """Magnitudes, unseen experts and the names of weights by their quantisers; through the whole model and others."""
    found = quantised(model, form)
    found.collect()
    with torch.no_grad():
        for name in ("whole", "smallest", "experts alone"):
            given = laws.tokens(SPACE, 2, 16, seed=1)
            if submodels is None:
                laws.run(model, one_hot(SPECS[name]), given)
            else:
                submodels.forward(one_hot(SPECS[name]), *given, None)
    amax, unseen = found.calibrate()
    found.freeze(amax)
    return amax, unseen, {linear.weight_quantizer: linear.shard.name for linear in found.linears}


def multiplied(model: Any, names: dict[Any, str], seen: dict[str, Tensor]) -> dict[str, str]:
    """Keep in ``seen`` what every weight's quantiser returns; returns the parent's names of a submodel's weights."""
    found = {}
    for name, module in model.named_modules():
        own = getattr(module, "weight_quantizer", ())
        single = not isinstance(own, nn.ModuleList | tuple)
        for i, quantizer in enumerate([own] if single else own):
            if quantizer.is_enabled:
                weight = f"{name}.weight{'' if single else i}"
                found[weight] = names[quantizer]
                quantizer.register_forward_hook(lambda _, __, out, weight=weight: seen.update({weight: out}))
    return found


def stored(form: Format, weight: Tensor, amax: Any) -> Tensor:
    return dequantise(form, quantise(form, weight, amax.weight, amax.input), weight.dtype)


def execution() -> Iterator[tuple[str, Any]]:
    for form in FORMATS.values():
        te, local = pair()
        for model in (te, local):
            model.decoder.layers[1].mlp.router.expert_bias[2] = -9.0
        submodels = SlicedModel(te, te_laws.te_spec(), alike=round_alike)
        amax, unseen, names = calibrated(te, form, submodels)
        wanted, unseen_there, _ = calibrated(local, form, None)
        assert amax.keys() == wanted.keys()
        yield f"{form.name}, experts without a token", [unseen, unseen_there]
        yield (
            f"{form.name}, magnitudes",
            max(laws.relative(torch.stack([*amax[n]]), torch.stack([*wanted[n]])) for n in wanted),
        )
        for name, spec in SPECS.items():
            mix = SubmodelMix(SPACE, {a: p.requires_grad_() for a, p in one_hot(spec).probs.items()})
            seen: dict[str, Tensor] = {}
            parents = multiplied(submodels.model_of(spec), names, seen)
            reference = te_laws.masked(local, mix)
            found = te_laws.passed(te, mix, lambda mix, ids, s=submodels: s.forward(mix, *ids, None))
            found[1].update({p: g for p, g in reference[1].items() if p[0] == "mix"})
            yield f"{form.name}, {name}: sliced against masked", te_laws.error(found, reference)
            own = weights(submodels.model_of(spec).state_dict())
            wrong = [n for n in seen if not torch.equal(seen[n], stored(form, own[n], amax[parents[n]]))]
            yield (
                f"{form.name}, {name}: weights that are not what is stored",
                [len(parents), len(seen), len(wrong)],
            )


if __name__ == "__main__":
    runtime.start(seed=1)  # before: it would look for NCCL
    torch.cuda.is_available = lambda: True
    print(json.dumps({part.__name__: dict(part()) for part in (linears, execution)}))
