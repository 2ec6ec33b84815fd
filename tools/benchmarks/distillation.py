"""Measure the distillation loss from hidden states beside ModelOpt's LogitsKLLoss on whole logits, time and memory.

OMP_NUM_THREADS=1 python tools/benchmarks/distillation.py [--rounds 7] [--json FILE]
python tools/benchmarks/distillation.py --table     # write the tables of README.md from results/distillation_cpu.json

Both start from hidden states of student and teacher and their output layers' weights, and end with the gradients of
the student's two. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from elastic_megatron.errors import UserError
from elastic_megatron.ops import Projection, chunked_distillation_loss

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import interleave  # noqa: E402
import machine  # noqa: E402
import ratios  # noqa: E402

RESULTS = HERE / "results" / "distillation_cpu.json"
BLOCK = "distillation-table"
VOCABULARY, HIDDEN = 131_072, 256
TOKENS = 2_048
# the dense loss holds about ten whole blocks of logits at its fullest moment
GROWTH = {"dense": (512, 1_024, TOKENS), "chunked": (512, 1_024, TOKENS, 2 * TOKENS, 4 * TOKENS)}
TIME_TARGET, MEMORY_TARGET, AGREE = 1.1, 0.10, 1e-5


@dataclass(frozen=True)
class Inputs:
    """Hidden states [tokens, 1, HIDDEN], weights [VOCABULARY, HIDDEN], labels and mask [tokens, 1]."""

    student: Projection
    teacher: Projection
    labels: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokens: int, device: torch.device) -> Inputs:
        g = torch.Generator().manual_seed(3)

        def draw(rows: int, *more: int) -> Tensor:
            values = torch.randn(rows, *more, HIDDEN, generator=g) / HIDDEN**0.25
            return values.to(device, interleave.dtype_of(device))

        student, teacher = (Projection(draw(tokens, 1), draw(VOCABULARY)) for _ in range(2))
        for tensor in (student.hidden, student.weight):
            tensor.requires_grad_()
        labels = torch.randint(VOCABULARY, (tokens, 1), generator=g).to(device)
        return cls(student, teacher, labels, torch.ones(tokens, 1, device=device))


def chunked(inputs: Inputs) -> Tensor:
    loss, _ = chunked_distillation_loss(
        inputs.student, inputs.teacher, inputs.labels, inputs.mask,
        kind="forward_kl", temperature=1.0, ce_weight=0.0,
    )  # fmt: skip
    return loss


def dense(inputs: Inputs) -> Tensor:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config: Any = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    with torch.no_grad():
        targets = inputs.teacher.hidden @ inputs.teacher.weight.T
    loss, *_ = LogitsKLLoss(config)(inputs.student.hidden @ inputs.student.weight.T, targets)
    return (loss.flatten() * inputs.mask.flatten()).sum()


LOSSES: Mapping[str, Callable[[Inputs], Tensor]] = {"dense": dense, "chunked": chunked}


def main() -> int:
    parser = ratios.arguments(__doc__, RESULTS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        print(json.dumps(_peak(args.peak[0], int(args.peak[1]))))
        return 0
    return ratios.main(parser, measure, RESULTS, BLOCK)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as ``ratios`` describes results."""
    device = interleave.start()
    need = 11 * VOCABULARY * TOKENS * 4
    if device.type == "cpu" and (free := machine.memory("MemAvailable")) < need:
        raise UserError(
            f"{free / 1e9:.0f} GB of memory are free and the dense loss needs {need / 1e9:.0f} GB"
        )
    peaks = {
        loss: {tokens: interleave.peak_of(Path(__file__), [loss, str(tokens)]) for tokens in sizes}
        for loss, sizes in GROWTH.items()
    }
    _agree(device)
    inputs = Inputs.of(TOKENS, device)
    times = interleave.race(
        {name: lambda loss=loss: loss(inputs).backward() for name, loss in LOSSES.items()},
        args.rounds,
        ratios.say,
    )
    return {
        "machine": machine.facts(HERE),
        "versions": machine.versions(),
        **interleave.describe(device),
        "rounds": args.rounds,
        "model": (
            f"{TOKENS:,} tokens, hidden size {HIDDEN}, vocabulary {VOCABULARY:,}. Peak memory is what the loss and its "
            "gradients take; hidden states and weights are there before."
        ),
        "rows": [
            ratios.row(
                "chunked / LogitsKLLoss on whole logits",
                interleave.ratio(times, ["chunked"], ["dense"]),
                TIME_TARGET,
                memory=peaks["chunked"][TOKENS] / peaks["dense"][TOKENS],
                memory_target=MEMORY_TARGET,
            )
        ],
        "growth": [],
        "peaks": [
            {"title": name, "tokens": list(sizes), "bytes": list(sizes.values())}
            for name, sizes in peaks.items()
        ],
    }


def _agree(device: torch.device) -> None:
    """Raises ``UserError`` where the two losses or their gradients differ by more than rounding."""
    inputs = Inputs.of(128, device)
    wanted, found = (_results(loss, inputs) for loss in LOSSES.values())
    for a, b in zip(found, wanted, strict=True):
        off = float((a - b).norm() / b.norm())
        if off > (AGREE if device.type == "cpu" else 1e-2):
            raise UserError(f"the losses or their gradients differ by {off:.1e}: nothing to compare in time")


def _results(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    value = loss(inputs)
    gradients = torch.autograd.grad(value, [inputs.student.hidden, inputs.student.weight])
    return [value.detach().double(), *(g.double() for g in gradients)]


def _peak(loss: str, tokens: int) -> int:
    """Of two micro-batches whose gradients are added, above the memory of hidden states and weights."""
    inputs = Inputs.of(tokens, interleave.start())
    peak = interleave.Peak()
    for _ in range(2):
        LOSSES[loss](inputs).backward()
    return peak.bytes()


if __name__ == "__main__":
    sys.exit(main())
