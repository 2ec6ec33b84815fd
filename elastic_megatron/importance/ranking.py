"""A ranking: the score of every component and the order it implies, as two files of a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import UserError
from ..files.json_files import read_object, write_object
from ..files.reading import open_regular
from ..files.writing import write_bytes
from ..space.stated import check_pattern, section, whole_number

TENSORS = "ranking.safetensors"
NOTES = "ranking.json"


def order_of(score: Tensor, groups: int = 1) -> Tensor:
    """Components by decreasing score, ties by index; group after group where there are structural groups.

    Args:
        score: [components], or [experts, components] for one order an expert.
    """
    blocks = score.unflatten(-1, (groups, -1))
    order = blocks.sort(dim=-1, descending=True, stable=True).indices
    offset = torch.arange(groups, device=score.device).unsqueeze(-1) * blocks.shape[-1]
    return (order + offset).flatten(-2)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores and orders by key: ``hidden_size``, ``num_layers`` and ``layers.{i}.{axis}``.

    Args:
        scores: float64, [components]; [experts, channels] for ``moe_ffn_hidden_size``, whose channels are
            ranked in each expert by itself (our choice: experts are sorted alone without changing the
            function); -inf for experts that no token reached.
        orders: int64, of the same shapes: ``orders[k][0]`` is the most important component. Expert rows are
            indexed by the expert's number before sorting.
        tokens: layer -> [experts] int64, tokens routed to each expert.
        layer_types: the hybrid layer pattern of the ranked model.
        token_count: calibration tokens.
        data_digest: of the calibration tokens.
        versions: package versions that computed it.
    """

    scores: Mapping[str, Tensor]
    orders: Mapping[str, Tensor]
    tokens: Mapping[int, Tensor]
    layer_types: str
    token_count: int
    data_digest: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def unseen(self) -> dict[str, Any]:
        """What calibration never saw: experts without tokens, channels whose score is exactly zero.

        Lists of indices by key; for ``moe_ffn_hidden_size`` by expert, experts without tokens left out.
        """
        out: dict[str, Any] = {}
        for key, score in self.scores.items():
            if score.dim() == 2:
                seen = score.any(dim=-1)
                dead: Any = {
                    str(e): _where(row == 0) for e, row in enumerate(score) if seen[e] and (row == 0).any()
                }
            elif key.endswith(".num_moe_experts"):
                dead = _where(self.tokens[int(key.split(".")[1])] == 0)
            else:
                dead = _where(score == 0)
            if dead:
                out[key] = dead
        return out

    def digest(self) -> str:
        """SHA-256 of the scores, orders, counts and layer types."""
        h = hashlib.sha256(self.layer_types.encode())
        for key, tensor in sorted(self._tensors().items()):
            h.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.numpy().tobytes())
        return h.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"{k}.score": v for k, v in self.scores.items()}
        out |= {f"{k}.order": v for k, v in self.orders.items()}
        out |= {f"layers.{i}.num_moe_experts.tokens": v for i, v in self.tokens.items()}
        return {k: v.contiguous() for k, v in out.items()}

    def save(self, directory: Path) -> None:
        """Write ``ranking.safetensors`` and ``ranking.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(directory / TENSORS, save(self._tensors()))
        notes = {
            "layer_types": self.layer_types,
            "tokens": self.token_count,
            "data_digest": self.data_digest,
            "versions": dict(self.versions),
            "unseen": self.unseen(),
            "digest": self.digest(),
        }
        write_object(directory / NOTES, notes)

    @classmethod
    def load(cls, directory: Path) -> Ranking:
        """Inverse of ``save``. Raises ``UserError`` where a file is missing, damaged or of another ranking."""
        remedy = "run `elastic-megatron rank` again"
        for name in (TENSORS, NOTES):
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is missing; {remedy}")
        try:
            notes = read_object(directory / NOTES, remedy, remedy)
            open_regular(directory / TENSORS).close()
            ranking = cls._of(load_file(directory / TENSORS), notes)
        except UserError:
            raise
        except (SafetensorError, OSError) as e:
            raise UserError(f"the ranking in {directory} is damaged ({e}); {remedy}") from None
        except (LookupError, TypeError, AttributeError, ValueError) as e:
            raise UserError(
                f"the ranking in {directory} is damaged ({type(e).__name__}: {e}); {remedy}"
            ) from None
        if ranking.digest() != notes.get("digest"):
            raise UserError(f"{TENSORS} and {NOTES} in {directory} do not belong together; {remedy}")
        return ranking

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Ranking:
        parts: dict[str, dict[str, Tensor]] = {"score": {}, "order": {}, "tokens": {}}
        for name, tensor in tensors.items():
            key, _, what = name.rpartition(".")
            parts[what][key] = tensor
        return cls(
            scores=parts["score"],
            orders=parts["order"],
            tokens={int(k.split(".")[1]): v for k, v in parts["tokens"].items()},
            layer_types=check_pattern(notes["layer_types"], "layer_types"),
            token_count=whole_number(notes["tokens"], "tokens", 0, 1 << 62),
            data_digest=notes["data_digest"],
            versions=section(notes["versions"], "versions"),
        )


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
