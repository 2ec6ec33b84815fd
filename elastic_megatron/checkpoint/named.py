"""What lies at a path and which submodels it names, without torch: mistakes are found before it is imported."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from . import tracker
from .manifest import FILE, Manifest
from .resolve import CONFIG, hf_manifest
from .tracker import TRACKER, folder, iteration_of, read_tracker

BACKEND = "metadata.json"


def described(path: Path) -> Manifest | None:
    """What a checkpoint or a Hugging Face directory says of itself; ``None`` of a checkpoint of another program.

    Raises ``UserError`` where it is none of them, or says nothing that can be true.
    """
    if foreign_folder(path):
        return None
    if tracker.is_checkpoint(path):
        return Manifest.read(tracker.resolve(path) / FILE)
    if is_hf(path):
        return hf_manifest(path)
    raise nowhere(path)


def check_cut(path: Path, manifest: Manifest, submodel: str | None, elastic: bool) -> None:
    """Raise ``UserError`` where a submodel, or the submodels nested in a model, are asked of one that has none."""
    if (elastic or submodel is not None) and manifest.space is None:
        raise UserError(
            f"{path} is not elastic and has no submodels (it has no elastic_config.json, or one without a "
            "space); train it with a space, or convert it without --submodel and --elastic"
        )
    if submodel is not None:
        manifest.submodel(submodel)


def is_hf(path: Path) -> bool:
    """Is it a Hugging Face model directory?"""
    return path.is_dir() and (path / CONFIG).exists()


def nowhere(path: Path) -> UserError:
    """What to say of a path that is no model."""
    what = (
        "does not exist"
        if not path.exists()
        else "is neither a Megatron checkpoint nor a Hugging Face directory"
    )
    return UserError(f"{path} {what}; give a run folder, an iter_* folder or a directory with config.json")


def foreign_folder(path: Path) -> Path | None:
    """The ``iter_*`` or ``release`` folder meant by a path: itself, or the one that the tracker of a root names.

    ``None`` where there is none, or it is one of ours. Raises ``UserError`` where the tracker is damaged or names a
    folder that cannot be read.
    """
    if (path / BACKEND).exists():
        return None if (path / FILE).exists() else path
    for root in (path, path / "checkpoints"):
        if (root / TRACKER).exists():
            return _named(root)
    return None


def _named(root: Path) -> Path | None:
    text = read_tracker(root / TRACKER)
    number = iteration_of(text)
    named = root / "release" if number is None else folder(root, number)
    known = number is not None or text == "release"
    if any((p / FILE).exists() for p in root.glob("*iter_*")):
        return None  # a root of ours, about which ``tracker`` knows more
    if known and (named / BACKEND).exists():
        return named
    if not known:
        raise UserError(
            f"{root / TRACKER} says {text[:40]!r}; write the number of an iteration, or 'release'"
        )
    if not named.is_dir():
        raise UserError(f"{root / TRACKER} says {text!r}, but {named} is not there; correct the file")
    raise UserError(
        f"{named} has no {BACKEND}, so its format is not torch_dist; convert it with Megatron-LM's "
        "--ckpt-convert-format torch_dist"
    )
