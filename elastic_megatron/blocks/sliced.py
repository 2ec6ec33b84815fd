"""Run a submodel on its own widths: smaller stock layers whose weights are cut out of the elastic model's.

A micro-batch whose draw is one-hot needs none of what the draw cut off. Its submodel is built once as a model of its
own, of the same stock modules, and its parameters point into those of the whole: a view where the kept components
are a prefix of every dimension they live in, else a copy that lasts until ``release``. What a backward pass leaves on
them is added to the whole model's gradients at once, so that nothing downstream (Megatron's DDP, its reductions, the
optimizer) can tell sliced from masked execution.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import runtime
from ..ops.mix import SlicedMix, SubmodelMix
from ..space import ElasticSpace, SubmodelSpec, stage_layers
from .cuts import Alike, Cut, Cuts
from .specs import elastic_hybrid_stack_spec, sliced_stack_spec, with_mamba_sizes
from .stack import elastic_stack

Landed = Callable[[nn.Parameter], None]
Arrived = Callable[[Tensor], None]
_KEPT = 16  # submodels; a hard router draws few, once its temperature has fallen


class SlicedModel:
    """Submodels of a pipeline chunk as models of their own, on this rank.

    Args:
        model: a bare chunk of an elastic ``HybridModel``, on its device and filled.
        stock: the stack spec it was made elastic from.
        landed: called with a parameter of ``model`` after a backward pass added to its gradient.
        arrived: called with a tensor of ``model`` before it is read, to return when it is there. A submodel's modules
            are then bound one by one, each as it is first called.
        alike: called for every weight with the new module that holds it and with the one of ``model`` that it is cut
            from, to change the first as the second was changed, and of an expert's with its numbers in both.
    """

    def __init__(
        self,
        model: Any,
        stock: ModuleSpec | None = None,
        landed: Landed | None = None,
        alike: Alike | None = None,
        arrived: Arrived | None = None,
    ) -> None:
        self.model, self.space = model, elastic_stack(model).space
        self._stock = stock or runtime.hybrid_stack_spec()
        self._landed, self._alike, self._arrived = landed, alike, arrived
        self._submodels: dict[SubmodelSpec, _Submodel] = {}

    def refresh(self) -> None:
        """The whole model's weights have changed."""
        self.release()

    def release(self) -> None:
        """Give back what was copied from the whole model's weights; it is cut out again when next needed."""
        for spec in list(self._submodels)[:-_KEPT]:
            del self._submodels[spec]
        for submodel in self._submodels.values():
            submodel.release()

    def model_of(self, spec: SubmodelSpec) -> Any:
        """The submodel, a bare chunk with the weights of now; the whole model where nothing is cut."""
        if self.space.full() <= spec:
            return self.model
        found = self._submodels.pop(spec, None) or _Submodel(
            self.model, self.space, spec, self._stock, self._landed, self._alike, self._arrived
        )
        self._submodels[spec] = found  # the last one is the last to go
        if self._arrived is None:
            found.bind()
        if found.model.training is not self.model.training:
            found.model.train(self.model.training)
        return found.model

    @contextmanager
    def running(self, mix: SubmodelMix) -> Iterator[Any]:
        """The submodel that a hard mix is, to be called inside this context."""
        spec = mix.argmax()
        model = self.model_of(spec)
        with elastic_stack(model).running(SlicedMix(mix, spec)):
            yield model

    def forward(self, mix: SubmodelMix, *args: Any, call: Callable[..., Any] = nn.Module.__call__) -> Any:
        """Run the submodel that a hard mix is; arguments and result as of the chunk's own ``forward``.

        Between pipeline stages hidden states keep the whole model's width, zeros after the submodel's.

        Args:
            call: what to do with the submodel and ``args``.
        """
        with self.running(mix) as model:
            if not self.model.pre_process and model is not self.model:
                model.set_input_tensor(self.model.decoder.input_tensor[..., : model.config.hidden_size])
            output = call(model, *args)
        if self.model.post_process or model is self.model:
            return output
        return F.pad(output, (0, self.model.config.hidden_size - model.config.hidden_size))

    def land(self) -> None:
        """Add the submodels' counts of tokens per expert to the whole model's, in its units."""
        counted = "num_moe_experts" in self.space.axes or "num_layers" in self.space.axes
        for router in _routers(self.model).values():
            if counted and router.enable_expert_bias:
                # as masked execution keeps them, so that ranks add numbers of one type
                router.local_tokens_per_expert = router.local_tokens_per_expert.double()
        for submodel in self._submodels.values():
            submodel.land_counts()


class _Submodel:
    """One submodel of a chunk, and where its tensors lie in the whole one's."""

    def __init__(
        self,
        whole: Any,
        space: ElasticSpace,
        spec: SubmodelSpec,
        stock: ModuleSpec,
        landed: Landed | None,
        alike: Alike | None,
        arrived: Arrived | None,
    ) -> None:
        self.model = _build(whole, space, spec, stock)
        cuts = Cuts(whole, space, spec)
        self.tensors = list(cuts.of(self.model, alike))
        self.routers = [
            (router, _routers(whole)[number], cuts.experts(number))
            for number, router in _routers(self.model).items()
        ]
        self.bound = set[Tensor]()
        self.release()
        uses = Counter(source for _, source, _ in self.tensors)
        for part, source, cut in self.tensors:
            if isinstance(source, nn.Parameter) and source.requires_grad:
                # a tied weight is complete after both of its uses, which it does not know
                told = landed if uses[source] == 1 else None
                part.register_post_accumulate_grad_hook(partial(_land, source, cut, told))
            elif isinstance(source, nn.Parameter):
                part.requires_grad_(False)
        if arrived is not None:
            self._bind_when_called(arrived)

    def bind(self) -> None:
        """Point into the whole model's weights."""
        self._bind(self.tensors)

    def _bind_when_called(self, arrived: Arrived) -> None:
        """Each module waits for what it reads of the whole model, and only for that."""
        of_part = {id(part): (part, source, cut) for part, source, cut in self.tensors}
        for module in self.model.modules():
            held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if own := [of_part[id(t)] for t in held if id(t) in of_part]:
                module.register_forward_pre_hook(lambda _, __, own=own: self._bind(own, arrived))

    @torch.no_grad()
    def _bind(self, tensors: Sequence[tuple[Tensor, Tensor, Cut]], arrived: Arrived | None = None) -> None:
        for part, source, cut in tensors:
            if part not in self.bound:
                if arrived is not None:
                    arrived(source)
                part.data = cut.of(source.data)
                self.bound.add(part)

    def release(self) -> None:
        """Give back the memory of copies."""
        for part, source, cut in self.tensors:
            part.data = cut.empty(source.data)
        self.bound.clear()

    def land_counts(self) -> None:
        for router, whole, cut in self.routers:
            if router.enable_expert_bias:
                cut.add(router.local_tokens_per_expert, whole.local_tokens_per_expert)
                router.local_tokens_per_expert.zero_()


def _land(source: nn.Parameter, cut: Cut, landed: Landed | None, part: Tensor) -> None:
    """Move the gradient of a submodel's parameter to where it lies in the whole model's."""
    assert part.grad is not None
    gradient = getattr(source, "main_grad", None)
    if gradient is None:
        if source.grad is None:
            source.grad = torch.zeros_like(source)
        gradient = source.grad
    with torch.no_grad():
        cut.add(part.grad, gradient)
    part.grad = None
    if landed is not None:
        landed(source)


def _routers(model: Any) -> dict[int, TopKRouter]:
    """The moe_routers of a chunk by layer of the parent."""
    return {
        layer.layer_number - 1: module
        for layer in model.decoder.layers
        for module in layer.modules()
        if isinstance(module, TopKRouter)
    }


@contextmanager
def _without_storage() -> Iterator[None]:
    """What is built inside holds the parameters of one module at a time: those before it will be bound, not read.

    A module gives back the memory of its own when the next one registers a parameter, since it may fill them first.
    """
    held: list[tuple[nn.Module, nn.Parameter]] = []

    def registered(module: nn.Module, _: str, parameter: nn.Parameter | None) -> None:
        if held and held[0][0] is not module:
            give_back()
        if parameter is not None:
            held.append((module, parameter))

    def give_back() -> None:
        for _, parameter in held:
            parameter.data = parameter.data.new_empty(0)
        held.clear()

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
    give_back()


def _build(whole: Any, space: ElasticSpace, spec: SubmodelSpec, stock: ModuleSpec) -> HybridModel:
    """An empty chunk of the submodel: the layers that it keeps of those of ``whole``.

    Layers keep the parent's numbers. Tied embeddings are built as two, since tied ones would communicate.
    """
    parent, layout = space.parent, runtime.layout()
    kept = space.kept_layers(spec)
    stages = stage_layers(parent.num_layers, layout.pipeline * (layout.virtual_pipeline or 1))
    pattern = "|".join(
        "".join(parent.hybrid_layer_pattern[i] for i in stage if i in kept) for stage in stages
    )
    config = copy.copy(whole.config)
    # its parameters have no `main_grad` that a GEMM could add to
    config.perform_initialization = config.gradient_accumulation_fusion = False
    config.hidden_size = spec.get("hidden_size", config.hidden_size)
    stack = elastic_hybrid_stack_spec(space, with_mamba_sizes(stock, parent))
    with runtime.untouched_generators(), _without_storage():
        model = HybridModel(
            config,
            sliced_stack_spec(stack, [space.layer_sizes(spec, i) for i in kept], kept),
            vocab_size=whole.vocab_size,
            max_sequence_length=whole.max_sequence_length,
            hybrid_layer_pattern=pattern,
            pre_process=whole.pre_process,
            post_process=whole.post_process,
            parallel_output=whole.parallel_output,
            position_embedding_type=whole.position_embedding_type,
            pg_collection=whole.pg_collection,
            vp_stage=whole.vp_stage,
        )
    return model.double() if config.params_dtype is torch.float64 else model
