"""Student and frozen teacher in one pipeline."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


class DistilledChunk(MegatronModule):
    """A pipeline chunk of the student with the teacher's chunk beside it.

    Between stages their hidden states travel as one tensor, concatenated along the channels: the student's
    schedule carries both, whatever it is. The teacher is no submodule: it is not saved, not optimised, and
    switching the student between training and evaluation leaves it alone.

    Args:
        student, teacher: chunks of the same pipeline stage, bare; the teacher may be absent.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        config = copy.copy(student.config)
        self.widths = [m.config.hidden_size for m in (student, teacher) if m is not None]
        # what schedules take for the width of a message between stages
        config.hidden_size = sum(self.widths)
        super().__init__(config)
        self.module = student
        self.__dict__["teacher"] = teacher

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """[s, b, student's hidden size + teacher's], received from the previous stage."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        models = [m for m in (self.module, self.teacher) if m is not None]
        parts = [None] * len(models) if received is None else received.split(self.widths, dim=-1)
        for model, part in zip(models, parts, strict=True):
            model.set_input_tensor(part)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits of both on the last stage (the teacher's ``None`` without one), else one hidden tensor."""
        reference = None
        if self.teacher is not None:
            with torch.no_grad():
                reference = self.teacher(tokens, position_ids, attention_mask)
        output = self.module(tokens, position_ids, attention_mask)
        if self.module.post_process:
            return output, reference
        return output if reference is None else torch.cat([output, reference], dim=-1)
