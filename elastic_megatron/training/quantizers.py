"""ModelOpt's quantisers on the linears of an elastic model: converted, calibrated, frozen.

ModelOpt converts the leaves, which stay stock classes under our hooks, configures their quantisers by the name of one
of its configurations, and collects their inputs. Three things are ours:

- the rounding of weights, through ModelOpt's backend hook and on every device: its kernels for training and its
  packers differ in the last bits, and here what is trained is what is stored. On the CPU inputs are rounded so too;
  elsewhere by ModelOpt's kernels;
- the reduction of what was collected over ranks, under any layout (ModelOpt's takes tensor- or expert-parallel
  experts, not both, and no pipeline);
- where the magnitudes are kept: in one file of the whole model (``checkpoint.amax``). ModelOpt keeps them in the
  sharded state, one expert-parallel layout each.

So only linears are converted, not the modules that hold experts: those change how a model is saved. They may be
Megatron's own or Transformer Engine's, norms fused into them and experts grouped; then nothing may be masked, since a
fused norm's output would be scaled to the kept width after it was rounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.agreement import same_on_all_ranks
from ..checkpoint.amax import Amax
from ..checkpoint.hf_quantised import Quantised
from ..checkpoint.shards import Shard, shards
from ..quantization.formats import FP8, NVFP4, Format
from ..quantization.straight_through import straight_through
from ..space import ParentShape
from .observed import (
    UNSEEN,
    Largest,
    Reached,
    check_finite,
    collected,
    grouped,
    largest_of_stage,
    merged,
    numbered,
    reached_of,
)

BACKEND = "elastic_megatron"


@dataclass(frozen=True)
class Rounding:
    """How a model is rounded: which linears to what format, and under which magnitudes of the whole model."""

    quantised: Quantised
    amax: Mapping[str, Amax]


@dataclass(frozen=True)
class Linear:
    """A linear of this rank with its quantisers.

    Args:
        module: converted by ModelOpt.
        shard: its weight.
    """

    module: nn.Module
    shard: Shard

    @property
    def weight_quantizer(self) -> Any:
        """Of this weight; grouped experts have one each, beside the one of what they are all multiplied with."""
        held: Any = self.module
        own = held.weight_quantizer
        return own[self.grouped_at] if grouped(held) else own

    @property
    def shared(self) -> tuple[int | None, str]:
        """Linears alike share what they are multiplied with: all experts of a layer."""
        return self.shard.layer, self.shard.layout.name

    @property
    def reached(self) -> bool:
        """Have tokens come by since ``collect``? Grouped experts are called together, with tokens or without."""
        if grouped(self.module):
            return self.weight_quantizer in reached_of(self.module).quantizers
        return bool(collected(self.module.input_quantizer) >= 0)

    @property
    def grouped_at(self) -> int:
        """Its place among the experts that one module holds on this rank."""
        assert self.shard.expert is not None
        return self.shard.expert % grouped(self.module)


class QuantisedLinears:
    """The quantised linears of this rank's pipeline chunks.

    Args:
        chunks: bare, before they are wrapped.
        parent: shape of the whole model.
        quantised: which linears, and the format.
        config: name of a configuration in ``modelopt.torch.quantization``.

    Raises ``AssertionError`` where the configuration leaves one of them alone.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], parent: ParentShape, quantised: Quantised, config: str
    ) -> None:
        mtq = _modelopt()
        held = [(chunk, shard) for chunk in chunks for shard in shards(chunk, parent)]
        self.linears = [
            Linear(_converted(chunk.get_submodule(shard.module)), shard)
            for chunk, shard in held
            if quantised.stores(shard.layout, shard.layer, shard.expert)
        ]
        layers = {shard.layer for _, shard in held}
        # those of this pipeline stage: the same list on all its ranks, whichever experts they hold
        self.stage = [key for key in quantised.stored_keys(parent) if key[0] in layers]
        self._device = next(chunks[0].parameters()).device
        self._hooks: list[Any] = []
        settings = _with_backend(getattr(mtq, config)["quant_cfg"], inputs=self._device.type == "cpu")
        for chunk in chunks:
            mtq.set_quantizer_by_cfg(chunk, settings)
        for linear in self.linears:
            for quantizer in (linear.weight_quantizer, linear.module.input_quantizer):
                assert quantizer.is_enabled, f"{config} leaves {linear.shard.name} alone"
                quantizer.disable_quant()  # until magnitudes are known

    def collect(self) -> None:
        """From now on the inputs of the linears are observed."""
        for linear in self.linears:
            linear.module.input_quantizer._calibrator = Largest()
            linear.module.input_quantizer.enable_calib()
            if grouped(linear.module) and linear.grouped_at == 0:
                self._hooks.append(linear.module.register_forward_pre_hook(Reached()))

    def observe(self, layers: Collection[int] | None = None) -> None:
        """After ``collect``: only the inputs of linears in these layers, or in all, are observed from now on.

        Masked execution computes the layers that a submodel drops, on numbers that no submodel ever sees.
        """
        for linear in self.linears:
            quantizer = linear.module.input_quantizer
            (
                quantizer.enable_calib
                if layers is None or linear.shard.layer in layers
                else quantizer.disable_calib
            )()

    @torch.no_grad()
    def calibrate(self) -> tuple[dict[str, Amax], dict[str, list[int]]]:
        """The largest magnitudes of weights and of inputs since ``collect``, and experts without a token, by layer.

        Both are of the whole model and the same on all ranks; collective over the world. All experts of a layer
        share one magnitude of inputs, as in ModelOpt's max calibration: their kernels take one. So an expert without
        a token has that of the others.

        Raises ``UserError`` on all ranks, with the name of the first linear whose inputs were not finite.
        """
        inputs = {linear.shard.name: collected(linear.module.input_quantizer) for linear in self.linears}
        unseen = self._unseen()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        kinds = numbered((layer, layout.name) for layer, layout, _ in self.stage)
        largest = torch.full((len(kinds),), UNSEEN)
        for linear in self.linears:
            i = kinds[linear.shared]
            largest[i] = torch.maximum(largest[i], inputs[linear.shard.name])
        largest_of_stage(largest, self._device)
        with same_on_all_ranks("calibration"):
            check_finite(kinds, largest)
        assert (largest >= 0).all(), "a linear that no token reached cannot be calibrated"
        weights = self._weights()
        own = {
            linear.shard.name: Amax(weights[linear.shard.name], largest[kinds[linear.shared]])
            for linear in self.linears
        }
        return merged(own), merged(unseen)

    def freeze(self, amax: Mapping[str, Amax]) -> None:
        """Round from now on, under these magnitudes of the whole model."""
        for linear in self.linears:
            module, found = linear.module, amax[linear.shard.name]
            quantizers = ((linear.weight_quantizer, found.weight), (module.input_quantizer, found.input))
            for quantizer, value in quantizers:
                quantizer.amax = value.to(self._device)
                # saved once for the whole model, not with the module
                quantizer._non_persistent_buffers_set.add("_amax")
                quantizer.disable_calib()
                quantizer.enable_quant()

    def _unseen(self) -> dict[str, list[int]]:
        experts = numbered((layer, expert) for layer, _, expert in self.stage if expert is not None)
        seen = torch.zeros(len(experts))
        for linear in self.linears:
            if linear.shard.expert is not None and linear.reached:
                seen[experts[linear.shard.layer, linear.shard.expert]] = 1
        largest_of_stage(seen, self._device)
        found: dict[str, list[int]] = {}
        for (layer, expert), reached in zip(experts, seen.tolist(), strict=True):
            if not reached:
                found.setdefault(f"decoder.layers.{layer}", []).append(expert)
        return found

    def _weights(self) -> dict[str, Tensor]:
        """The largest magnitude of every weight; where ranks share it, of all their parts."""
        found: dict[str, Tensor] = {}
        for per_expert in (False, True):
            own = [linear.shard for linear in self.linears if linear.shard.layout.per_expert is per_expert]
            if own:
                largest = torch.stack([shard.tensor.abs().amax().float() for shard in own])
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, own[0].group)
                found |= {shard.name: value for shard, value in zip(own, largest.cpu(), strict=True)}
        return found


def round_alike(module: nn.Module, original: nn.Module, experts: tuple[int, int] | None = None) -> None:
    """Let a linear that was cut out of another one round as that one does, by the same quantisers.

    Args:
        experts: of grouped linears, which of the first is which of the second.
    """
    if not hasattr(original, "weight_quantizer"):
        return
    converted: Any = _converted(module)
    converted.input_quantizer = original.input_quantizer
    if not grouped(original):
        converted.weight_quantizer = original.weight_quantizer
        return
    assert experts is not None
    own, whole = experts
    converted.weight_quantizer[own] = original.weight_quantizer[whole]
    for hook in original._forward_pre_hooks.values():
        if isinstance(hook, Reached) and hook not in converted._forward_pre_hooks.values():
            converted.register_forward_pre_hook(hook)


def _converted(module: nn.Module) -> nn.Module:
    """The module itself, of the class that ModelOpt has for it."""
    if hasattr(module, "input_quantizer"):
        return module
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    converted = QuantModuleRegistry.convert(module)
    assert converted is module, "ModelOpt converts in place"
    return converted


def _modelopt() -> Any:
    """``modelopt.torch.quantization`` with our backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
            is_registered_quant_backend,
            register_quant_backend,
        )
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _round)
    return mtq


def _round(values: Tensor, quantizer: Any) -> Tensor:
    return straight_through(_form_of(quantizer), values, quantizer.amax)


def _form_of(quantizer: Any) -> Format:
    return FP8 if quantizer.block_sizes is None else NVFP4


def _with_backend(settings: Sequence[Mapping[str, Any]], *, inputs: bool) -> list[dict[str, Any]]:
    """A configuration whose weights (and inputs) are rounded by our backend."""
    found = copy.deepcopy([dict(entry) for entry in settings])
    for entry in found:
        name = entry["quantizer_name"]
        if "cfg" in entry and ("weight_quantizer" in name or (inputs and "input_quantizer" in name)):
            entry["cfg"] = {**entry["cfg"], "backend": BACKEND}
    return found
