"""Where Hugging Face directories keep a tensor, from the fact table.

Hub names of ``nemotron_h``: ``backbone.embeddings.weight``, ``backbone.layers.N.norm.weight``,
``backbone.layers.N.mixer.…``, ``backbone.norm_f.weight``, ``lm_head.weight``. Every tensor has the same order
on both sides except those the table calls *interleaved*: Megatron's QKV holds one ``[q | k | v]`` a KV group,
Hugging Face one tensor each of q, k and v. What is stored of a quantised weight has its name, with another ending.
"""

from __future__ import annotations

from ..space import ends
from .hf_keys import hf_keys
from .stored import ModelTensor, Piece

EMBEDDING = ends(tied=False)[0].hf or ""
HEAD = ends(tied=False)[-1].hf or ""


def hf_pieces(tensor: ModelTensor) -> tuple[Piece, ...]:
    """The rows of a tensor, in order."""
    layout, sizes, part = tensor.layout, tensor.sizes, tensor.part
    keys = hf_keys(layout, tensor.layer, tensor.expert)
    if part is not None:
        keys = tuple(part.renamed(key) for key in keys)
    if layout.hf:
        return (Piece(keys[0], 0, tensor.shape[0]),)
    if part is not None and not part.columns:
        return tuple(Piece(key, 0, 1) for key in keys)
    groups = sizes[layout.interleave] if layout.interleave else 1
    shares = [(key, s.size(sizes) // groups) for key, s in zip(keys, layout.dims[0], strict=True)]
    return tuple(Piece(key, group * rows, rows) for group in range(groups) for key, rows in shares)
