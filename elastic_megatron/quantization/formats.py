"""What quantised checkpoints store instead of a weight [rows, columns], as data. No torch: a login node may ask.

The layout is the *unified Hugging Face* one of ModelOpt (modelopt/torch/export/unified_export_megatron.py, 0.47),
which vLLM, SGLang and TensorRT-LLM read: beside ``P.weight`` lie the scales of a linear ``P``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT = "weight"
WEIGHT_SCALE = "weight_scale"
WEIGHT_SCALE_2 = "weight_scale_2"
INPUT_SCALE = "input_scale"


@dataclass(frozen=True)
class Part:
    """One of the tensors that are stored of a weight.

    Args:
        suffix: of its name, in place of ``weight``.
        dtype: as torch names it.
        columns: how many columns of the weight one of its columns stands for; 0 where it is one number.
    """

    suffix: str
    dtype: str
    columns: int = 0

    def renamed(self, weight: str) -> str:
        """Its name beside a weight of this name."""
        return weight.removesuffix(WEIGHT) + self.suffix

    def nbytes(self, rows: int, columns: int) -> int:
        """Of the part of a weight [rows, columns]."""
        return _BYTES[self.dtype] * (rows * (columns // self.columns) if self.columns else 1)


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Args:
        name: as recipes and costs spell it.
        algo: as ModelOpt's configurations spell it.
        block: columns that share a scale, so that they are kept or dropped together; 1 where nothing ties them.
        bits: of a value.
        parts: what is stored, the weight itself first.
    """

    name: str
    algo: str
    block: int
    bits: int
    parts: tuple[Part, ...]

    def nbytes(self, rows: int, columns: int) -> int:
        """Everything that is stored of a weight [rows, columns]."""
        return sum(part.nbytes(rows, columns) for part in self.parts)

    @property
    def value_bytes(self) -> float:
        """Bytes of one value of a weight, its share of the scales of blocks included."""
        return sum(_BYTES[part.dtype] / part.columns for part in self.parts if part.columns)

    @property
    def scalar_bytes(self) -> int:
        """Bytes of the numbers that a weight of any size has."""
        return self.nbytes(0, 0)


_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float32": 4}
_SCALAR = "float32"
FP8 = Format(
    "fp8", "FP8", 1, 8,
    (Part(WEIGHT, "float8_e4m3fn", 1), Part(WEIGHT_SCALE, _SCALAR), Part(INPUT_SCALE, _SCALAR)),
)  # fmt: skip
NVFP4 = Format(
    "nvfp4", "NVFP4", 16, 4,
    (
        Part(WEIGHT, "uint8", 2), Part(WEIGHT_SCALE, "float8_e4m3fn", 16), Part(WEIGHT_SCALE_2, _SCALAR),
        Part(INPUT_SCALE, _SCALAR),
    ),
)  # fmt: skip
FORMATS: Mapping[str, Format] = {f.algo: f for f in (FP8, NVFP4)}
