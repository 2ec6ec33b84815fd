"""Importance scores of a ``ranking.safetensors`` file, arranged for drawing.

Keys are ``{axis}.score`` for the axes that the whole model shares (``hidden_size``, ``num_layers``) and
``layers.{i}.{axis}.score`` for the others. Shapes are [width], except ``moe_ffn_hidden_size``, which is
[experts, channels]: channels are ranked inside each expert, so their sorted scores are averaged over experts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from elastic_megatron.errors import UserError
from elastic_megatron.files.json_files import read_object
from elastic_megatron.files.reading import open_regular
from elastic_megatron.report.format import AXIS_TITLES, LAYER_NAMES

NEGLECTED = 0.1
"""An expert that saw less than this part of its fair share of tokens is reported as neglected."""


@dataclass(frozen=True)
class ScoreCurve:
    """Scores of one axis in one layer (None: shared by all), best first; float64 [width]."""

    layer: int | None
    kind: str
    scores: np.ndarray

    @property
    def name(self) -> str:
        if self.layer is None:
            return "all layers"
        return f"layer {self.layer}" + (f" ({self.kind})" if self.kind else "")

    def kept(self, part: float) -> float:
        """Share of the total score that the best ``part`` (0…1) of the components carries."""
        total = float(self.scores.sum())
        best = self.scores[: max(1, round(part * len(self.scores)))]
        return float(best.sum()) / total if total > 0 else part


@dataclass(frozen=True)
class Ranking:
    """Score curves by axis; routed tokens [experts] by layer; one score per layer for depth, if ranked."""

    curves: dict[str, list[ScoreCurve]]
    expert_tokens: dict[int, np.ndarray]
    depth: np.ndarray | None
    layer_types: str
    tokens: int | None

    def neglected(self) -> dict[int, int]:
        """Layers with experts below `NEGLECTED` of their fair share of tokens, and how many there are."""
        low = {i: int((seen < NEGLECTED * seen.mean()).sum()) for i, seen in self.expert_tokens.items()}
        return {layer: n for layer, n in low.items() if n}


def read_ranking(path: Path) -> Ranking | None:
    """Read ``path`` and the ``ranking.json`` beside it; None if there is no file.

    Raises `UserError` if the file is not in safetensors format.
    """
    if not path.exists():
        return None
    try:
        open_regular(path).close()
        tensors = load_file(path)
    except UserError:
        raise
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
    ) as error:  # KeyError: a dtype that numpy has none for
        raise UserError(f"{path} is not a safetensors file of numbers ({error}); run `rank` again") from error
    notes_path, again = path.with_suffix(".json"), "run `rank` again"
    notes = read_object(notes_path, again, again) if notes_path.exists() else {}
    tokens = notes.get("tokens")
    return arrange(tensors, str(notes.get("layer_types") or ""), tokens if isinstance(tokens, int) else None)


def arrange(tensors: dict[str, np.ndarray], layer_types: str, tokens: int | None) -> Ranking:
    """Group the tensors of a ranking file by axis, layers ascending; other keys are ignored."""
    curves: dict[str, list[ScoreCurve]] = {}
    expert_tokens: dict[int, np.ndarray] = {}
    for key in sorted(tensors, key=_layer_of):
        owner, _, what = key.rpartition(".")
        axis, layer = owner.rpartition(".")[2], _layer_of(key)
        where = None if layer < 0 else layer
        if what == "tokens" and where is not None:
            expert_tokens[where] = tensors[key].astype(np.float64).ravel()
        elif what == "score" and axis != "num_layers":
            symbol = layer_types[layer] if 0 <= layer < len(layer_types) else ""
            curve = ScoreCurve(where, LAYER_NAMES.get(symbol, ""), _best_first(tensors[key]))
            curves.setdefault(axis, []).append(curve)
    known = [axis for axis in AXIS_TITLES if axis in curves]
    ordered = known + [axis for axis in curves if axis not in known]
    depth = tensors.get("num_layers.score")
    return Ranking(
        {axis: curves[axis] for axis in ordered},
        expert_tokens,
        None if depth is None else depth.astype(np.float64).ravel(),
        layer_types,
        tokens,
    )


def _layer_of(key: str) -> int:
    parts = key.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdigit() else -1


def _best_first(score: np.ndarray) -> np.ndarray:
    finite = np.nan_to_num(score.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    descending = -np.sort(-finite, axis=-1)
    return descending.reshape(-1, descending.shape[-1]).mean(axis=0)
