"""What quantisation did to a family, as data: loss, KL and bytes of every size before, after, and distilled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_megatron.checkpoint import tracker
from elastic_megatron.checkpoint.hf_quantised import Quantised, quantisable, stored_bytes
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.cost.sizes import parent_fields
from elastic_megatron.files.json_files import read_object
from elastic_megatron.files.writing import write_text
from elastic_megatron.quantization.formats import FORMATS
from elastic_megatron.quantization.presets import Block, block_of
from elastic_megatron.report.format import finite
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec, tensors_of

Json = dict[str, Any]
FORMAT_NAMES = frozenset(form.name for form in FORMATS.values())
BLOCK_WORDS: Mapping[Block, str] = {
    "attention": "attention",
    "mamba": "Mamba",
    "mlp": "FFN",
    "experts": "experts",
    "shared_experts": "shared experts",
}
NEVER = ("embeddings", "head", "convolutions", "norms", "expert routers")
"""What no preset quantises."""


@dataclass(frozen=True)
class Stored:
    """What the newest checkpoint says: bytes of every size on disk, and what keeps its precision, in words."""

    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantized:
    """The lines of ``metrics.jsonl`` that only quantised runs have; ``Stored`` is beside them.

    Args:
        unquantised, ptq: evaluations at step 0, before and after calibration; empty where there is none yet.
        qad: evaluations of training on quantised weights, by step.
        calibration: its line; empty where there is none yet.
    """

    unquantised: Json
    ptq: Json
    qad: Sequence[Json]
    calibration: Json
    stored: Stored

    @property
    def format(self) -> str | None:
        """Of the weights: ``nvfp4`` or ``fp8``; None before calibration is done."""
        return (self.ptq or (self.qad[-1] if self.qad else {})).get("weights")

    @property
    def names(self) -> list[str]:
        """Every evaluated submodel."""
        lines = (self.unquantised, self.ptq, *self.qad)
        return list(dict.fromkeys(name for line in lines for name in line.get("submodels") or {}))

    def facts(self) -> Json:
        """The object under ``quantized`` in ``report.json``; losses and KL are in nats per token."""
        return {
            "format": self.format,
            "unquantised_weights": self.unquantised.get("weights"),
            "submodels": {name: self._submodel(name) for name in self.names},
            "calibration": {key: self.calibration.get(key) for key in ("tokens", "unseen")},
            "kept": list(self.stored.kept),
        }

    def _submodel(self, name: str) -> Json:
        before, ptq = measured(self.unquantised, name), measured(self.ptq, name)
        qad = measured(self.qad[-1], name) if self.qad else None
        return {
            "unquantised": before,
            "ptq": ptq,
            "qad": qad,
            "kl_recovered": recovered(before["kl"], ptq["kl"], qad["kl"]) if qad else None,
            "loss_change_ptq": change(before["loss"], ptq["loss"]),
            "loss_change_qad": change(before["loss"], qad["loss"]) if qad else None,
            "bytes": dict(self.stored.sizes.get(name) or {"unquantised": None, "quantised": None}),
        }


def split(evals: Iterable[Json]) -> tuple[list[Json], list[Json]]:
    """Evaluation lines of weights as training keeps them (or without ``weights``), and of quantised ones."""
    lines = list(evals)
    quantised = [line for line in lines if line.get("weights") in FORMAT_NAMES]
    return [line for line in lines if line.get("weights") not in FORMAT_NAMES], quantised


def read_quantized(run_dir: Path, evals: Iterable[Json], calibrations: Sequence[Json]) -> Quantized | None:
    """Of a run whose lines are given in the order of the file; ``None`` for a run that was not quantised.

    A line that was written again after a restart holds. Raises ``UserError`` where the newest checkpoint is damaged.
    """
    plain, quantised = split(evals)
    unquantised = [line for line in plain if line.get("weights")]
    if not (unquantised or quantised or calibrations):
        return None
    trained = {line["step"]: line for line in quantised if line.get("step")}
    return Quantized(
        unquantised=unquantised[-1] if unquantised else {},
        ptq=next((line for line in reversed(quantised) if not line.get("step")), {}),
        qad=[trained[step] for step in sorted(trained)],
        calibration=calibrations[-1] if calibrations else {},
        stored=read_stored(run_dir),
    )


def read_stored(run_dir: Path) -> Stored:
    """Of the newest checkpoint of a run; nothing where there is none, or none that is quantised.

    Unquantised bytes are those of a BF16 export with the same tensors. Raises ``UserError`` where it is damaged.
    """
    folder = tracker.newest(run_dir / "checkpoints")
    manifest = Manifest.read(folder / FILE) if folder else None
    if manifest is None or manifest.quantised is None:
        return Stored()
    how, plain = manifest.quantised, manifest.quantised.excluding(["*"])
    space = manifest.space or ElasticSpace.build(manifest.shape, {})
    members: Mapping[str, SubmodelSpec] = manifest.submodels or {"parent": space.full()}
    return Stored(
        sizes={
            name: {
                "unquantised": stored_bytes(plain, space, spec),
                "quantised": stored_bytes(how, space, spec),
            }
            for name, spec in members.items()
        },
        kept=kept_words(how, manifest.shape),
    )


def kept_words(how: Quantised, shape: ParentShape) -> tuple[str, ...]:
    """What is not quantised, short: ``("attention 5, 12", "Mamba 4, 11", "embeddings", ...)``; the first layer is 0."""
    sizes, linears = parent_fields(shape), Counter[tuple[Block, int]]()
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        for layout in filter(quantisable, tensors_of(symbol, sizes)):
            copies = shape.num_moe_experts if layout.per_expert else 1
            linears[block_of(symbol, layout.name), layer] += copies
    stored = Counter(
        (block_of(shape.hybrid_layer_pattern[layer], layout.name), layer)
        for layer, layout, _ in how.stored_keys(shape)
    )
    told = []
    for block, words in BLOCK_WORDS.items():
        layers = [layer for kind, layer in linears if kind == block]
        kept = [str(layer) for layer in layers if not stored[block, layer]]
        if kept:
            told.append(words if len(kept) == len(layers) else f"{words} {', '.join(kept)}")
        for layer in layers:
            if 0 < (quantised := stored[block, layer]) < (all_of := linears[block, layer]):
                told.append(f"{all_of - quantised} of {all_of} linears of {words} {layer}")
    return (*told, *NEVER)


def measured(line: Json, name: str) -> Json:
    """``{"loss", "kl"}`` of a submodel in an evaluation line, ``None`` where it is not measured."""
    found = (line.get("submodels") or {}).get(name) or {}
    return {key: found.get(key) for key in ("loss", "kl")}


def recovered(before: Any, ptq: Any, qad: Any) -> float | None:
    """Share of the KL that quantisation cost and distillation won back; ``None`` where nothing was lost."""
    if not (finite(before) and finite(ptq) and finite(qad)) or ptq <= before:
        return None
    return (ptq - qad) / (ptq - before)


def change(before: Any, after: Any) -> float | None:
    """Relative change of a loss."""
    return (after - before) / before if finite(before) and finite(after) and before else None


def record(run_dir: Path, quantized: Quantized) -> Path:
    """Write the facts under ``quantized`` into ``report.json`` of the run, whose other keys stay; returns its path."""
    path = run_dir / "report.json"
    report = read_object(path, "delete it", "delete it") if path.exists() else {}
    write_text(path, json.dumps({**report, "quantized": quantized.facts()}, indent=1))
    return path
