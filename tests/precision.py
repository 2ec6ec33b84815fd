"""fp64 all the way down."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def keep_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fp64 where Megatron rounds to fp32 whatever the model's type is.

    Routing scores, ``A_log``, ``D`` and ``dt_bias`` go through ``.float()``, softmax through ``dtype=``. The
    functions themselves are replaced because a ``TorchFunctionMode`` is switched off inside ``backward``,
    where recomputation runs the forward again.
    """
    to_float, softmax = torch.Tensor.float, torch.softmax

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype is torch.float64 else to_float(self, *args, **kwargs)

    def wide_softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype is torch.float64:
            kwargs.pop("dtype", None)
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", keep)
    monkeypatch.setattr(torch, "softmax", wide_softmax)
