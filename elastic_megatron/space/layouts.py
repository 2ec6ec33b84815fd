"""The fact table: where each axis lives in each tensor of each block.

Counting, sorting, masking, slicing and converting are all derived from it. A dimension is a sequence of
*segments* stacked end to end; a segment is a product of *factors*, outermost first, each a ``ParentShape``
field or a constant. Example: the rows of ``in_proj.weight`` are ``[z | x | B | C | dt]``, where z and x run
over ``mamba_num_heads x mamba_head_dim``, B and C over ``mamba_num_groups x mamba_state_dim`` and dt over
``mamba_num_heads``.

A fused tensor may be stored *interleaved*: cut into equal parts, each holding its share of every segment.
Megatron's QKV is ``[q | k | v]`` interleaved by KV group, and a tensor-parallel shard of ``in_proj`` is
``[z | x | B | C | dt]`` interleaved by rank.

Names are those of modules built from the local spec; ``aliases`` are the spellings of Transformer Engine's
fused modules and of older releases. ``{e}`` stands for the expert's index. ``torch_dist`` checkpoints have keys of
their own: one a segment where a tensor is ``split``, one with a leading dimension for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Factor = str | int
Number = Any  # int, float or a 0-d tensor: every formula here is a sum of products


@dataclass(frozen=True)
class Segment:
    """A stretch of one dimension: ``factors`` outermost first; ``hf`` names its own tensor where HF splits it."""

    label: str
    factors: tuple[Factor, ...]
    hf: str | None = None

    def size(self, sizes: Mapping[str, Number]) -> Number:
        return prod(f if isinstance(f, int) else sizes[f] for f in self.factors)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a block.

    ``hf`` is the Hugging Face name (``None`` where each segment of dimension 0 has its own), ``dist`` the key in
    ``torch_dist`` checkpoints (``None`` where it is ``name``). ``per_expert`` tensors exist once an expert. ``role``
    tells cost models what the tensor does: ``matmul`` weights are multiplied with every token, ``vector``
    parameters are element-wise, ``lookup`` tables are indexed.
    """

    name: str
    dims: tuple[tuple[Segment, ...], ...]
    hf: str | None
    aliases: tuple[str, ...] = ()
    interleave: str | None = None
    per_expert: bool = False
    role: str = "vector"
    fp32: bool = False
    dist: str | None = None
    split: bool = False

    def shape(self, sizes: Mapping[str, Number]) -> tuple[Number, ...]:
        """Extent of each dimension under ``sizes``; integers in, integers out; tensors stay differentiable."""
        return tuple(sum(s.size(sizes) for s in dim) for dim in self.dims)

    def numel(self, sizes: Mapping[str, Number]) -> Number:
        return prod(self.shape(sizes))

    def axes(self) -> frozenset[str]:
        """Every field this tensor's shape depends on."""
        return frozenset(f for dim in self.dims for s in dim for f in s.factors if isinstance(f, str))

    def gather(
        self, dim: int, sizes: Mapping[str, int], kept: Mapping[str, Sequence[int]], parts: int | None = None
    ) -> list[int] | None:
        """Source positions, in target order, that realise ``kept`` along one dimension.

        Args:
            dim: which dimension.
            sizes: the *source* sizes.
            kept: for each changed field the source components to take, in their new order. Taking all in
                another order is a permutation, taking fewer is a slice, both at once is both.
            parts: how many interleaved parts the source and the target have; by default what the layout says.

        Returns:
            ``None`` where the dimension does not depend on any field of ``kept``.
        """
        segments = self.dims[dim]
        if not any(f in kept for s in segments for f in s.factors):
            return None
        if parts is None:
            parts = sizes[self.interleave] if self.interleave and dim == 0 else 1
        part_size = sum(s.size(sizes) for s in segments) // parts
        positions: list[list[int]] = [[] for _ in range(parts)]
        base = 0
        for segment in segments:
            extents = [f if isinstance(f, int) else sizes[f] for f in segment.factors]
            taken = [
                kept.get(f, range(n)) if isinstance(f, str) else range(n)
                for f, n in zip(segment.factors, extents, strict=True)
            ]
            inner = _flatten(extents[1:], taken[1:])
            inner_size = prod(extents[1:])
            share, kept_share = extents[0] // parts, len(taken[0]) // parts
            for j, i in enumerate(taken[0]):
                start = (i // share) * part_size + base + (i % share) * inner_size
                positions[j // kept_share].extend(start + k for k in inner)
            base += share * inner_size
        return [p for part in positions for p in part]


def whole_blocks(positions: Sequence[int], block: int) -> list[int] | None:
    """The blocks, of ``block`` positions each, that ``positions`` are made of, in their order.

    Columns that share a scale can only be gathered together: a tensor of scales is gathered by the blocks that the
    columns of its weight are.

    Returns:
        ``None`` where the positions are not whole blocks, each in its own order.
    """
    blocks = [p // block for p in positions[::block]]
    return blocks if [b * block + i for b in blocks for i in range(block)] == list(positions) else None


def _flatten(extents: Sequence[int], taken: Sequence[Sequence[int]]) -> list[int]:
    out = [0]
    for n, keep in zip(extents, taken, strict=True):
        out = [o * n + k for o in out for k in keep]
    return out


def _dim(*segments: Segment) -> tuple[Segment, ...]:
    return segments


_HIDDEN = _dim(Segment("hidden", ("hidden_size",)))
_CHANNELS = ("mamba_num_heads", "mamba_head_dim")
_STATES = ("mamba_num_groups", "mamba_state_dim")
_Z, _X = Segment("z", _CHANNELS), Segment("x", _CHANNELS)
_B, _C = Segment("B", _STATES), Segment("C", _STATES)
_DT = Segment("dt", ("mamba_num_heads",))
_HEADS = _dim(_DT)
_QUERIES = ("num_attention_heads", "kv_channels")
_KEYS = ("num_query_groups", "kv_channels")
_NORM_ALIASES = ("norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight")


def _norm(name: str, fused: str | None = None) -> TensorLayout:
    aliases = _NORM_ALIASES if fused is None else (*_NORM_ALIASES, fused)
    return TensorLayout(name, (_HIDDEN,), "norm.weight", aliases=aliases, dist=fused)


def _mlp(prefix: str, hf: str, width: str, per_expert: bool = False, aliases: Sequence[str] = ()) -> tuple:
    """The pair of projections of a non-gated MLP; its channels are independent between them."""
    wide = _dim(Segment("channels", (width,)))
    up, down = aliases or (None, None)
    stacked = "mlp.experts.experts.linear_fc{}.weight".format if per_expert else lambda _: None
    return (
        TensorLayout(f"{prefix}linear_fc1.weight", (wide, _HIDDEN), f"{hf}up_proj.weight",
                     (up,) if up else (), per_expert=per_expert, role="matmul", dist=stacked(1)),
        TensorLayout(f"{prefix}linear_fc2.weight", (_HIDDEN, wide), f"{hf}down_proj.weight",
                     (down,) if down else (), per_expert=per_expert, role="matmul", dist=stacked(2)),
    )  # fmt: skip


BLOCKS: Mapping[str, tuple[TensorLayout, ...]] = {
    "M": (
        _norm("norm.weight", "mixer.in_proj.layer_norm_weight"),
        TensorLayout("mixer.in_proj.weight", (_dim(_Z, _X, _B, _C, _DT), _HIDDEN), "mixer.in_proj.weight",
                     role="matmul", split=True),
        TensorLayout("mixer.conv1d_weight",
                     (_dim(_X, _B, _C), _dim(Segment("one", (1,))), _dim(Segment("taps", ("conv_kernel",)))),
                     "mixer.conv1d.weight", aliases=("mixer.conv1d.weight",), dist="mixer.conv1d.weight", split=True),
        TensorLayout("mixer.conv1d_bias", (_dim(_X, _B, _C),), "mixer.conv1d.bias",
                     aliases=("mixer.conv1d.bias",), dist="mixer.conv1d.bias", split=True),
        TensorLayout("mixer.A_log", (_HEADS,), "mixer.A_log", fp32=True),
        TensorLayout("mixer.D", (_HEADS,), "mixer.D", fp32=True),
        TensorLayout("mixer.dt_bias", (_HEADS,), "mixer.dt_bias"),
        TensorLayout("mixer.norm.weight", (_dim(_X),), "mixer.norm.weight"),
        TensorLayout("mixer.out_proj.weight", (_HIDDEN, _dim(_X)), "mixer.out_proj.weight", role="matmul"),
    ),
    "*": (
        _norm("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        TensorLayout("self_attention.linear_qkv.weight",
                     (_dim(Segment("q", _QUERIES, "mixer.q_proj.weight"), Segment("k", _KEYS, "mixer.k_proj.weight"),
                           Segment("v", _KEYS, "mixer.v_proj.weight")), _HIDDEN),
                     None, interleave="num_query_groups", role="matmul"),
        TensorLayout("self_attention.linear_proj.weight", (_HIDDEN, _dim(Segment("o", _QUERIES))),
                     "mixer.o_proj.weight", role="matmul"),
    ),
    "E": (
        _norm("pre_mlp_layernorm.weight"),
        TensorLayout("mlp.router.weight", (_dim(Segment("experts", ("num_moe_experts",))), _HIDDEN),
                     "mixer.gate.weight", role="matmul", fp32=True),
        TensorLayout("mlp.router.expert_bias", (_dim(Segment("experts", ("num_moe_experts",))),),
                     "mixer.gate.e_score_correction_bias", fp32=True),
        *_mlp("mlp.experts.local_experts.{e}.", "mixer.experts.{e}.", "moe_ffn_hidden_size", per_expert=True,
              aliases=("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}")),
        *_mlp("mlp.shared_experts.", "mixer.shared_experts.", "moe_shared_expert_intermediate_size"),
    ),
    "-": (
        _norm("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        *_mlp("mlp.", "mixer.", "ffn_hidden_size"),
    ),
}  # fmt: skip

_VOCAB = _dim(Segment("vocab", ("vocab_size",)))
_EMBEDDING = TensorLayout(
    "embedding.word_embeddings.weight", (_VOCAB, _HIDDEN), "backbone.embeddings.weight", role="lookup"
)
_HEAD = TensorLayout("output_layer.weight", (_VOCAB, _HIDDEN), "lm_head.weight", role="matmul")
_FINAL_NORM = TensorLayout(
    "decoder.final_norm.weight",
    (_HIDDEN,),
    "backbone.norm_f.weight",
    aliases=("decoder.final_layernorm.weight",),
)


def ends(tied: bool) -> tuple[TensorLayout, ...]:
    """Layouts outside the blocks: embedding, final norm and, where it is not tied, the output layer."""
    return (_EMBEDDING, _FINAL_NORM) if tied else (_EMBEDDING, _FINAL_NORM, _HEAD)


def tensors_of(symbol: str, sizes: Mapping[str, Number]) -> Iterator[TensorLayout]:
    """Layouts of one block under ``sizes``; parts of width 0 (a model without shared experts) are absent."""
    for layout in BLOCKS[symbol]:
        if not any(isinstance(sizes[f], int) and sizes[f] == 0 for f in layout.axes()):
            yield layout
