"""Write Hugging Face directories from a stored model: checked before the first byte, named after the last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import integrity
from ..checkpoint.hf_config import code_files, hf_config, with_dtype
from ..checkpoint.hf_keys import module_of
from ..checkpoint.hf_names import EMBEDDING, HEAD, hf_pieces
from ..checkpoint.hf_quantised import FILE as QUANT_CONFIG
from ..checkpoint.hf_quantised import KEY, Quantised
from ..checkpoint.hf_read import CONFIG, ELASTIC_CONFIG
from ..checkpoint.manifest import Manifest
from ..checkpoint.named import check_cut
from ..checkpoint.nested import left_out, nested_manifest
from ..checkpoint.side_files import copy_side_files, side_files
from ..checkpoint.stored import Entry, ModelTensor, StoredModel, stored_shapes
from ..errors import UserError
from ..files.json_files import plain_numbers, write_object
from ..files.lock import beside, locked
from ..files.targets import check_vacant
from ..files.writing import private_folder
from ..quantization.formats import WEIGHT
from .card import model_card
from .copy import Progress, copy, threads
from .cut import Model, cut_model, widened
from .disk import check_space, flush, write_errors
from .finite import Nonfinite, Watched
from .hf_check import check_statements, read_back
from .report import Report
from .safetensors_shards import SafetensorsShards, nbytes
from .verify import compare

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Request:
    """A directory to write.

    Args:
        directory: must not exist, or be empty.
        submodel: the submodel to cut out; ``None`` for the whole model.
        elastic: also write ``elastic_config.json`` with the submodels nested in what is written.
        plain_order: undo the lanes, so that components lie by plain decreasing importance.
    """

    directory: Path
    submodel: str | None = None
    elastic: bool = False
    plain_order: bool = False


def to_hf(
    source: StoredModel,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = False,
    trust: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write directories, reading the source once, in memory that does not grow with the model.

    Everything is written to hidden siblings that are renamed once all are complete, so an interruption leaves
    no directory of these names; what a killed conversion left is removed by the next one. Meanwhile the
    destinations are locked.

    Args:
        dtype: of the weights that are not quantised, as in ``cut_model``; ``None`` keeps each tensor's own.
        max_shard_bytes: of a safetensors file.
        verify: read everything back and compare it with the source before the directories get their names.
        trust: do not compare the source's files with their digests, where it has any.
        allow_nonfinite: write numbers that are not finite, with a warning in the report.
        progress: called with the number of bytes read, from several threads.

    Raises ``UserError`` where a destination holds something, another conversion writes to it, or the disk is too
    small, for an unknown submodel or one that ``nemotron_h`` cannot state, for an elastic export of a model that is
    not, for a damaged source, and for numbers that are not finite.
    """
    plans = [_plan(source, request, dtype) for request in requests]
    check_space({p.request.directory: sum(map(nbytes, p.entries.values())) for p in plans})
    with write_errors(requests[0].directory.parent), ExitStack() as stack:
        targets = [plan.request.directory for plan in plans]
        held = [stack.enter_context(locked(beside(t), "export")) for t in targets]
        for target in targets:
            check_vacant(target)  # again: it may have been written since
        folders = [stack.enter_context(private_folder(target)) for target in targets]
        sinks = [HFSink(folder, plan, max_shard_bytes) for folder, plan in zip(folders, plans, strict=True)]
        models, seen = [plan.model for plan in plans], [Nonfinite(p.request.directory) for p in plans]
        with nullcontext() if trust else _digests_compared(source.path):
            read = copy(source, models, [Watched(*pair) for pair in zip(sinks, seen, strict=True)], progress)
        warnings = [line for found in seen if (line := found.refuse(unless=allow_nonfinite))]
        for folder, plan, sink in zip(folders, plans, sinks, strict=True):
            sink.shards.check()
            _complete(folder, plan, source)
        for folder, plan in zip(folders, plans, strict=True) if verify else ():
            _verify(folder, plan, source, progress)
        for lock in held:
            lock.check()
        for folder, target in zip(folders, targets, strict=True):
            folder.replace(target)
            flush(folder.parent)
    return Report(
        written=[p.request.directory for p in plans],
        tensors=sum(len(p.entries) for p in plans),
        bytes_read=read,
        bytes_written=sum(nbytes(e) for p in plans for e in p.entries.values()),
        verified=verify,
        notes=[
            *source.notes,
            *(
                line
                for r in requests
                if r.elastic and r.submodel
                for line in left_out(source.manifest, r.submodel)
            ),
            *(widened(source, models) if dtype is None else ()),
            *warnings,
        ],
    )


def weights_bytes(source: StoredModel, submodel: str | None = None) -> int:
    """Bytes of the weights of a submodel (the whole by default) in a directory of its own.

    Raises ``UserError`` as ``cut_model``.
    """
    return sum(map(nbytes, _entries(source, cut_model(source, submodel)).values()))


@dataclass(frozen=True)
class _Plan:
    """What will be written: ``manifest`` is that of an elastic directory, or of the source."""

    request: Request
    manifest: Manifest
    model: Model
    entries: dict[str, Entry]
    config: dict[str, object]
    card: str
    quantised: Quantised | None


def _plan(source: StoredModel, request: Request, dtype: torch.dtype | None) -> _Plan:
    manifest = source.manifest
    _check_request(request, source)
    model = cut_model(source, request.submodel, plain_order=request.plain_order, dtype=dtype)
    code = side_files(source.side_files, manifest.hf_config) if source.side_files is not None else ()
    config = hf_config(manifest, model.shape, code, model.layer_sizes)
    entries = _entries(source, model)
    config = with_dtype(config, entries[EMBEDDING].dtype)
    if request.elastic:
        nested = manifest if request.submodel is None else nested_manifest(manifest, request.submodel)
        manifest = replace(nested, hf_config=config)
    quantised = _quantised(source, model)
    if quantised is not None:
        config = {**config, KEY: plain_numbers(dict(quantised.config))}
    card = model_card(
        manifest,
        title=_title(request),
        submodel=request.submodel,
        elastic=request.elastic,
        dtype=entries[EMBEDDING].dtype,
        stored=(quantised.format, sum(map(nbytes, entries.values()))) if quantised is not None else None,
    )
    return _Plan(request, manifest, model, entries, config, card, quantised)


def _title(request: Request) -> str:
    """Not the directory's name: the same request gives the same bytes."""
    if request.submodel is not None:
        return f"Nemotron-H, size {request.submodel}"
    return "Nemotron-H, elastic" if request.elastic else "Nemotron-H"


def _check_request(request: Request, source: StoredModel) -> None:
    check_vacant(request.directory)
    check_cut(source.path, source.manifest, request.submodel, request.elastic)
    if request.elastic and request.plain_order:
        raise UserError("--elastic keeps the stored order, which --plain-order undoes; choose one of them")


def _quantised(source: StoredModel, model: Model) -> Quantised | None:
    """The source's format, with the modules that it leaves alone and the target has, by the target's names."""
    if source.quantised is None:
        return None
    modules: set[str] = set()
    for cut in model.cuts:
        for ours, theirs in zip(hf_pieces(cut.target), hf_pieces(cut.source), strict=True):
            if ours.key.endswith("." + WEIGHT) and source.quantised.excludes(theirs.key):
                modules.add(module_of(ours.key))
    if model.shape.tie_embeddings and source.quantised.excludes(HEAD):
        modules.add(module_of(HEAD))
    return source.quantised.excluding(sorted(modules))


def _entries(source: StoredModel, model: Model) -> dict[str, Entry]:
    """The tensors of the directory, in the order of the model.

    A tied model gets an ``lm_head.weight`` of its own: transformers 5.16 ties nothing in ``nemotron_h``
    (``NemotronHForCausalLM._tied_weights_keys`` is empty) and would initialise the head at random.
    """
    dtypes = {piece.key: cut.dtype for cut in model.cuts for piece in hf_pieces(cut.target)}
    shapes = stored_shapes(model.tensors, hf_pieces)
    entries = {key: Entry(shape, dtypes[key]) for key, shape in shapes.items()}
    for cut in model.cuts:
        part = cut.target.part
        if part is not None and not part.columns:  # a number: [] and [1] are both in use
            for ours, theirs in zip(hf_pieces(cut.target), source.pieces(cut.source), strict=True):
                entries[ours.key] = source.files.entries[theirs.key]
    if model.shape.tie_embeddings:
        entries[HEAD] = entries[EMBEDDING]
    return entries


class HFSink:
    """Takes the tensors of one directory."""

    def __init__(self, folder: Path, plan: _Plan, max_shard_bytes: int) -> None:
        self.shards = SafetensorsShards(folder, plan.entries, max_shard_bytes)
        self._tied = plan.model.shape.tie_embeddings

    def write(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        """As ``Sink.write``."""
        row = 0
        for piece in hf_pieces(tensor):
            first, last = max(start, row), min(start + len(rows), row + piece.rows)
            if first < last:
                part = rows[first - start : last - start]
                self.shards.write(piece.key, piece.start + first - row, part)
                if self._tied and piece.key == EMBEDDING:
                    self.shards.write(HEAD, first, part)
            row += piece.rows


@contextmanager
def _digests_compared(folder: Path) -> Iterator[None]:
    """Compare files with their digests meanwhile; damage that they show explains whatever else goes wrong."""
    world = threads()
    with ThreadPoolExecutor(world) as pool:
        found = [pool.submit(integrity.verify, folder, rank, world) for rank in range(world)]
        try:
            yield
        except Exception:
            wait(found)
            if damage := next(filter(None, (f.exception() for f in found)), None):
                raise damage from None
            raise
        for future in found:
            future.result()


def _complete(folder: Path, plan: _Plan, source: StoredModel) -> None:
    """Everything besides the weights."""
    if source.side_files is not None:
        copy_side_files(source.side_files, source.manifest.hf_config, folder)
    for name, file in code_files(plan.config).items():
        shutil.copyfile(file, folder / name)
    if plan.request.elastic:
        plan.manifest.write(folder / ELASTIC_CONFIG)
    if plan.quantised is not None:
        write_object(folder / QUANT_CONFIG, plain_numbers(dict(plan.quantised.file)), indent=4)
    write_object(folder / CONFIG, plan.config, indent=2)
    (folder / "README.md").write_text(plan.card)
    for path in (*folder.iterdir(), folder):
        flush(path)


def _verify(folder: Path, plan: _Plan, source: StoredModel, progress: Progress | None) -> None:
    """Raise ``UserError`` unless the directory holds what was planned, and nothing else."""
    written = read_back(folder, plan.entries, plan.model)
    check_statements(written, plan.model, plan.config, plan.manifest if plan.request.elastic else None)
    compare(source, plan.model, written, progress)
