"""What is known of a submission beside its jobs: who typed what, from which commits, over which versions."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..recipe import JobChain
from . import programs

# those that decide a run's numbers; a container has its own
PACKAGES = (
    "elastic-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "mamba-ssm",
    "causal-conv1d", "nvidia-modelopt",
)  # fmt: skip
PATIENCE = 3.0
"""Seconds that git may take over all: on a shared file system it may walk a whole tree."""
UNKNOWN = "unknown"


def collect(chain: JobChain, command: Sequence[str]) -> dict[str, Any]:
    """The facts of a submission, for its record. What cannot be known in a few seconds is ``"unknown"``.

    Args:
        command: what the user typed.
    """
    folders = (chain.source.absolute().parent, Path(__file__).parent)
    with ThreadPoolExecutor(len(folders)) as pool:
        recipe, package = pool.map(commit, folders)
    return {
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "source": str(chain.source.absolute()),
        "cluster": str(chain.cluster_file or ""),
        "commits": {"recipe": recipe, "package": package},
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit(folder: Path) -> str | None:
    """The git commit of a folder; ``None`` outside git.

    It ends in ``+dirty`` where tracked files differ from it, and in ``+unknown`` where git takes too long to say.
    """
    if shutil.which("git") is None:
        return None
    deadline = time.monotonic() + PATIENCE
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}

    def git(*arguments: str) -> programs.Answer:
        command = ["git", "-C", str(folder), *arguments]
        try:
            return programs.run(command, max(0.0, deadline - time.monotonic()), env)
        except OSError:  # a git that cannot be started
            return programs.Answer(None)

    head = git("rev-parse", "--verify", "HEAD")
    if head.status != 0 or not head.out:
        return UNKNOWN if head.status is None else None
    changes = git("status", "--porcelain", "--untracked-files=no")
    state = "+dirty" if changes.out else "" if changes.status == 0 else f"+{UNKNOWN}"
    return head.out[-1] + state


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
