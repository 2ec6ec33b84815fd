"""A chain against what its cluster file says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..recipe import JobChain, PlannedJob
from ..recipe.cluster import NoContainer
from ..recipe.types import seconds
from .family import Found
from .paths import paths_of


def cluster_problems(chain: JobChain) -> Iterator[Found]:
    """Findings about the cluster file itself."""
    yield from _environment(chain)
    yield from _container(chain)


def time_limit(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    """What a job asks for against what it may have."""
    most = chain.cluster.max_time
    if most is not None and seconds(job.time) > seconds(most):
        text = f"slurm.time={job.time} is longer than the cluster's max_time={most}"
        yield "error", f"{text}; set slurm.time={most}"


def _environment(chain: JobChain) -> Iterator[Found]:
    if missing := [name for name in chain.cluster.environment if name not in os.environ]:
        yield (
            "warning",
            f"environment names {', '.join(missing)}, not set here; export {' '.join(missing)}, or take the name out",
        )


def _container(chain: JobChain) -> Iterator[Found]:
    container = chain.cluster.container
    if isinstance(container, NoContainer):
        if container.bin is not None and not (container.bin / "elastic-megatron").exists():
            yield (
                "error",
                f"container.bin: {container.bin} holds no elastic-megatron; name the folder that does",
            )
        return
    image = container.image
    if image.startswith(("/", "./", "../", "~")) and not Path(image).expanduser().exists():
        yield "error", f"container.image: {image} does not exist; import it first, or name another image"
    for mount in container.mounts:
        if not mount.exists():
            yield "error", f"container.mounts: {mount} does not exist here; create it, or take it out"
    outside: dict[Path, str] = {}
    for path, what in paths_of(chain):
        if not any(path.is_relative_to(mount) for mount in container.mounts):
            outside.setdefault(_mountable(path), f"{what} {path}")
    for folder, what in outside.items():
        yield "error", f"{what} lies under no mount of the container; add {folder} to container.mounts"


def _mountable(path: Path) -> Path:
    """A folder to mount: the nearest that exists, or the path's own parent."""
    folder = path if path.is_dir() else path.parent
    while not folder.exists():
        folder = folder.parent
    return folder if folder != Path(folder.anchor) else path.parent
