"""Files of a Megatron-LM run: the parent it starts from, and what it says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from ... import runtime
from ...checkpoint import tracker
from ...checkpoint.agreement import same_on_all_ranks
from ...checkpoint.dist_check import check_folder
from ...checkpoint.manifest import FILE, Manifest
from ...checkpoint.side_files import copy_side_files
from ...checkpoint.source import Source
from ...errors import UserError, failure_in
from ...files.lock import Held, acquire, within
from ...files.writing import write_text
from ...importance import Ranking
from ...recipe import Recipe, dump
from ...space import ParentShape
from ...training.family import parent_source

_RELEASE = "release"


def open_parent(recipe: Recipe, shape: ParentShape) -> Source:
    """The recipe's parent; a checkpoint that Megatron-LM wrote is taken to have this shape.

    Raises ``UserError`` where there is none.
    """
    path = recipe.model.checkpoint
    folder = _newest(path) if path is not None else None
    if folder is None or (folder / FILE).exists():
        return parent_source(recipe)

    def fill(chunks: Sequence[nn.Module]) -> None:
        with same_on_all_ranks(f"{folder} cannot be read"):
            check_folder(folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
        metadata = {"dp_cp_group": runtime.groups().dp_cp}
        for chunk in chunks:
            shards = chunk.sharded_state_dict(metadata=metadata)
            try:
                loaded = dist_checkpointing.load(shards, str(folder))
            except (CheckpointingException, CheckpointException) as e:
                reason = str(failure_in(e)).strip().splitlines()[0]
                raise UserError(
                    f"{folder} cannot be loaded ({reason}); give the arguments that it was trained with"
                ) from e
            chunk.load_state_dict(loaded, strict=False)

    return Source(folder, Manifest(shape=shape), fill, recipe.model.tokenizer)


def _newest(root: Path) -> Path | None:
    """The folder that Megatron's tracker names."""
    file = root / tracker.TRACKER
    if not file.exists():
        return None
    name = tracker.read_tracker(file)
    number = tracker.iteration_of(name)
    if number is None and name != _RELEASE:
        raise UserError(f"{file} says {name[:40]!r}; write the number of an iteration there, or {_RELEASE!r}")
    return root / _RELEASE if number is None else tracker.folder(root, number)


class RunFolder:
    """``--save`` of a run: Megatron's checkpoints, described so that the other commands can read them.

    ``elastic/`` holds what is fixed from the first step: the manifest, the recipe and the ranking. Every checkpoint
    gets an ``elastic.json`` with the submodels that its router chooses.
    """

    def __init__(self, root: Path, hf_files: Path | None) -> None:
        self.root, self.hf_files = root, hf_files
        self.chosen: dict[int, Manifest] = {}
        self._held: Held | None = None

    @staticmethod
    def read(root: Path, rank: int, world: int) -> Manifest:
        """The manifest of a run, whose newest checkpoint is checked before Megatron loads it, a share on each rank.

        Raises ``UserError`` where the checkpoints are not of such a run, or not what they must be. One rank
        may be the only one; there are no process groups yet, and its end is the launcher's business.
        """
        file = root / "elastic" / FILE
        if not file.exists():
            raise UserError(
                f"{root} holds checkpoints of another program; name them in --pretrained-checkpoint, and give "
                "--load and --save a folder of this run's own"
            )
        if (newest := _newest(root)) is not None:
            check_folder(newest, rank, world)
        return Manifest.read(file)

    def begin(self, manifest: Manifest, recipe: Recipe, ranking: Ranking | None) -> None:
        """Write ``elastic/``, in a folder that is this run's until ``close``.

        Raises ``UserError`` where another run writes to it.
        """
        self._held = acquire(within(self.root), "pretrain_elastic.py")
        folder = self.root / "elastic"
        folder.mkdir(parents=True, exist_ok=True)
        if ranking is not None:
            ranking.save(folder)
        write_text(folder / "recipe.yaml", dump(recipe))
        manifest.write(folder / FILE)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._held is not None:
            self._held.release()

    def choose(self, iteration: int, manifest: Manifest) -> None:
        """Note what the manifest of an iteration is, should it be saved."""
        self.chosen[iteration] = manifest

    def describe(self) -> None:
        """Write the manifest of the checkpoint that the tracker names, once it is complete."""
        folder = _newest(self.root) if self.chosen else None
        if folder is None:
            return
        iteration = int(folder.name.removeprefix("iter_"))
        manifest = self.chosen.get(iteration)
        self.chosen = {i: m for i, m in self.chosen.items() if i > iteration}
        if manifest is None or (folder / FILE).exists():
            return
        if self.hf_files is not None:
            copy_side_files(self.hf_files, manifest.hf_config, folder / "hf")
        manifest.write(folder / FILE)
