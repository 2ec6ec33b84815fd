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

So only linears are converted, not the modules that hold experts: those change how a model is saved.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..checkpoint.agreement import same_on_all_ranks
from ..checkpoint.amax import Amax
from ..checkpoint.hf_quantised import Quantised
from ..checkpoint.shards import Shard, shards
from ..errors import UserError
from ..quantization.formats import FP8, NVFP4, Format
from ..quantization.straight_through import straight_through
from ..space import ParentShape

BACKEND = "elastic_megatron"
_UNSEEN = -1.0


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
    def shared(self) -> tuple[int | None, str]:
        """Linears alike share what they are multiplied with: all experts of a layer."""
        return self.shard.layer, self.shard.layout.name


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
        settings = _with_backend(getattr(mtq, config)["quant_cfg"], inputs=self._device.type == "cpu")
        for chunk in chunks:
            mtq.set_quantizer_by_cfg(chunk, settings)
        for linear in self.linears:
            for quantizer in (linear.module.weight_quantizer, linear.module.input_quantizer):
                assert quantizer.is_enabled, f"{config} leaves {linear.shard.name} alone"
                quantizer.disable_quant()  # until magnitudes are known

    def collect(self) -> None:
        """From now on the inputs of the linears are observed."""
        for linear in self.linears:
            linear.module.input_quantizer._calibrator = _Largest()
            linear.module.input_quantizer.enable_calib()

    @torch.no_grad()
    def calibrate(self) -> tuple[dict[str, Amax], dict[str, list[int]]]:
        """The largest magnitudes of weights and of inputs since ``collect``, and experts without a token, by layer.

        Both are of the whole model and the same on all ranks; collective over the world. All experts of a layer
        share one magnitude of inputs, as in ModelOpt's max calibration: their kernels take one. So an expert without
        a token has that of the others.

        Raises ``UserError`` on all ranks, with the name of the first linear whose inputs were not finite.
        """
        inputs = {linear.shard.name: _collected(linear.module.input_quantizer) for linear in self.linears}
        unseen = self._unseen(inputs)
        kinds = _numbered((layer, layout.name) for layer, layout, _ in self.stage)
        largest = torch.full((len(kinds),), _UNSEEN)
        for linear in self.linears:
            i = kinds[linear.shared]
            largest[i] = torch.maximum(largest[i], inputs[linear.shard.name])
        _largest_of_stage(largest, self._device)
        with same_on_all_ranks("calibration"):
            _check_finite(kinds, largest)
        assert (largest >= 0).all(), "a linear that no token reached cannot be calibrated"
        weights = self._weights()
        own = {
            linear.shard.name: Amax(weights[linear.shard.name], largest[kinds[linear.shared]])
            for linear in self.linears
        }
        return _merged(own), _merged(unseen)

    def freeze(self, amax: Mapping[str, Amax]) -> None:
        """Round from now on, under these magnitudes of the whole model."""
        for linear in self.linears:
            module, found = linear.module, amax[linear.shard.name]
            quantizers = ((module.weight_quantizer, found.weight), (module.input_quantizer, found.input))
            for quantizer, value in quantizers:
                quantizer.amax = value.to(self._device)
                # saved once for the whole model, not with the module
                quantizer._non_persistent_buffers_set.add("_amax")
                quantizer.disable_calib()
                quantizer.enable_quant()

    def _unseen(self, inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
        experts = _numbered((layer, expert) for layer, _, expert in self.stage if expert is not None)
        seen = torch.zeros(len(experts))
        for shard in (linear.shard for linear in self.linears):
            if shard.expert is not None and inputs[shard.name] >= 0:
                seen[experts[shard.layer, shard.expert]] = 1
        _largest_of_stage(seen, self._device)
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


def round_alike(module: nn.Module, original: nn.Module) -> None:
    """Let a linear that was cut out of another one round as that one does, by the same quantisers."""
    if hasattr(original, "weight_quantizer"):
        converted: Any = _converted(module)
        converted.weight_quantizer = original.weight_quantizer
        converted.input_quantizer = original.input_quantizer


def _converted(module: nn.Module) -> nn.Module:
    """The module itself, of the class that ModelOpt has for it."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    converted = QuantModuleRegistry.convert(module)
    assert converted is module, "ModelOpt converts in place"
    return converted


def _numbered[Key: Hashable](keys: Iterable[Key]) -> dict[Key, int]:
    return {key: i for i, key in enumerate(dict.fromkeys(keys))}


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


class _Largest:
    """ModelOpt's max calibrator, whose assertion about NaN would end one rank while the others wait for it.

    Here what is not finite counts as infinite, and all ranks hear of it.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None

    @torch.no_grad()
    def collect(self, values: Tensor) -> None:
        """The largest magnitude of [...] and of what was collected before."""
        largest = values.abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
        self._found = largest if self._found is None else torch.maximum(self._found, largest)

    def compute_amax(self) -> Tensor | None:
        return self._found

    def reset(self) -> None:
        self._found = None


def _check_finite(kinds: Mapping[tuple[int | None, str], int], largest: Tensor) -> None:
    for (layer, name), index in kinds.items():
        if largest[index].isinf():
            where = name if layer is None else f"{name} of decoder.layers.{layer}"
            raise UserError(
                f"inputs of {where} are not finite on the calibration data: the model overflows; check "
                "model.checkpoint, model.dtype and data.train"
            )


def _collected(quantizer: Any) -> Tensor:
    """The largest magnitude that a quantiser saw, ``_UNSEEN`` where nothing came by."""
    found = quantizer._calibrator.compute_amax()
    return torch.tensor(_UNSEEN) if found is None else found.detach().float().reshape(()).cpu()


def _largest_of_stage(values: Tensor, device: torch.device) -> None:
    """The maximum over all ranks of this pipeline stage, in place."""
    groups = runtime.groups()
    moved = values.to(device)
    for group in (groups.tp, groups.dp_cp):
        torch.distributed.all_reduce(moved, torch.distributed.ReduceOp.MAX, group)
    values.copy_(moved)


def _merged[Value](own: Mapping[str, Value]) -> dict[str, Value]:
    """What all ranks have, which agree where they have the same."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return {name: value for each in every for name, value in each.items()}
