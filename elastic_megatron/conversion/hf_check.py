"""Read a written Hugging Face directory as a loader would: are its tensors and statements those of the model?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint.hf_config import BLOCK_TYPES
from ..checkpoint.hf_names import EMBEDDING, hf_pieces
from ..checkpoint.hf_read import CONFIG, ELASTIC_CONFIG, INDEX
from ..checkpoint.libraries import LibrarySafetensors
from ..checkpoint.manifest import Manifest
from ..checkpoint.stored import Entry, StoredModel
from ..errors import UserError
from ..space import ParentShape, axis
from ..space.parent import LAYER_FIELDS
from .cut import Model
from .verify import check_entries, refuted

# fields that say nothing in a model without Mamba layers, besides those of ``LAYER_FIELDS``
_OF_MAMBA = ("conv_kernel", "mamba_chunk_size")


def read_back(folder: Path, entries: Mapping[str, Entry], model: Model) -> StoredModel:
    """The directory through the library. Raises ``UserError`` where its tensors are not exactly ``entries``."""
    files = LibrarySafetensors(sorted(folder.glob("*.safetensors")))
    check_entries(folder, files.entries, entries)
    if (folder / INDEX).exists():
        where = {key: file.name for key, file in files.where.items()}
        if _json(folder / INDEX)["weight_map"] != where:
            raise refuted(folder / INDEX, "names other files of tensors")
    return StoredModel(folder, Manifest(model.shape), files, hf_pieces)


def check_statements(
    written: StoredModel, model: Model, wanted: Mapping[str, Any], elastic: Manifest | None
) -> None:
    """Raise ``UserError`` unless the configurations beside the weights are strict JSON and say what the model is.

    Args:
        written: what ``read_back`` gave.
        wanted: what ``config.json`` should be, with fields that the model's sizes say nothing about.
        elastic: what ``elastic_config.json`` says; ``None`` where there is none.
    """
    file = written.path / CONFIG
    config = _json(file)
    _check_shape(file, config, model.shape)
    _check_layers(file, config, model)
    dtype = str(written.files.entries[EMBEDDING].dtype).removeprefix("torch.")
    if odd := [k for k in sorted(config.keys() | wanted.keys()) if config.get(k) != _plain(wanted.get(k))]:
        raise refuted(file, f"says {odd[0]}={config.get(odd[0])!r} instead of {wanted.get(odd[0])!r}")
    if stated := {config[key] for key in ("dtype", "torch_dtype") if key in config} - {dtype}:
        raise refuted(file, f"says {stated.pop()}, and the embedding is {dtype}")
    found = written.path / ELASTIC_CONFIG
    if (elastic is not None) != found.exists():
        raise refuted(found, "is there" if elastic is None else "is missing")
    if elastic is not None and _json(found) != _plain(elastic.to_dict()):
        raise refuted(found, "describes another family")


def _check_shape(file: Path, config: Mapping[str, Any], shape: ParentShape) -> None:
    """Every number of ``nemotron_h`` that the model has."""
    try:
        stated = ParentShape.from_hf({**config, "model_type": "nemotron_h"})
    except UserError as e:
        raise refuted(file, f"states no such model ({e})") from None
    silent = {f for s, own in LAYER_FIELDS.items() if s not in shape.hybrid_layer_pattern for f in own}
    silent |= set(_OF_MAMBA) if "M" not in shape.hybrid_layer_pattern else set()
    for name in (f.name for f in fields(shape) if f.name not in silent):
        if getattr(stated, name) != getattr(shape, name):
            raise refuted(
                file, f"says {name}={getattr(stated, name)}, and the model has {getattr(shape, name)}"
            )


def _check_layers(file: Path, config: Mapping[str, Any], model: Model) -> None:
    """Sizes that are a layer's own, where layers differ."""
    blocks = config.get("block_configs")
    if blocks is None and model.layer_sizes:
        raise refuted(file, "states equal layers, and they differ")
    for layer, (block, symbol) in enumerate(
        zip(blocks or (), model.shape.hybrid_layer_pattern, strict=False)
    ):
        own = {axis(a).hf: n for a, n in model.layer_sizes.get(layer, {}).items()}
        if block["block_type"] != BLOCK_TYPES[symbol] or any(block.get(k) != n for k, n in own.items()):
            raise refuted(file, f"says {block} of layer {layer}, and it has {own}")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _json(file: Path) -> Any:
    def no(number: str) -> Any:
        raise refuted(file, f"holds {number}, which is no JSON (RFC 8259)")

    return json.loads(file.read_text(), parse_constant=no)
