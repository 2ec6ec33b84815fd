"""Read a Hugging Face ``nemotron_h`` directory: checked when it is opened, streamed when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.json_files import read_object
from ..files.reading import inside
from ..quantization.formats import Part
from ..space import ParentShape
from ..space.stated import shown
from .hf_keys import canonical
from .hf_names import EMBEDDING, HEAD, hf_pieces
from .hf_parts import check_parts
from .hf_quantised import Quantised, read_quantised, unquantised
from .manifest import Manifest
from .resolve import CONFIG, ELASTIC_CONFIG, hf_shape
from .safetensors_files import SafetensorsFiles
from .side_files import left_behind, own_code, side_files
from .stored import DTYPES, Entry, StoredModel, as_stored, model_tensors, stored_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CARD = "README.md"


def read_hf(directory: Path) -> StoredModel:
    """Open a directory and check every file header: names, shapes, dtypes and lengths, but no data.

    Reading the embedding of a tied model raises ``UserError`` where ``lm_head.weight`` is there and differs.

    Raises ``UserError`` where a file is missing or damaged, the model is of another type, or a tensor is
    missing, unknown, of another shape or dtype, or quantised in a way that is not read; nothing is dropped in silence.
    """
    config = read_config(directory)
    shape = hf_shape(config, directory / CONFIG)
    quantised = read_quantised(directory, config)
    elastic = directory / ELASTIC_CONFIG
    manifest = Manifest(shape=shape, hf_config=unquantised(config))
    if elastic.exists():
        manifest = Manifest.read(elastic)
        manifest = replace(manifest, hf_config=unquantised(manifest.hf_config))
        if ParentShape.from_hf({"model_type": "nemotron_h", **manifest.shape.to_hf()}) != shape:
            raise UserError(
                f"{directory / CONFIG} and {elastic} describe different models; restore the one that was changed"
            )
    files = _open_shards(directory, _TiedFiles if shape.tie_embeddings else SafetensorsFiles)
    found, dropped = _of_the_model(files.entries)
    _check_tensors(directory, manifest.shape, found, quantised)
    side_files(directory, config)  # to refuse what cannot be taken along, before anything is read
    notes = (*dropped, *_left_out(directory, config, files))
    return StoredModel(directory, manifest, files, hf_pieces, directory, quantised, notes)


class _TiedFiles(SafetensorsFiles):
    """Files that may hold the embedding a second time, as the output layer."""

    def read(self, key: str, start: int, out: Tensor) -> None:
        super().read(key, start, out)
        if key == EMBEDDING and HEAD in self.entries:
            other = torch.empty(out.shape, dtype=self.entries[HEAD].dtype)
            super().read(HEAD, start, other)
            if not torch.equal(out.double().nan_to_num(), other.double().nan_to_num()):
                raise UserError(
                    f"{self.where[HEAD].parent}: tie_word_embeddings is true, but lm_head.weight differs from the "
                    "embedding; set it to false in config.json"
                )


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a directory. Raises ``UserError`` where either is missing or damaged."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give a Hugging Face model directory")
    return read_object(inside(directory, CONFIG, directory), "is it a Hugging Face model directory?")


def _open_shards(directory: Path, kind: type[SafetensorsFiles]) -> SafetensorsFiles:
    """The weight files that the index names, or the only one."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        if not single.exists():
            raise UserError(_no_weights(directory))
        return kind([inside(directory, SINGLE, directory)], canonical)
    promised = read_object(inside(directory, INDEX, directory), "copy it there").get("weight_map")
    if not isinstance(promised, dict):
        raise UserError(f"{index} has no weight_map; copy it again")
    if odd := [tensor for tensor, name in promised.items() if not isinstance(name, str)]:
        raise UserError(f"{index}: weight_map names no file for {shown(odd[0])}; copy it again")
    shards = {name: inside(directory, name, index) for name in sorted(set(promised.values()))}
    if missing := [name for name, file in shards.items() if not file.exists()]:
        raise UserError(
            f"{directory}: shard {missing[0]} is missing ({len(missing)} of {len(shards)}); copy it there"
        )
    files = kind(shards.values(), canonical)
    if absent := [t for t, name in promised.items() if files.where.get(canonical(t)) != shards[name]]:
        raise UserError(
            f"{index} says that {promised[absent[0]]} holds {shown(absent[0])}, and it does not ({len(absent)} such "
            "tensors); copy both files from the same source"
        )
    return files


def _no_weights(directory: Path) -> str:
    """What to say of a directory without an index and without the one file that needs none."""
    if shards := sorted(f.name for f in directory.glob("*.safetensors")):
        return (
            f"{directory} has {shards[0]}, but no {INDEX} that says which files hold the model; get that small file "
            f"from where the weights came from{', or rename the only file to ' + SINGLE if len(shards) == 1 else ''}"
        )
    if pickles := sorted(f.name for f in directory.glob("*.bin")):
        return (
            f"{directory} has its weights as pickles ({pickles[0]}), which are not read; load the model with "
            "transformers, save_pretrained it as safetensors, and give that directory"
        )
    return f"{directory} has neither {INDEX} nor {SINGLE}; copy the weights (safetensors) there"


def _of_the_model(found: Mapping[str, Entry]) -> tuple[dict[str, Entry], list[str]]:
    """The tensors that an elastic model has a place for, and a line for each kind of others that may be left out."""
    predicting = {n: e for n, e in found.items() if n.startswith("mtp.")}
    empty = [n for n, e in found.items() if n not in predicting and 0 in e.shape]
    size = sum(prod(e.shape) * e.dtype.itemsize for e in predicting.values())
    notes = []
    if predicting:
        notes.append(
            f"note: {len(predicting)} tensors of multi-token prediction (mtp.*, {size / 1e6:.1f} MB) are left out: "
            "elastic models carry none, and what is written says that there are none"
        )
    if empty:
        notes.append(f"note: {len(empty)} tensors without values are left out ({empty[0]})")
    return {n: e for n, e in found.items() if n not in predicting and n not in empty}, notes


def _left_out(directory: Path, config: Mapping[str, Any], files: SafetensorsFiles) -> Iterator[str]:
    """A line with the names of what a conversion does not take along."""
    read = {file.name for file in files.where.values()}
    names = {file.name for file in directory.glob("*.safetensors")} - read
    names |= set(left_behind(directory, config))
    if (directory / _CARD).exists() and not (directory / ELASTIC_CONFIG).exists():
        names.add(_CARD)
    if names:
        yield f"note: left out of {directory}: {', '.join(sorted(names))}"
    own, named = own_code(config, side_files(directory, config)), config.get("auto_map")
    if away := [kind for kind in (named if isinstance(named, dict) else ()) if kind not in own]:
        yield (
            f"note: auto_map names code for {', '.join(map(str, away))} that is not in {directory}; exports do without "
            "it, as transformers and vLLM have the architecture built in"
        )


def _check_tensors(
    directory: Path, shape: ParentShape, found: Mapping[str, Entry], quantised: Quantised | None
) -> None:
    tensors = [t for whole in model_tensors(shape) for t in as_stored(whole, quantised)]
    if quantised is not None:
        check_parts(directory, quantised, tensors, found)
    wanted = stored_shapes(tensors, hf_pieces)
    parts = {piece.key: t.part for t in tensors if t.part for piece in hf_pieces(t)}
    optional = {HEAD: wanted[EMBEDDING]} if shape.tie_embeddings else {}
    if missing := [n for n in wanted if n not in found]:
        raise UserError(
            f"{directory}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)}) in all files of weights; "
            "get the file that holds it, or correct config.json where the model has no such tensor"
        )
    if unknown := [n for n in found if n not in wanted and n not in optional]:
        raise UserError(
            f"{directory}: tensor {unknown[0]!r} belongs to no block of pattern {shape.hybrid_layer_pattern!r} "
            f"({len(unknown)} unknown); nothing is dropped in silence: remove it, or correct config.json"
        )
    for name, entry in found.items():
        shape_wanted = (wanted | optional)[name]
        if entry.shape != shape_wanted and not (_is_number(parts.get(name)) and entry.shape == ()):
            raise UserError(
                f"{directory}: tensor {name!r} has shape {list(entry.shape)}, the model's sizes say "
                f"{list(shape_wanted)}; the weights and the configuration belong to different models"
            )
        if entry.dtype not in DTYPES and name not in parts:
            raise UserError(
                f"{directory}: tensor {name!r} has dtype {str(entry.dtype).removeprefix('torch.')}; give the "
                "directory with the BF16, FP16 or FP32 weights, or save the model with transformers in one of them"
            )


def _is_number(part: Part | None) -> bool:
    """ModelOpt writes these as tensors of shape [] and [1]."""
    return part is not None and not part.columns
