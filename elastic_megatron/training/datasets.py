"""A recipe's token streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data import blend
from ..errors import UserError
from ..recipe import Recipe
from ..recipe.training import DataSource

# only asked for by Megatron's dataset; nothing is reset or masked at document ends
_EOD = 2


def dataset(
    recipe: Recipe, sources: Sequence[DataSource], *, seq_length: int, num_samples: int, stage: int = 0
) -> Any:
    """Samples of ``seq_length`` + 1 tokens from a blend; another ``stage`` shuffles anew."""
    return blend.build_dataset(
        [(s.weight, str(s.path)) for s in sources],
        seq_length=seq_length,
        num_samples=num_samples,
        seed=recipe.seed + stage,
        cache_dir=recipe.data.cache or recipe.run_dir / "cache",
        tokenizer_eod=_EOD,
    )


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ``UserError`` for ids that the model has no embedding for. ``tokens`` lie on the CPU."""
    if int(tokens.max()) >= vocab_size:
        raise UserError(
            f"data.train has token {int(tokens.max())}, but the model's vocabulary has {vocab_size}; "
            "prepare the data with the tokenizer of the model"
        )
