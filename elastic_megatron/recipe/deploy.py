"""What becomes of a trained family: quantisation and export."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from elastic_megatron.recipe.types import FilePath, Key, Positive, Problem, Section, Switch, raise_any

# in the run folder of an export job: what was written where
RECORD = "exports.json"


_MODULES = r"^[A-Za-z0-9_.*?!\[\]-]+$"


def _modules(value: str) -> str:
    if not re.fullmatch(_MODULES, value):
        raise ValueError(
            f"{value!r} is no name of modules and no pattern: use letters, digits, _ - . * ? [ ] !"
        )
    return value


Modules = Annotated[str, AfterValidator(_modules), Field(json_schema_extra={"pattern": _MODULES})]


class Quantize(Section):
    """Low-precision weights and activations, calibrated on a few sequences."""

    format: Literal["fp8", "nvfp4"] = Field(description="Format of the quantised layers.")
    preset: Literal["default", "mamba_moe_aggressive", "mamba_moe_conservative"] = Field(
        default="mamba_moe_aggressive",
        description="Whose linears are quantised. default: all but router, embeddings and head; "
        "mamba_moe_aggressive: not attention's either; mamba_moe_conservative: nor Mamba's.",
    )
    keep_feeding_mamba: Switch = Field(
        default=True,
        description="Leave the Mamba layers alone that an attention layer follows, as the official Nemotron 3 Nano "
        "checkpoints do.",
    )
    keep: tuple[Modules, ...] = Field(
        default=(),
        description='More modules to leave alone: Hugging Face names or patterns ("backbone.layers.0.*").',
    )
    samples: Positive = Field(default=1024, description="Calibration sequences.")
    seq_length: Positive = Field(default=8192, description="Tokens per calibration sequence.")
    micro_batch_size: Positive = Field(default=1, description="Sequences per forward pass.")


class Export(Section):
    """Hugging Face directories of `model.checkpoint`."""

    elastic: FilePath | None = Field(
        default=None, description="Directory for the full model with elastic_config.json, to slice later."
    )
    slices: FilePath | None = Field(
        default=None, description="Folder for one directory per submodel, called by its name."
    )
    submodels: tuple[Key, ...] = Field(default=(), description="Submodels to cut out into `slices`.")
    dtype: Literal["fp32", "bf16"] | None = Field(
        default=None, description="Data type of the weights; default: as stored."
    )
    plain_order: Switch = Field(default=False, description="Undo the lanes: plain prefixes, best first.")
    verify: Switch = Field(
        default=True, description="Read everything back and compare it with the checkpoint."
    )
    allow_nonfinite: Switch = Field(
        default=False,
        description="Write numbers that are not finite, with a warning; otherwise they are refused.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        raise_any(self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.elastic is None and self.slices is None:
            yield Problem((), "needs elastic or slices: somewhere to write to")
        if self.slices is not None and not self.submodels:
            yield Problem(("slices",), "needs submodels: the names to cut out")
        if self.submodels and self.slices is None:
            yield Problem(("submodels",), "needs slices: the folder that their directories are written to")
        for index, name in enumerate(self.submodels):
            if name in self.submodels[:index]:
                yield Problem(("submodels", index), f"names {name!r} a second time")
