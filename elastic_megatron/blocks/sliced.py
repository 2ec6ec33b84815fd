"""Run a submodel on its own widths: smaller stock layers whose weights are cut out of the elastic model's.

A micro-batch whose draw is one-hot needs none of what the draw cut off. Its submodel is built once as a model of its
own, of the same stock modules, and its parameters point into those of the whole: a view where the kept components
are a prefix of every dimension they live in, else a copy that lasts until ``refresh``. What a backward pass leaves on
them is added to the whole model's gradients at once, so that nothing downstream (Megatron's DDP, its reductions, the
optimizer) can tell sliced from masked execution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from .. import runtime
from ..cost.sizes import parent_fields
from ..ops.locate import locate, weights
from ..ops.mix import SlicedMix, SubmodelMix
from ..space import ElasticSpace, SubmodelSpec, TensorLayout, stage_layers
from .specs import elastic_hybrid_stack_spec, sliced_stack_spec, with_mamba_sizes
from .stack import elastic_stack

Landed = Callable[[nn.Parameter], None]
_SHARED_BY_TENSOR_RANKS = (
    "mamba_num_heads", "mamba_num_groups", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "vocab_size",
)  # fmt: skip


class SlicedModel:
    """Submodels of a pipeline chunk as models of their own, on this rank.

    Args:
        model: a bare chunk of an elastic ``HybridModel``, on its device and filled.
        stock: the stack spec it was made elastic from.
        landed: called with a parameter of ``model`` after a backward pass added to its gradient.
    """

    def __init__(self, model: Any, stock: ModuleSpec | None = None, landed: Landed | None = None) -> None:
        self.model, self.space = model, elastic_stack(model).space
        self._stock = stock or runtime.hybrid_stack_spec()
        self._landed = landed
        self._submodels: dict[SubmodelSpec, _Submodel] = {}

    def refresh(self) -> None:
        """The whole model's weights have changed: what was copied from them is cut out again when next needed."""
        for submodel in self._submodels.values():
            submodel.release()

    def model_of(self, spec: SubmodelSpec) -> Any:
        """The submodel, a bare chunk with the weights of now; the whole model where nothing is cut."""
        if self.space.full() <= spec:
            return self.model
        if spec not in self._submodels:
            self._submodels[spec] = _Submodel(self.model, self.space, spec, self._stock, self._landed)
        self._submodels[spec].bind()
        return self._submodels[spec].model

    def forward(self, mix: SubmodelMix, *args: Any, call: Callable[..., Any] = nn.Module.__call__) -> Any:
        """Run the submodel that a hard mix is; arguments and result as of the chunk's own ``forward``.

        Between pipeline stages hidden states keep the whole model's width, zeros after the submodel's.

        Args:
            call: what to do with the submodel and ``args``.
        """
        spec = mix.argmax()
        model, stack = self.model_of(spec), self.model.decoder
        if not self.model.pre_process and model is not self.model:
            model.set_input_tensor(stack.input_tensor[..., : model.config.hidden_size])
        with elastic_stack(model).running(SlicedMix(mix, spec)):
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


@dataclass(frozen=True)
class _Cut:
    """Where a submodel's tensor lies in the whole one, on this rank, by dimension; a prefix is an ``int``."""

    dims: tuple[tuple[int, int | Tensor], ...]

    def of(self, whole: Tensor) -> Tensor:
        for dim, kept in self.dims:
            whole = whole.narrow(dim, 0, kept) if isinstance(kept, int) else whole.index_select(dim, kept)
        return whole

    def add(self, part: Tensor, whole: Tensor) -> None:
        """Add ``part`` to where it lies in ``whole``."""
        scattered = [(dim, kept) for dim, kept in self.dims if not isinstance(kept, int)]
        assert len(scattered) < 2, "no tensor has lanes along two dimensions"
        for dim, kept in self.dims:
            if isinstance(kept, int):
                whole = whole.narrow(dim, 0, kept)
        if scattered:
            whole.index_add_(*scattered[0], part.to(whole.dtype))
        else:
            whole.add_(part)


class _Submodel:
    """One submodel of a chunk, and where its tensors lie in the whole one's."""

    def __init__(
        self, whole: Any, space: ElasticSpace, spec: SubmodelSpec, stock: ModuleSpec, landed: Landed | None
    ) -> None:
        self.model = _build(whole, space, spec, stock)
        self.model.train(whole.training)
        cuts = _Cuts(whole, space, spec)
        self.parameters: list[tuple[nn.Parameter, nn.Parameter, _Cut]] = []
        self.buffers: list[tuple[Tensor, Tensor, _Cut]] = []
        for part, source, cut in cuts.of(self.model):
            if isinstance(part, nn.Parameter):
                assert isinstance(source, nn.Parameter)
                self.parameters.append((part, source, cut))
            else:
                self.buffers.append((part, source, cut))
        self.routers = [
            (router, _routers(whole)[number], cuts.experts(number))
            for number, router in _routers(self.model).items()
        ]
        self.bound = False
        self.bind()
        for part, source, cut in self.parameters:
            part.requires_grad_(source.requires_grad)
            if source.requires_grad:
                part.register_post_accumulate_grad_hook(partial(_land, source, cut, landed))

    @torch.no_grad()
    def bind(self) -> None:
        """Point into the whole model's weights."""
        if self.bound:
            return
        for part, source, cut in self.parameters:
            part.data = cut.of(source.data)
        for part, source, cut in self.buffers:
            part.copy_(cut.of(source))
        self.bound = True

    def release(self) -> None:
        """Give back the memory of copies."""
        for part, _, _ in self.parameters:
            part.data = part.data.new_empty(0)
        self.bound = False

    def land_counts(self) -> None:
        for router, whole, cut in self.routers:
            if router.enable_expert_bias:
                cut.add(router.local_tokens_per_expert, whole.local_tokens_per_expert)
                router.local_tokens_per_expert.zero_()


def _land(source: nn.Parameter, cut: _Cut, landed: Landed | None, part: Tensor) -> None:
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


class _Cuts:
    """Cuts of this rank's tensors, by the fact table."""

    def __init__(self, whole: Any, space: ElasticSpace, spec: SubmodelSpec) -> None:
        groups = whole.pg_collection
        self.space, self.spec = space, spec
        self.tensor, self.expert_tensor, self.expert = (
            g.size() for g in (groups.tp, groups.expt_tp, groups.ep)
        )
        sizes = parent_fields(space.parent)
        self.sizes = {field: size // self._ranks(field) for field, size in sizes.items()}
        self.sources = dict(_tensors(whole, space))
        self.device = next(whole.parameters()).device

    def of(self, model: Any) -> Iterator[tuple[Tensor, Tensor, _Cut]]:
        """(the submodel's tensor, the whole model's, the cut) of everything that a submodel has."""
        for (layer, layout, expert), part in _tensors(model, self.space):
            if expert is not None:
                expert = self._kept("num_moe_experts", layer, self.expert)[expert]
            source = self.sources[layer, layout, expert]
            yield part, source, self._cut(layer, layout, source)

    def experts(self, layer: int) -> _Cut:
        """Of a vector over all experts of a layer."""
        return _cut(
            [(0, self._kept("num_moe_experts", layer))], (self.space.parent.num_moe_experts,), self.device
        )

    def _cut(self, layer: int | None, layout: TensorLayout, source: Tensor) -> _Cut:
        kept = {a: self._kept(a, layer, self._ranks(a)) for a in self.space.layer_sizes(self.spec, layer)}
        places = ((dim, layout.gather(dim, self.sizes, kept)) for dim in range(source.dim()))
        return _cut([(dim, p) for dim, p in places if p is not None], tuple(source.shape), self.device)

    def _kept(self, name: str, layer: int | None, ranks: int = 1) -> list[int]:
        widths = self.space.layer_sizes(self.spec, layer)
        return self.space.kept(name, widths.get(name, self.space.parent.size(name)), ranks)

    def _ranks(self, field: str) -> int:
        if field == "moe_ffn_hidden_size":
            return self.expert_tensor
        return self.tensor if field in _SHARED_BY_TENSOR_RANKS else 1


def _cut(places: list[tuple[int, list[int]]], shape: tuple[int, ...], device: torch.device) -> _Cut:
    dims: list[tuple[int, int | Tensor]] = []
    for dim, kept in places:
        prefix = kept == list(range(len(kept)))
        if not prefix:
            dims.append((dim, torch.tensor(kept, device=device)))
        elif len(kept) < shape[dim]:
            dims.append((dim, len(kept)))
    # prefixes first: a copy is made of what they leave
    return _Cut(tuple(sorted(dims, key=lambda d: not isinstance(d[1], int))))


def _tensors(
    model: Any, space: ElasticSpace
) -> Iterator[tuple[tuple[int | None, TensorLayout, int | None], Tensor]]:
    """((layer of the parent, layout, this rank's expert), tensor) of a chunk."""
    parent = space.parent
    numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, tensor in weights(model.state_dict(keep_vars=True)).items():
        match name.split(".", 3):
            case ["decoder", "layers", local, rest]:
                name = f"decoder.layers.{numbers[local]}.{rest}"
            case ["output_layer", "weight"] if parent.tie_embeddings:
                name = "embedding.word_embeddings.weight"
        yield locate(parent, name), tensor


def _routers(model: Any) -> dict[int, TopKRouter]:
    """The moe_routers of a chunk by layer of the parent."""
    return {
        layer.layer_number - 1: module
        for layer in model.decoder.layers
        for module in layer.modules()
        if isinstance(module, TopKRouter)
    }


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
    with torch.random.fork_rng(devices=[]):
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
