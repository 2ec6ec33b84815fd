"""Write a Hugging Face ``nemotron_h`` directory as its tensors come, and give it its name at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..space import ElasticSpace, ParentShape, TensorLayout, axis, undeal
from ..space.space import GLOBAL_AXES
from .hf_config import hf_config, with_dtype
from .hf_names import check_shape, to_hf
from .hf_read import CONFIG, ELASTIC_CONFIG, INDEX, SINGLE, side_files
from .manifest import Manifest
from .nested import nested_manifest
from .slice import expected, locate, permute_state, slice_state

Named = tuple[str, Tensor]


def write_hf(
    directory: Path,
    manifest: Manifest,
    state: Iterable[Named],
    *,
    submodel: str | None = None,
    elastic: bool = False,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    plain_order: bool = False,
) -> None:
    """Export a model, or one of its submodels, in bounded memory (one shard).

    Everything is written to a hidden sibling that is renamed once it is complete, so an interruption leaves
    no directory of that name.

    Args:
        directory: must not exist, or be empty.
        manifest: describes ``state``.
        state: (Megatron name, tensor) of the whole model, in any order, whatever ``submodel`` is.
        submodel: the submodel to cut out; ``None`` for the whole model.
        elastic: also write ``elastic_config.json`` with the submodels nested in what is written.
        tokenizer_dir: where tokenizer, generation and remote-code files are copied from.
        dtype: of the weights; ``None`` keeps each tensor's own. Small tensors that the fact table marks fp32
            (A_log, D, router and its bias), and dt_bias, are fp32 in any case where ``dtype`` is given.
        plain_order: undo the lanes, so that components lie by plain decreasing importance.

    Raises:
        UserError: the destination holds something, an unknown or heterogeneous submodel, an elastic export
            of a model that is not, a missing, unknown or misshapen tensor, no tokenizer in ``tokenizer_dir``.
    """
    _check_request(directory, manifest, elastic, plain_order, submodel)
    copied = _tokenizer_files(tokenizer_dir)
    space, shape = manifest.space, manifest.shape
    tensors: Iterable[Named] = _checked(manifest.shape, state)
    if submodel is not None:
        spec = manifest.submodel(submodel)
        assert space is not None
        shape = space.shape_of(spec)
        tensors = slice_state(space, spec, tensors)
    if plain_order and space is not None:
        tensors = permute_state(shape, _plain_orders(space, shape), tensors)
    config = hf_config(manifest, shape, any(f.suffix == ".py" for f in copied))

    partial = directory.parent / f".{directory.name}.incomplete"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = _Shards(partial, max_shard_bytes)
        for name, tensor in tensors:
            layout = locate(shape, name)[1]
            stored = _dtype(layout, dtype) or tensor.dtype
            if layout.role == "lookup":
                config = with_dtype(config, stored)
            for hf_name, part in to_hf(shape, name, tensor):
                shards.add(hf_name, part.detach().to("cpu", stored))
        shards.close()
        for file in copied:
            shutil.copy2(file, partial / file.name)
        if elastic:
            nested = manifest if submodel is None else nested_manifest(manifest, submodel)
            replace(nested, hf_config=config).write(partial / ELASTIC_CONFIG)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_request(
    directory: Path, manifest: Manifest, elastic: bool, plain_order: bool, submodel: str | None
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} already exists and is not empty; choose another destination or remove it"
        )
    if (elastic or submodel is not None) and manifest.space is None:
        raise UserError(
            "the model is not elastic and has no submodels; export it without --submodel and --elastic"
        )
    if elastic and plain_order:
        raise UserError("--elastic keeps the stored order, which --plain-order undoes; choose one of them")


def _tokenizer_files(directory: Path | None) -> tuple[Path, ...]:
    if directory is None:
        return ()
    if not directory.is_dir():
        raise UserError(f"tokenizer directory {directory} does not exist; give one with tokenizer.json")
    files = side_files(directory)
    if not files:
        raise UserError(f"{directory} holds no tokenizer files; give a directory with tokenizer.json")
    return files


def _checked(shape: ParentShape, state: Iterable[Named]) -> Iterator[Named]:
    """Pass tensors on; raise ``UserError`` unless each expected one arrives exactly once, in its shape."""
    sizes = parent_fields(shape)
    pending = {name for name, _ in expected(shape)}
    for name, tensor in state:
        layer, layout, expert = locate(shape, name)
        check_shape(name, tensor.shape, layout.shape(sizes))
        local = layout.name.format(e=expert)
        local = local if layer is None else f"decoder.layers.{layer}.{local}"
        if local not in pending:
            raise UserError(
                f"tensor {name!r} comes twice, or expert {expert} does not exist; the export is refused"
            )
        pending.remove(local)
        yield name, tensor
    if pending:
        first = min(pending)
        raise UserError(
            f"tensor {first!r} is missing ({len(pending)} in all); the model to export is incomplete"
        )


def _plain_orders(space: ElasticSpace, shape: ParentShape) -> dict[str | tuple[int, str], list[int]]:
    """For each layer and axis, the positions that read its lanes back as plain prefix order."""
    orders: dict[str | tuple[int, str], list[int]] = {}
    for name in space.axes:
        lanes, groups = space.lanes_of(name), space.parent.groups(name)
        if name not in GLOBAL_AXES and lanes != groups:
            order = undeal(shape.size(name), lanes, groups)
            orders |= {(layer, name): order for layer in shape.layers_of(axis(name).symbol)}
    return orders


def _dtype(layout: TensorLayout, dtype: torch.dtype | None) -> torch.dtype | None:
    """dt_bias has Megatron's parameter dtype and is no fp32 tensor there, but exports of the family keep it so."""
    kept = layout.fp32 or layout.name == "mixer.dt_bias"
    return torch.float32 if dtype is not None and kept else dtype


class _Shards:
    """Collects tensors and writes them out whenever the next would exceed a shard."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        # parts of a fused tensor are views, and safetensors refuses shared memory
        own = tensor.untyped_storage().nbytes() == tensor.nbytes
        self._pending[name] = tensor.contiguous() if own else tensor.clone()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard, give all their final names, and write the index where there are several."""
        self._flush()
        count = len(self._written)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = names if count > 1 else [SINGLE]
        for i, name in enumerate(names):
            (self._directory / f"{i}.part").rename(self._directory / name)
        if count > 1:
            where = {t: name for name, tensors in zip(names, self._written, strict=True) for t in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": where}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        file = self._directory / f"{len(self._written)}.part"
        save_file(self._pending, file, metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
