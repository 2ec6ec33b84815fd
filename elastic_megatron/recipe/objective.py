"""What training minimises, by whose teaching, and what becomes of a run that diverges."""

from typing import Literal

from pydantic import Field

from elastic_megatron.recipe.types import (
    Count,
    FilePath,
    Fraction,
    Positive,
    PositiveFloat,
    Rate,
    Section,
    Switch,
)


class Teacher(Section):
    """The frozen model that is distilled."""

    checkpoint: FilePath | None = Field(
        default=None, description="Directory of the teacher's checkpoints; default: the parent itself."
    )
    cache: FilePath | None = Field(
        default=None,
        description="Folder that keeps what the teacher says of every sequence, so that later runs over the same ones "
        "need not ask again; the loss then distils top_k entries and all others as one.",
    )
    top_k: Positive = Field(
        default=64,
        description="Most probable entries of the vocabulary that the cache keeps for a token, 6 bytes each; at most "
        "all.",
    )
    cache_only: Switch = Field(
        default=False, description="Hold no teacher in memory: the cache has every sequence already."
    )


# in a teacher's cache: whose it is
CACHE_HEADER = "teacher.json"


def cached_bytes(tokens: int, top_k: int) -> int:
    """What a teacher's cache keeps of tokens: of each entry 4 bytes of its id and 2 of its place, and 4 of the rest."""
    return tokens * (6 * top_k + 4)


class Loss(Section):
    """The training objective."""

    kind: Literal["forward_kl", "reverse_kl", "cross_entropy"] = Field(
        default="forward_kl",
        description="Distillation from the teacher (forward: KL(teacher || student)), or plain text.",
    )
    temperature: PositiveFloat = Field(default=1.0, description="Softmax temperature of teacher and student.")
    ce_weight: Fraction = Field(
        default=0.0, description="w of (1 - w) x distillation + w x cross-entropy on the text."
    )
    chunk: Positive | None = Field(
        default=None,
        description="Tokens whose logits exist at a time; default: half the hidden size, at least 64.",
    )
    recompute: Switch = Field(
        default=False,
        description="Make the logits again for the backward pass, in place of keeping the gradient of the output "
        "layer from the loss until then.",
    )
    moe_aux_loss: Rate = Field(default=0.0, description="Weight of the sequence-level load-balancing loss.")
    moe_bias_update_rate: Rate = Field(
        default=0.0, description="Step of the moe_router's correction bias towards equal load (0: frozen)."
    )
    divergence_patience: Positive = Field(
        default=3,
        description="Steps in a row with a loss or gradient norm that is not finite after which training has diverged; "
        "none of them gives an update.",
    )
    on_divergence: Literal["stop", "rewind"] = Field(
        default="stop",
        description="stop: end with exit status 3; rewind: load the last checkpoint and pass over the samples of the "
        "steps that were not finite.",
    )
    max_rewinds: Positive = Field(
        default=3, description="Rewinds of a run after which it stops all the same."
    )
    spike_window: Count = Field(
        default=64,
        description="Steps, of the same stage and budget, that a loss is compared with; 0: none is.",
    )
    spike_threshold: PositiveFloat = Field(
        default=6.0, description="Robust standard deviations above their median from which a loss is a spike."
    )
