"""Memory of the loss, which makes logits of one chunk of tokens at a time (``ops.chunked_kd``)."""

from __future__ import annotations

_WIDE = 4  # bytes of the fp32 that losses are computed in
_LEAST = 64
PRODUCTS = (
    16  # parts of the vocabulary whose products are made one after another, where the model is not fp32
)


def chunk_of(hidden_size: int) -> int:
    """Tokens of a chunk where a recipe does not say: half the channels, at least 64.

    A chunk adds to the gradient of the output layer's weight, reading and writing all of it in fp32; with fewer tokens
    that takes longer than the products. At half the channels the three blocks of logits that distillation works in are
    one and a half times that gradient, which exists anyway.
    """
    return max(_LEAST, hidden_size // 2)


def loss_bytes(
    tokens: float,
    vocabulary: float,
    hidden_sizes: tuple[int, ...],
    size: int,
    *,
    chunk: int | None = None,
) -> float:
    """Bytes that the loss of a micro-batch and its gradients take at their fullest moment.

    In fp32: three blocks of logits (student's, teacher's, exponentials; without a teacher one) and the gradient of the
    output layer's weight. In the model's type: the hidden states and the gradient of the student's; and where that type
    is not fp32 one more block and a part of the weight's gradient, or in the end all of it.

    Args:
        tokens: of a micro-batch on a rank.
        vocabulary: entries on a rank.
        hidden_sizes: of the student and, if there is one, of the teacher.
        size: bytes of a number of the model.
    """
    student, *teacher = hidden_sizes
    narrow = 0 if size == _WIDE else size
    weight, states = vocabulary * student, tokens * (student + sum(hidden_sizes)) * size
    block = min(tokens, chunk or chunk_of(student)) * vocabulary
    blocks = block * ((3 if teacher else 1) * _WIDE + narrow)
    return states + weight * _WIDE + max(blocks + weight * narrow / PRODUCTS, weight * narrow)
