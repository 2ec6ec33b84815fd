"""The losses of a block of logits and their gradient, computed in place: blocks are what memory is spent on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from .kd import place_in_part
from .parallel import group_size


@dataclass(frozen=True)
class Objective:
    """What :func:`~elastic_megatron.ops.kd.distillation_loss` is asked for, and by which ranks.

    Args:
        top: of the teacher only the most probable entries are known (``top_block``).

    Raises ``ValueError`` for a kind that there is not.
    """

    kind: str
    temperature: float
    ce_weight: float
    group: dist.ProcessGroup | None = None
    top: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("forward_kl", "reverse_kl", "cross_entropy"):
            raise ValueError(f"no loss is of kind {self.kind!r}")

    @classmethod
    def of(
        cls, kind: str, temperature: float, ce_weight: float, group: dist.ProcessGroup | None, *, taught: bool,
        top: bool = False,
    ) -> Objective:  # fmt: skip
        """Of a student that is ``taught``; else the cross-entropy, which knows neither temperature nor weight."""
        if taught and kind != "cross_entropy":
            return cls(kind, temperature, ce_weight, group, top)
        return cls("cross_entropy", 1.0, 1.0, group)

    @property
    def distils(self) -> bool:
        return self.kind != "cross_entropy"

    @property
    def two_temperatures(self) -> bool:
        """Whether the cross-entropy sees the student at another temperature than the divergence does."""
        return self.temperature != 1.0 and self.ce_weight != 0.0

    @property
    def rooms(self) -> int:
        """Blocks of logits that are worked in."""
        if self.top:
            return 1 + self.two_temperatures
        return 3 if self.distils else 1


class LogitBlock:
    """Logits of c tokens on the rank's V entries of the vocabulary, and what is made of them in their place.

    With x the logits over the temperature T less their maximum, Z = sum exp x, s and t for student and teacher:

    - ``KL(t || s) = sum exp(x_t) (x_t - x_s) / Z_t - log Z_t + log Z_s``, and the other direction likewise;
    - its gradient by x_s is ``exp(x_s) / Z_s - exp(x_t) / Z_t``, that of ``KL(s || t)`` is
      ``exp(x_s) / Z_s (x_s - x_t - sum exp(x_s) (x_s - x_t) / Z_s)``;
    - the cross-entropy is ``log sum exp(T x_s) - T x_s[label]``.

    Args:
        student: its logits over T, [c, V], in fp32 or better; overwritten.
        others: the teacher's over T, and room for as much, overwritten; none for cross-entropy.
        labels: [c] in the whole vocabulary.
    """

    def __init__(
        self, objective: Objective, student: Tensor, others: tuple[Tensor, ...], labels: Tensor
    ) -> None:
        assert len(others) == (2 if objective.distils else 0)
        self.objective, self.student, self.others, self.labels = objective, student, others, labels
        self.sums: dict[str, Tensor] = {}

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Column of every token's label [c], and whether it is this rank's."""
        return place_in_part(self.labels, self.student.shape[-1], self.objective.group)

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """Loss and divergence [c] of the tokens; two messages between ranks, whatever is asked for."""
        how, sums = self.objective, self.sums
        self._subtract_maxima()
        if how.ce_weight:
            index, mine = self.places
            at_label = self.student.gather(1, index.unsqueeze(1)).squeeze(1) * how.temperature
            sums["label"] = torch.where(mine, at_label, 0.0)
        if how.distils:
            self._compare()
        else:
            sums["student"] = self.student.exp_().sum(-1)
        self._sum_over_ranks()
        kd = self._divergence() if how.distils else None
        if not how.ce_weight:
            assert kd is not None
            return kd, kd
        ce = self.sums["plain" if how.two_temperatures else "student"].log() - self.sums["label"]
        return (ce if kd is None else (1 - how.ce_weight) * kd + how.ce_weight * ce), kd

    def gradient(self, weights: Tensor) -> Tensor:
        """Of the sum over tokens of the losses times ``weights`` [c], by the student's logits: in their place."""
        how, sums = self.objective, self.sums
        kd = weights * ((1 - how.ce_weight) / how.temperature if how.distils else 0.0)
        ce = weights * how.ce_weight
        at_once = torch.zeros_like(ce) if how.two_temperatures else ce
        if how.kind == "reverse_kl":
            ratio, _ = self.others
            scale = kd / sums["student"]
            offset = (at_once - kd * (sums["moment"] / sums["student"])) / sums["student"]
            self.student.mul_(torch.addcmul(_column(offset), ratio, _column(scale), out=ratio))
        else:
            self.student.mul_(_column((kd + at_once) / sums["student"]))
        if how.kind == "forward_kl":
            self.student.addcmul_(self.others[1], _column(kd / sums["teacher"]), value=-1)
        if how.two_temperatures:
            self.student.addcmul_(self._left_over(), _column(ce / sums["plain"]))
        if how.ce_weight:
            index, mine = self.places
            self.student.scatter_add_(1, index.unsqueeze(1), _column(torch.where(mine, -ce, 0.0)))
        return self.student

    def _subtract_maxima(self) -> None:
        blocks = (self.student, *self.others[:1])
        tops = torch.stack([block.amax(-1) for block in blocks])
        if group_size(self.objective.group) > 1:
            dist.all_reduce(tops, dist.ReduceOp.MAX, self.objective.group)
        for block, top in zip(blocks, tops, strict=True):
            block.sub_(_column(top))

    def _compare(self) -> None:
        """Leave exponentials of the student; of the others the log-ratio, and of ``forward_kl`` exponentials too."""
        how, sums, (teacher, spare) = self.objective, self.sums, self.others
        sums["teacher"] = torch.exp(teacher, out=spare).sum(-1)
        if how.kind == "forward_kl":
            sums["moment"] = teacher.sub_(self.student).mul_(spare).sum(-1)
        else:
            torch.sub(self.student, teacher, out=teacher)
            sums["moment"] = torch.exp(self.student, out=spare).mul_(teacher).sum(-1)
        if how.two_temperatures:
            free = self._left_over()
            sums["plain"] = torch.mul(self.student, how.temperature, out=free).exp_().sum(-1)
        sums["student"] = self.student.exp_().sum(-1)

    def _left_over(self) -> Tensor:
        """Where the student's exponentials without temperature find room."""
        return self.others[0 if self.objective.kind == "forward_kl" else 1]

    def _sum_over_ranks(self) -> None:
        if group_size(self.objective.group) > 1:
            packed = torch.stack([*self.sums.values()])
            dist.all_reduce(packed, group=self.objective.group)
            self.sums = dict(zip(self.sums, packed, strict=True))

    def _divergence(self) -> Tensor:
        student, teacher = self.sums["student"], self.sums["teacher"]
        if self.objective.kind == "forward_kl":
            return self.sums["moment"] / teacher - teacher.log() + student.log()
        return self.sums["moment"] / student - student.log() + teacher.log()


def _column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)
