"""Laws 9 and 1 on quantised leaves: ModelOpt's choice of linears on elastic models, and masks before rounding.

Rounding is a step function. In fp64 masked and sliced differ by 1e-15 before it, which moves a value across a step
once in 1e13; a channel that a mask forgets moves whole blocks. So the comparisons are in fp64, at 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import build_slice, gradients, one_hot, randomise, relative, run, scalar, soft_mix, tokens, worst
from quantised_dirs import CHOICES, LANES, SHAPE, bits, origin
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import SlicedModel, build_elastic_model, build_model, running
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.amax import Amax, read_amax
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.quantised_plan import planned
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.quantization.formats import FORMATS, FP8, Format
from elastic_megatron.quantization.packing import fake_quantise
from elastic_megatron.quantization.presets import PRESETS
from elastic_megatron.space import ElasticSpace, SubmodelSpec
from elastic_megatron.training.quantizers import QuantisedLinears, round_alike

TIGHT = 1e-12
SPACE = ElasticSpace.build(
    SHAPE, CHOICES, LANES, per_layer=("num_moe_experts", "moe_ffn_hidden_size", "mamba_num_heads", "mamba_state_dim"),
    layer_order=(3, 1, 0, 6, 4, 2, 5),
)  # fmt: skip
WHOLE = SPACE.full().to_dict()
SUBMODELS: dict[str, SubmodelSpec] = {
    "whole": SPACE.full(),
    **{f"{a}={w}": SubmodelSpec.of(WHOLE | {a: w}) for a, widths in CHOICES.items() for w in widths},
    "smallest": SPACE.smallest(),
    "per layer": SubmodelSpec.of(
        WHOLE | {
            "hidden_size": 48, "num_layers": 6, "ffn_hidden_size": 32, "moe_ffn_hidden_size": [32, 64],
            "moe_shared_expert_intermediate_size": 32, "num_moe_experts": [4, 6], "mamba_num_heads": [8, 4, 4],
            "mamba_head_dim": 16, "mamba_state_dim": [16, 8, 16], "num_attention_heads": 4,
        }
    ),
}  # fmt: skip
# what one preset or the other quantises of "MEM*E-M", and which Mamba layer feeds attention
LINEARS = {"M": 2, "E": 2 * 8 + 2, "*": 2, "-": 2}
OF_PRESET = {"default": "MEM*E-M", "mamba_moe_aggressive": "MEME-M", "mamba_moe_conservative": "EE-"}
FEEDING = "decoder.layers.2."
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
pytestmark = pytest.mark.usefixtures("megatron")


def elastic(dtype: torch.dtype = torch.float64) -> Any:
    runtime.start(seed=0)
    return randomise(build_elastic_model(SPACE, dtype=dtype, spec=runtime.hybrid_stack_spec("local")))


def quantised(
    model: nn.Module,
    form: Format,
    preset: str = "default",
    *,
    feeding: bool = False,
    keep: tuple[str, ...] = (),
) -> QuantisedLinears:
    """The linears of an elastic model, converted."""
    wanted = PRESETS[preset]
    plan = planned(form, SHAPE, wanted.blocks, keep_feeding_mamba=feeding, keep=keep, version="")
    return QuantisedLinears([model], SHAPE, plan, wanted.configs[form.name])


def calibrated(form: Format, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Amax]]:
    """An elastic model whose linears are all rounded, and under which magnitudes."""
    model = elastic(dtype).eval()
    found = quantised(model, form)
    found.collect()
    with torch.no_grad():
        for spec in (SUBMODELS["whole"], SUBMODELS["smallest"]):
            run(model, one_hot(SPACE, spec, dtype), tokens(SPACE, 4, 32, seed=1))
    amax, _ = found.calibrate()
    found.freeze(amax)
    return model, amax


def rounded_by_hand(
    model: nn.Module, form: Format, amax: Mapping[str, Amax], of: Callable[[str], str] = str
) -> nn.Module:
    """A plain model that computes what is stored of it, without ModelOpt; ``of``: the parent's name of a weight."""

    def rounds(largest: Tensor) -> Any:
        return lambda _, args: (fake_quantise(form, args[0], largest), *args[1:])

    count = 0
    for name, module in model.named_modules():
        if found := amax.get(of(f"{name}.weight")):
            with torch.no_grad():
                weight: Any = module.weight
                weight.copy_(fake_quantise(form, weight, found.weight))
            module.register_forward_pre_hook(rounds(found.input))
            count += 1
    assert count
    return model


# --- law 9: every linear that should be rounded is, and nothing else ---


def quantizers(model: nn.Module) -> dict[str, Any]:
    """The enabled ones, by name."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    found = {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    return {n: m for n, m in found.items() if m.is_enabled}


@pytest.fixture(scope="module")
def stock(megatron: Any) -> Callable[[str, Format], dict[str, Any]]:
    """What ModelOpt's own conversion of the stock model enables."""
    import modelopt.torch.quantization as mtq

    found: dict[tuple[str, str], dict[str, Any]] = {}

    def enabled(preset: str, form: Format) -> dict[str, Any]:
        if (preset, form.name) not in found:
            model = build_model(SHAPE, spec=runtime.hybrid_stack_spec("local"))
            mtq.replace_quant_module(model)
            config = getattr(mtq, PRESETS[preset].configs[form.name])
            mtq.set_quantizer_by_cfg(model, config["quant_cfg"])
            found[preset, form.name] = quantizers(model)
        return found[preset, form.name]

    return enabled


@formats
@pytest.mark.parametrize("feeding", [False, True], ids=["all Mamba", "keep feeding Mamba"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_linears_are_those_of_modelopt_on_the_stock_model(
    stock: Callable[..., dict[str, Any]], preset: str, form: Format, feeding: bool
) -> None:
    """By name, inputs and weights, with the numbers that it configures; but for those that the recipe keeps."""
    model = elastic(torch.float32)
    keep = ("backbone.layers.5.*", "backbone.layers.1.mixer.experts.3.*") if feeding else ()
    found = quantised(model, form, preset, feeding=feeding, keep=keep)
    kept = (FEEDING, "decoder.layers.5.", "decoder.layers.1.mlp.experts.local_experts.3.") if feeding else ()
    wanted = {n: q for n, q in stock(preset, form).items() if not n.startswith(kept)}
    enabled = quantizers(model)
    assert enabled.keys() == wanted.keys()
    for name, quantizer in enabled.items():
        for what in ("num_bits", "block_sizes", "axis"):
            assert getattr(quantizer, what) == getattr(wanted[name], what), (name, what)
    both = ("input_quantizer", "weight_quantizer")
    names = [linear.shard.name.removesuffix("weight") for linear in found.linears]
    assert sorted(enabled) == sorted(n + q for n in names for q in both)
    whole = sum(LINEARS[symbol] for symbol in OF_PRESET[preset])
    left = sum(LINEARS[s] for s in "M-" if feeding and s in OF_PRESET[preset]) + 2 * feeding
    assert len(found.linears) == whole - left
    assert not any(s in n for n in enabled for s in ("router", "embedding", "output_layer", "conv1d", "norm"))


def test_a_configuration_that_leaves_a_linear_alone_is_a_defect() -> None:
    plan = planned(FP8, SHAPE, PRESETS["default"].blocks, keep_feeding_mamba=False, version="")
    with pytest.raises(AssertionError, match=r"leaves decoder\.layers\.\d\.\S+ alone"):
        QuantisedLinears([elastic()], SHAPE, plan, PRESETS["mamba_moe_aggressive"].configs["fp8"])


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_whose_quantisers_are_not_frozen_is_the_unquantised_one(
    form: Format, dtype: torch.dtype
) -> None:
    """Also while inputs are observed, and after; then it rounds."""
    plain, model = elastic(dtype), elastic(dtype)
    inputs, mix = tokens(SPACE, 2, 17), one_hot(SPACE, SUBMODELS["per layer"], dtype)
    found = quantised(model, form)

    def same() -> bool:
        with torch.no_grad():
            return all(torch.equal(run(model, m, inputs), run(plain, m, inputs)) for m in (None, mix))

    assert same()
    found.collect()
    assert same()
    amax, _ = found.calibrate()
    assert same()
    found.freeze(amax)
    assert not same()


# --- what is saved ---


@formats
def test_a_converted_model_is_saved_as_the_model_that_it_was(tmp_path: Path, form: Format) -> None:
    model = elastic(torch.float32)
    metadata = {"dp_cp_group": runtime.groups().dp_cp, "singleton_local_shards": False}

    def saved() -> tuple[list[str], dict[str, Any]]:
        sharded = model.sharded_state_dict(metadata=metadata)
        return list(model.state_dict()), {
            n: (s.key, getattr(s, "global_shape", None), getattr(s, "replica_id", None))
            for n, s in sharded.items()
        }

    before, state = saved(), bits(weights(model.state_dict()))
    found = quantised(model, form)
    assert saved() == before
    found.collect()
    with torch.no_grad():
        run(model, None, tokens(SPACE))
    amax, _ = found.calibrate()
    found.freeze(amax)
    assert saved() == before
    folder = distributed.save(tmp_path, 0, [model], Manifest(shape=SHAPE, space=SPACE), amax=amax)
    other = elastic(torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    distributed.load(folder, [other])
    assert bits(weights(other.state_dict())) == state
    assert read_amax(folder) == amax
    distributed.load(folder, [model])
    assert bits(weights(model.state_dict())) == state


# --- law 1 under rounding ---


@pytest.fixture(scope="module")
def models(megatron: Any) -> dict[str, tuple[Any, dict[str, Amax]]]:
    return {name: calibrated(form) for name, form in FORMATS.items()}


def logits_of_slice(model: Any, form: Format, amax: Mapping[str, Amax], spec: SubmodelSpec) -> Tensor:
    sliced = rounded_by_hand(build_slice(model, SPACE, spec), form, amax, origin(SPACE, spec))
    with torch.no_grad():
        return sliced.eval()(*tokens(SPACE, 2, 21), None)


@pytest.mark.usefixtures("fp64")
@formats
@pytest.mark.parametrize("name", SUBMODELS)
def test_masked_equals_sliced_with_rounded_weights_and_inputs(
    models: dict[str, tuple[Any, dict[str, Amax]]], form: Format, name: str
) -> None:
    model, amax = models[form.algo]
    with torch.no_grad():
        masked = run(model, one_hot(SPACE, SUBMODELS[name]), tokens(SPACE, 2, 21))
    sliced = logits_of_slice(model, form, amax, SUBMODELS[name])
    assert sliced.std() > 0.05, "the comparison is about nothing"
    assert relative(masked, sliced) <= TIGHT


@pytest.mark.usefixtures("fp64")
@formats
@pytest.mark.parametrize("name", SUBMODELS)
def test_sliced_execution_rounds_as_masked_does(
    models: dict[str, tuple[Any, dict[str, Amax]]], form: Format, name: str
) -> None:
    model, spec = models[form.algo][0], SUBMODELS[name]
    mix, inputs = one_hot(SPACE, spec), tokens(SPACE, 2, 21)
    submodels = SlicedModel(model, runtime.hybrid_stack_spec("local"), alike=round_alike)
    model.zero_grad()
    masked = run(model, mix, inputs)
    scalar(masked).backward()
    expected = gradients(model)
    model.zero_grad()
    sliced = submodels.forward(mix, *inputs, None)
    scalar(sliced).backward()
    assert relative(sliced, masked) <= TIGHT
    assert worst(gradients(model), expected, floor=1e-9)[0] <= 1e-10
    submodel = submodels.model_of(spec)
    layers = [layer.layer_number - 1 for layer in submodel.decoder.layers]
    linears = sum(
        LINEARS[symbol]
        if symbol != "E"
        else 2 * spec.at("num_moe_experts", SHAPE.layers_of("E").index(layer)) + 2
        for layer in layers
        for symbol in [SHAPE.hybrid_layer_pattern[layer]]
    )
    assert len(quantizers(submodel)) == 2 * linears


@pytest.mark.usefixtures("fp64")
@formats
@pytest.mark.parametrize("field", Amax._fields)
def test_the_comparison_notices_one_magnitude(
    models: dict[str, tuple[Any, dict[str, Amax]]], form: Format, field: str
) -> None:
    """Of one of 46 linears, by which its weight or its input is rounded in other steps."""
    model, amax = models[form.algo]
    spec, name = SUBMODELS["per layer"], "decoder.layers.0.mixer.out_proj.weight"
    other = amax | {name: amax[name]._replace(**{field: 1.3 * getattr(amax[name], field)})}
    with torch.no_grad():
        masked = run(model, one_hot(SPACE, spec), tokens(SPACE, 2, 21))
    assert relative(masked, logits_of_slice(model, form, other, spec)) > 1e-4


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_whole_model_is_the_plain_one_rounded_by_hand_bit_for_bit(
    form: Format, dtype: torch.dtype
) -> None:
    """Training multiplies with the very numbers that are stored."""
    model, amax = calibrated(form, dtype)
    stock = build_model(SHAPE, dtype=dtype).eval()
    stock.load_state_dict(model.state_dict())
    inputs = tokens(SPACE, 2, 21)
    with torch.no_grad():
        unrounded = stock(*inputs, None)
        found, wanted = run(model, None, inputs), rounded_by_hand(stock, form, amax)(*inputs, None)
    assert torch.equal(found, wanted) and relative(wanted, unrounded) > 1e-3


# --- the gradient passes straight through ---


class ByHand:
    """The elastic model as written down: every linear multiplies x + (round(x) - x) with w + (round(w) - w).

    What is in brackets is a number. ``first``: rounds inputs before the masks instead.
    """

    def __init__(
        self, model: nn.Module, form: Format, amax: Mapping[str, Amax], *, first: bool = False
    ) -> None:
        self.model, self.form, self.amax = elastic(), form, amax
        self.model.load_state_dict(model.state_dict())
        for name in amax:
            module = self.model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(self._hook(amax[name].input), prepend=first)

    def _hook(self, largest: Tensor) -> Any:
        return lambda _, args: (self._moved(args[0], largest), *args[1:])

    def _moved(self, values: Tensor, largest: Tensor) -> Tensor:
        return values + (fake_quantise(self.form, values, largest) - values).detach()

    def __call__(self, mix: SubmodelMix | None, inputs: tuple[Tensor, Tensor]) -> Tensor:
        own = dict(self.model.named_parameters())
        moved = {n: self._moved(own[n], a.weight) for n, a in self.amax.items()}
        with running(self.model, mix):
            return torch.func.functional_call(self.model, moved, (*inputs, None))


def mix_of(name: str) -> SubmodelMix | None:
    """The probabilities are leaves, as the router hands them over when it is trained."""
    if name == "parent":
        return None
    return soft_mix(SPACE, seed=2) if name == "soft" else one_hot(SPACE, SUBMODELS[name])


@pytest.mark.usefixtures("fp64")
@formats
@pytest.mark.parametrize("name", ["parent", "per layer", "soft"])
def test_the_gradient_is_that_of_rounded_weights_straight_through(
    models: dict[str, tuple[Any, dict[str, Amax]]], form: Format, name: str
) -> None:
    model, amax = models[form.algo]
    reference, inputs = ByHand(model, form, amax), tokens(SPACE, 2, 21)
    mixes = mix_of(name), mix_of(name)
    model.zero_grad()
    found, wanted = run(model, mixes[0], inputs), reference(mixes[1], inputs)
    assert relative(found, wanted) <= TIGHT
    scalar(found).backward()
    scalar(wanted).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    mine, theirs = gradients(model), gradients(reference.model)
    assert worst(mine, theirs, floor=1e-9)[0] <= 1e-10
    assert all(theirs[n].any() for n in amax if name != "per layer" and ".experts." not in n)
    if name == "soft":
        for axis, probs in mixes[0].probs.items():
            assert relative(probs.grad, mixes[1].probs[axis].grad) <= 1e-10, axis


@pytest.mark.usefixtures("fp64")
@formats
def test_rounding_before_the_masks_would_be_noticed(
    models: dict[str, tuple[Any, dict[str, Amax]]], form: Format
) -> None:
    """Where masks are probabilities: those of whole blocks that are 0 or 1 commute with rounding."""
    model, amax = models[form.algo]
    inputs, mix = tokens(SPACE, 2, 21), soft_mix(SPACE, seed=2)
    with torch.no_grad():
        found = run(model, mix, inputs)
        assert relative(found, ByHand(model, form, amax, first=True)(mix, inputs)) > 1e-3
