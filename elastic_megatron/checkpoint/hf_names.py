"""Where Hugging Face directories keep a tensor, from the fact table.

Hub names of ``nemotron_h``: ``backbone.embeddings.weight``, ``backbone.layers.N.norm.weight``,
``backbone.layers.N.mixer.…``, ``backbone.norm_f.weight``, ``lm_head.weight``. Every tensor has the same order
on both sides except those the table calls *interleaved*: Megatron's QKV holds one ``[q | k | v]`` a KV group,
Hugging Face one tensor each of q, k and v.
"""

from __future__ import annotations

from ..space import ends
from .stored import ModelTensor, Piece

EMBEDDING = ends(tied=False)[0].hf or ""
HEAD = ends(tied=False)[-1].hf or ""


def hf_pieces(tensor: ModelTensor) -> tuple[Piece, ...]:
    """The rows of a tensor, in order."""
    layout, sizes = tensor.layout, tensor.sizes
    if layout.hf:
        return (Piece(_name(tensor, layout.hf), 0, tensor.shape[0]),)
    parts = sizes[layout.interleave] if layout.interleave else 1
    shares = [(_name(tensor, s.hf or s.label), s.size(sizes) // parts) for s in layout.dims[0]]
    return tuple(Piece(name, part * rows, rows) for part in range(parts) for name, rows in shares)


def _name(tensor: ModelTensor, local: str) -> str:
    return tensor.prefixed("backbone.layers", local)
