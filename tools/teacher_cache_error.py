"""How far distillation from a teacher's top entries is from that of the whole vocabulary.

``python tools/teacher_cache_error.py [--kind reverse_kl] [--vocabulary N] [--tokens N]`` prints a table. Teachers are
synthetic: in every position the entry of rank r has probability proportional to r^-s, with noise, in an order of the
position's own; the student's logits are the teacher's plus Gaussian noise. The errors are those of the loss and of its
gradient by the student's logits, of the whole batch; ``stored`` is what rounding in the cache's records changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_megatron.ops import Projection, TopLogits, chunked_distillation_loss, top_logits

SHARPNESS = (2.0, 1.5, 1.1)
NOISE = 0.5
KEPT = (16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("forward_kl", "reverse_kl"), default="forward_kl")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    print(
        "| s | entropy, nats | k | left to others | error of the loss | of its gradient | stored: loss, gradient |"
    )
    print("|---|---|---|---|---|---|---|")
    for line in lines(arguments.tokens, arguments.vocabulary, arguments.kind):
        print(line)


def lines(tokens: int, vocabulary: int, kind: str) -> Iterator[str]:
    """Rows of the table, for every teacher and k."""
    for sharpness in SHARPNESS:
        teacher, student = logits(tokens, vocabulary, sharpness)
        entropy = float(torch.distributions.Categorical(logits=teacher).entropy().mean())
        whole, gradient = distilled(student, model_of(teacher), kind)
        for k in KEPT:
            top = top_logits(model_of(teacher), k)
            loss, found = distilled(student, top, kind)
            stored, rounded = distilled(student, TopLogits.unpacked(*top.packed()), kind)
            scale = gradient.norm()
            yield (
                f"| {sharpness} | {entropy:.1f} | {k} | {top.log_p[:, -1].exp().mean():.1%} | "
                f"{abs(loss / whole - 1):.1%} | {(found - gradient).norm() / scale:.2%} | "
                f"{abs(stored / loss - 1):.3%}, {(rounded - found).norm() / scale:.3%} |"
            )


def logits(tokens: int, vocabulary: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Of teacher and student, [tokens, vocabulary]."""
    g = torch.Generator().manual_seed(0)
    ranks = torch.rand(tokens, vocabulary, generator=g).argsort(-1) + 1.0
    teacher = -sharpness * ranks.log() + 0.5 * torch.randn(tokens, vocabulary, generator=g)
    return teacher, teacher + NOISE * torch.randn(tokens, vocabulary, generator=g)


def model_of(logits: Tensor) -> Projection:
    """Hidden states and a weight that make these logits, whose gradients are those of the weight."""
    return Projection(torch.eye(len(logits)), logits.T.contiguous())


def distilled(student: Tensor, teacher: Projection | TopLogits, kind: str) -> tuple[float, Tensor]:
    """The loss of all tokens, and its gradient by the student's logits."""
    model = model_of(student)
    labels, mask = torch.zeros(len(student), dtype=torch.long), torch.ones(len(student))
    model.weight.requires_grad_()
    loss, _ = chunked_distillation_loss(
        model, teacher, labels, mask, kind=kind, temperature=1.0, ce_weight=0.0
    )
    (gradient,) = torch.autograd.grad(loss, model.weight)
    return loss.item(), gradient


if __name__ == "__main__":
    main()
