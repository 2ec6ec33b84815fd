"""Where ``torch_dist`` checkpoints keep a tensor, from the fact table.

The keys are those that Megatron's ``sharded_state_dict`` gives, with the names of the Transformer Engine spec, to
which our local spec maps its own.
"""

from __future__ import annotations

from .stored import ModelTensor, Piece


def dist_pieces(tensor: ModelTensor) -> tuple[Piece, ...]:
    """The rows of a tensor, in order."""
    layout, rows = tensor.layout, tensor.shape[0]
    key = tensor.prefixed("decoder.layers", layout.dist or layout.name)
    if layout.split:
        return tuple(Piece(f"{key}.{s.label}", 0, s.size(tensor.sizes)) for s in layout.dims[0])
    return (Piece(key, (tensor.expert or 0) * rows, rows),)
