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
from ..ops.top_block import TopLogits
from .teacher_cache import Lesson


class DistilledChunk(MegatronModule):
    """A pipeline chunk of the student with the teacher's chunk beside it.

    Between stages their hidden states travel as one tensor, concatenated along the channels: the student's
    schedule carries both, whatever it is. The teacher is no submodule: it is not saved, not optimised, and
    switching the student between training and evaluation leaves it alone.

    Args:
        student, teacher: chunks of the same pipeline stage, bare; the teacher may be absent.
        submodels: of the student, for sliced execution; ``None`` where every micro-batch is masked.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None = None, submodels: SlicedModel | None = None
    ) -> None:
        config = copy.copy(student.config)
        self.widths = [m.config.hidden_size for m in (student, teacher) if m is not None]
        # what schedules take for the width of a message between stages
        config.hidden_size = sum(self.widths)
        super().__init__(config)
        self.module = student
        self.__dict__["teacher"] = teacher
        self.submodels = submodels
        self._sliced: SubmodelMix | None = None
        self._reference: Any = None
        self._again = False
        self._lesson: Lesson | None = None

    def alone(self) -> DistilledChunk:
        """The student without the teacher."""
        return DistilledChunk(self.module, submodels=self.submodels)

    @contextmanager
    def running(
        self,
        mix: SubmodelMix | None,
        *,
        sliced: bool = False,
        again: bool = False,
        lesson: Lesson | None = None,
    ) -> Iterator[None]:
        """Forward passes inside this context run ``mix`` of the student, or all of it.

        Args:
            sliced: on its own widths.
            again: on the tokens of the forward pass before, whose result of the teacher is taken.
            lesson: what the teacher's cache knows of the tokens; with all of them the teacher does not run.
        """
        self._again, self._lesson = again, lesson
        try:
            if mix is None:
                yield
            elif sliced and self.submodels is not None:
                self._sliced = mix
                yield
            else:
                with elastic_stack(self.module).running(mix):
                    yield
        finally:
            self._sliced, self._again, self._lesson = None, False, None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """[s, b, student's hidden size + teacher's], received from the previous stage."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        models = [m for m in (self.module, self.teacher) if m is not None]
        parts = [None] * len(models) if received is None else received.split(self.widths, dim=-1)
        for model, part in zip(models, parts, strict=True):
            model.set_input_tensor(part)

    def forward(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor | tuple[Projection, Projection | TopLogits | None]:
        """What makes the logits of both on the last stage (``None`` without a teacher), else one hidden tensor."""
        inputs = tokens, position_ids, attention_mask
        call = projection if self.module.post_process else nn.Module.__call__
        if not self._again:
            self._reference = self._taught(call, inputs)
        output: Any
        if self._sliced is not None and self.submodels is not None:
            output = self.submodels.forward(self._sliced, *inputs, call=call)
        else:
            output = call(self.module, *inputs)
        if self.module.post_process:
            return output, self._reference
        if self.teacher is None:
            return output
        beside = output.new_zeros(1).expand(*output.shape[:-1], self.widths[1])
        return torch.cat([output, beside if self._reference is None else self._reference], dim=-1)

    @torch.no_grad()
    def _taught(
        self, call: Any, inputs: tuple[Tensor, Tensor, Tensor | None]
    ) -> Tensor | Projection | TopLogits | None:
        """What the teacher says, or said to its cache; ``None`` on stages that need not run it."""
        last, lesson = self.module.post_process, self._lesson
        if lesson is not None and lesson.known:
            return lesson.recalled(inputs[0].device) if last else None
        if self.teacher is None:
            return None
        said = call(self.teacher, *inputs)
        return lesson.noted(said) if last and lesson is not None else said
