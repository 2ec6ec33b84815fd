"""Student and frozen teacher in one pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from ..blocks import SlicedModel, elastic_stack, projection
from ..ops.chunked_kd import Projection
from ..ops.mix import SubmodelMix


class DistilledChunk(MegatronModule):
    """A pipeline chunk of the student with the teacher's chunk beside it.

    Between stages their hidden states travel as one tensor, concatenated along the channels: the student's
    schedule carries both, whatever it is. The teacher is no submodule: it is not saved, not optimised, and
    switching the student between training and evaluation leaves it alone.

    Args:
        student, teacher: chunks of the same pipeline stage, bare; the teacher may be absent.

    Attributes:
        submodels: of the student, for sliced execution; ``None`` where every micro-batch is masked.
    """

    submodels: SlicedModel | None = None

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        config = copy.copy(student.config)
        self.widths = [m.config.hidden_size for m in (student, teacher) if m is not None]
        # what schedules take for the width of a message between stages
        config.hidden_size = sum(self.widths)
        super().__init__(config)
        self.module = student
        self.__dict__["teacher"] = teacher
        self._sliced: SubmodelMix | None = None
        self._reference: Any = None
        self._again = False

    @contextmanager
    def running(self, mix: SubmodelMix, *, sliced: bool = False, again: bool = False) -> Iterator[None]:
        """Forward passes inside this context run ``mix`` of the student.

        Args:
            sliced: on its own widths.
            again: on the tokens of the forward pass before, whose result of the teacher is taken.
        """
        self._again = again
        try:
            if sliced and self.submodels is not None:
                self._sliced = mix
                yield
            else:
                with elastic_stack(self.module).running(mix):
                    yield
        finally:
            self._sliced, self._again = None, False

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """[s, b, student's hidden size + teacher's], received from the previous stage."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        models = [m for m in (self.module, self.teacher) if m is not None]
        parts = [None] * len(models) if received is None else received.split(self.widths, dim=-1)
        for model, part in zip(models, parts, strict=True):
            model.set_input_tensor(part)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor | tuple[Projection, Projection | None]:
        """What makes the logits of both on the last stage (``None`` without a teacher), else one hidden tensor."""
        inputs = tokens, position_ids, attention_mask
        call = projection if self.module.post_process else nn.Module.__call__
        if self.teacher is not None and not self._again:
            with torch.no_grad():
                self._reference = call(self.teacher, *inputs)
        output: Any
        if self._sliced is not None and self.submodels is not None:
            output = self.submodels.forward(self._sliced, *inputs, call=call)
        else:
            output = call(self.module, *inputs)
        if self.module.post_process:
            return output, self._reference
        return output if self.teacher is None else torch.cat([output, self._reference], dim=-1)
