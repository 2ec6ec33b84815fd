"""Distillation from a teacher of whom only the most probable entries are known, in place like ``logit_block``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from .kd import place_in_part
from .logit_block import Objective
from .parallel import group_size

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TopLogits:
    """The most probable entries of a frozen model's vocabulary, and all others as one outcome.

    Args:
        ids: [..., k] in the whole vocabulary, different ones, the most probable first.
        log_p: [..., k + 1] log-probabilities of the entries, and last of all others together. They sum to one; the last
            is ``-inf`` where there are no others.
    """

    ids: Tensor
    log_p: Tensor

    def rows(self) -> tuple[Tensor, Tensor]:
        """Ids [n, k] and log-probabilities [n, k + 1], one token a row."""
        ids, log_p = (x.reshape(-1, x.shape[-1]) for x in (self.ids, self.log_p))
        return ids, log_p

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (int32) [..., k]; by how much the others together (fp32) [...] and the entries (fp16) [..., k] lie below
        the first one.

        The log-probability of an entry is off by at most 2^-11 of its distance to the first one.
        """
        below = self.log_p[..., :1] - self.log_p
        return self.ids.int(), below[..., -1].float(), below[..., :-1].clamp(max=_LARGEST).half()

    @classmethod
    def unpacked(cls, ids: Tensor, rest: Tensor, below: Tensor) -> TopLogits:
        """Of what ``packed`` returned; probabilities sum to one again."""
        log_p = torch.cat([-below.float(), -rest.unsqueeze(-1)], -1).log_softmax(-1)
        return cls(ids.long(), log_p)


class TopBlock:
    """Logits of c tokens on the rank's V entries of the vocabulary, and what is made of them in their place.

    With S the k entries of a token and r all others together, student and teacher are distributions over k + 1
    outcomes, and the divergence is theirs:

    ``KL = sum_S p_i (log p_i - log q_i) + p_r (log p_r - log q_r)``,

    which is that of whole distributions less ``p_r KL(p given r || q given r)``, a loss between entries that the
    teacher finds improbable. The other direction likewise. Of the student only sums over r are needed: with the
    outcomes' logits ``z_i = x_i`` and ``z_r = log sum_r exp x_j``, the gradient of ``x_j`` in r is that of ``z_r``
    times ``exp(x_j - z_r)``. The cross-entropy is that of the whole vocabulary.

    Args:
        student: its logits over T, [c, V], in fp32 or better; overwritten.
        room: as much, overwritten; none unless ``objective.two_temperatures``.
        labels: [c] in the whole vocabulary.
        ids, log_p: [c, k] and [c, k + 1] of ``TopLogits`` at temperature T.
    """

    def __init__(
        self,
        objective: Objective,
        student: Tensor,
        room: tuple[Tensor, ...],
        labels: Tensor,
        ids: Tensor,
        log_p: Tensor,
    ) -> None:
        assert objective.distils and len(room) == (1 if objective.two_temperatures else 0)
        self.objective, self.student, self.room, self.labels = objective, student, room, labels
        self.ids, self.log_p = ids, log_p.to(student.dtype)
        self.sums: dict[str, Tensor] = {}

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Columns of the entries [c, k], and which are this rank's."""
        return place_in_part(self.ids, self.student.shape[-1], self.objective.group)

    @cached_property
    def label_places(self) -> tuple[Tensor, Tensor]:
        """Column of every token's label [c], and whether it is this rank's."""
        return place_in_part(self.labels, self.student.shape[-1], self.objective.group)

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """Loss and divergence [c] of the tokens; two messages between ranks, of 1 and up to k + 3 numbers a token."""
        how = self.objective
        self._sum_up()
        self.log_q = self._outcomes(1.0, self.sums["rest"]).log_softmax(-1)
        kd = self._terms().sum(-1)
        if not how.ce_weight:
            return kd, kd
        at_one = self._outcomes(how.temperature, self.sums["plain" if self.room else "rest"])
        ce = at_one.logsumexp(-1) - how.temperature * self.sums["label"].squeeze(-1)
        return (1 - how.ce_weight) * kd + how.ce_weight * ce, kd

    def gradient(self, weights: Tensor) -> Tensor:
        """Of the sum over tokens of the losses times ``weights`` [c], by the student's logits: in their place."""
        how = self.objective
        kd, ce = weights * (1 - how.ce_weight) / how.temperature, weights * how.ce_weight
        q = self.log_q.exp()
        if how.kind == "forward_kl":
            of_outcomes = q - self.log_p.exp()
        else:
            terms = self._terms()
            of_outcomes = terms - q * terms.sum(-1, keepdim=True)
        of_outcomes = kd.unsqueeze(-1) * of_outcomes
        if how.ce_weight and not self.room:
            of_outcomes = of_outcomes + ce.unsqueeze(-1) * q
        self.student.mul_(of_outcomes[:, -1:] / self._at_least_one("rest"))
        if self.room:
            s = self._outcomes(how.temperature, self.sums["plain"]).softmax(-1) * ce.unsqueeze(-1)
            self.student.addcmul_(self.room[0], s[:, -1:] / self._at_least_one("plain"))
            of_outcomes = of_outcomes + s
        self._add(self.places, of_outcomes[:, :-1])
        if how.ce_weight:
            self._add(tuple(x.unsqueeze(-1) for x in self.label_places), -ce.unsqueeze(-1))
        return self.student

    def _sum_up(self) -> None:
        """Leave exponentials of the others' logits, and zeros at the entries; and the sums of all ranks."""
        how, sums, student = self.objective, self.sums, self.student
        sums["tops"] = self._at(self.places)
        if how.ce_weight:
            sums["label"] = self._at(tuple(x.unsqueeze(-1) for x in self.label_places))
        take_out(student, self.places)
        self.peak = highest(student, how.group)
        student.sub_(self.peak)
        if self.room:
            sums["plain"] = torch.mul(student, how.temperature, out=self.room[0]).exp_().sum(-1, keepdim=True)
        sums["rest"] = student.exp_().sum(-1, keepdim=True)
        if group_size(how.group) > 1:
            packed = torch.cat([*sums.values()], -1)
            dist.all_reduce(packed, group=how.group)
            widths = [part.shape[-1] for part in sums.values()]
            self.sums = dict(zip(sums, packed.split(widths, -1), strict=True))

    def _outcomes(self, temperature: float, rest: Tensor) -> Tensor:
        """Logits of the outcomes [c, k + 1], times ``temperature``."""
        return torch.cat([temperature * self.sums["tops"], temperature * self.peak + rest.log()], -1)

    def _terms(self) -> Tensor:
        """What every outcome adds to the divergence [c, k + 1]; one of no probability nothing."""
        ahead, behind = self.log_p, self.log_q
        if self.objective.kind == "reverse_kl":
            ahead, behind = behind, ahead
        p = ahead.exp()
        return torch.where(p > 0, p * (ahead - behind), 0.0)

    def _at(self, places: tuple[Tensor, ...]) -> Tensor:
        """Logits at places, 0 where another rank has them."""
        index, mine = places
        return torch.where(mine, self.student.gather(1, index), 0.0)

    def _add(self, places: tuple[Tensor, ...], values: Tensor) -> None:
        index, mine = places
        self.student.scatter_add_(1, index, torch.where(mine, values, 0.0))

    def _at_least_one(self, name: str) -> Tensor:
        """A sum of exponentials of which the largest is 1, or of none at all: what it divides is then 0."""
        return self.sums[name].clamp(min=1.0)


def take_out(logits: Tensor, places: tuple[Tensor, Tensor]) -> None:
    """Set to ``-inf`` those of the places that are this rank's; added, since the others' index is one in use."""
    index, mine = places
    logits.scatter_add_(1, index, torch.where(mine, -torch.inf, 0.0).to(logits.dtype))


def highest(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest logit of every row on all ranks [c, 1]; 0 where all are ``-inf``."""
    top = logits.amax(-1, keepdim=True)
    if group_size(group) > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    return top.masked_fill(top == -torch.inf, 0.0)
