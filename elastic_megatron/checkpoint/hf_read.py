"""Read a Hugging Face ``nemotron_h`` directory: checked when it is opened, streamed when it is read."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..space import ParentShape
from .hf_names import HEAD, check_shape, from_hf, hf_tensors
from .manifest import Manifest

CONFIG = "config.json"
ELASTIC_CONFIG = "elastic_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# what a slice takes along besides weights and config; *.py is the remote code that ``auto_map`` names
_SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
_EMBEDDING = "backbone.embeddings.weight"


@dataclass(frozen=True)
class HFDirectory:
    """An opened directory.

    Args:
        config: ``config.json``.
        manifest: ``elastic_config.json``, or for a plain model its shape and config.
        tokenizer_files: tokenizer, generation and remote-code files.
        where: the shard that holds each Hugging Face tensor.
    """

    path: Path
    config: Mapping[str, Any]
    manifest: Manifest
    tokenizer_files: tuple[Path, ...]
    where: Mapping[str, Path]

    def tensors(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, tensor) of the whole model, one at a time, in the dtype they are stored in.

        Only tensors of the names ``wanted`` are read, where they are given.

        Raises ``UserError`` where the output layer of a tied model differs from its embedding.
        """
        with ExitStack() as stack:
            shards = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted(set(self.where.values()))
            }

            def read(name: str) -> Tensor:
                return shards[self.where[name]].get_tensor(name)

            tied = self.manifest.shape.tie_embeddings and HEAD in self.where
            if tied and not torch.equal(read(HEAD), read(_EMBEDDING)):
                raise UserError(
                    f"{self.path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; "
                    "set it to false in config.json"
                )
            yield from from_hf(self.manifest.shape, read, wanted)


def read_hf(directory: Path) -> HFDirectory:
    """Open a directory and check every file header: names, shapes and lengths, but no data.

    Raises ``UserError`` where a file is missing or damaged, the model is of another type, or a tensor is
    missing, unknown or of another shape; nothing is dropped in silence.
    """
    config = read_config(directory)
    shape = ParentShape.from_hf(config)
    elastic = directory / ELASTIC_CONFIG
    manifest = Manifest.read(elastic) if elastic.exists() else Manifest(shape=shape, hf_config=config)
    if "quantization_config" in config:
        raise UserError(f"{directory} is quantised; give the directory with the BF16 or FP32 weights")
    where: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for file in _shards(directory):
        for name, size in _header(file).items():
            where[name], shapes[name] = file, size
    _check_tensors(directory, manifest.shape, shapes)
    return HFDirectory(directory, config, manifest, side_files(directory), where)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a directory. Raises ``UserError`` where either is missing or damaged."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give a Hugging Face model directory")
    return _read_json(directory / CONFIG, "is it a Hugging Face model directory?")


def side_files(directory: Path) -> tuple[Path, ...]:
    """Tokenizer, generation and remote-code files of a directory, sorted."""
    found = {file for pattern in _SIDE_FILES for file in directory.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is no valid JSON ({e}); copy it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds a {type(data).__name__}, not an object; copy it again")
    return data


def _shards(directory: Path) -> list[Path]:
    """The weight files that the index names, or the only one."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        if not single.exists():
            raise UserError(
                f"{directory} has neither {INDEX} nor {SINGLE}; copy the weights (safetensors) there"
            )
        return [single]
    names = _read_json(index, "").get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index} has no weight_map; copy it again")
    files = [directory / n for n in sorted(set(names.values()))]
    if missing := [f.name for f in files if not f.exists()]:
        raise UserError(
            f"{directory}: shard {missing[0]} is missing ({len(missing)} of {len(files)}); copy it there"
        )
    return files


def _header(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is truncated or no safetensors file ({e}); copy it again") from None


def _check_tensors(directory: Path, shape: ParentShape, found: Mapping[str, list[int]]) -> None:
    if mtp := [n for n in found if n.startswith("mtp.")]:
        raise UserError(
            f"{directory} holds {len(mtp)} multi-token-prediction tensors ({mtp[0]}, …), which elastic models "
            "cannot carry; remove them and set num_nextn_predict_layers to 0"
        )
    wanted = {name: size for item in hf_tensors(shape) for name, size in item.parts}
    optional = {HEAD: wanted[_EMBEDDING]} if shape.tie_embeddings else {}
    if missing := [n for n in wanted if n not in found]:
        raise UserError(
            f"{directory}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)}); copy the weights "
            "again, or correct config.json"
        )
    if unknown := [n for n in found if n not in wanted and n not in optional]:
        raise UserError(
            f"{directory}: tensor {unknown[0]!r} belongs to no block of pattern {shape.hybrid_layer_pattern!r} "
            f"({len(unknown)} unknown); nothing is dropped in silence: remove it, or correct config.json"
        )
    for name, size in found.items():
        check_shape(name, size, (wanted | optional)[name])
