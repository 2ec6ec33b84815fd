"""Phases that are done once: an interrupted story goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ..files.json_files import read_object, write_object


class Phases:
    """Runs phases in order, remembers which are complete and how long each took, over interruptions.

    ``key`` identifies the inputs (recipes, texts): with other inputs every phase runs again.
    """

    def __init__(self, path: Path, key: str, console: Console) -> None:
        self.path, self.console = path, console
        saved = read_object(path, "", "remove it; every phase runs again") if path.exists() else {}
        fresh = {"key": key, "done": [], "seconds": {}}
        self.stale = bool(saved) and saved.get("key") != key
        self.state = saved if saved.get("key") == key else fresh

    @property
    def seconds(self) -> dict[str, float]:
        return self.state["seconds"]

    def run(self, name: str, title: str, work: Callable[[], None]) -> None:
        """Run ``work`` unless it was completed before."""
        if name in self.state["done"]:
            self.console.print(f"[dim]{title}: done before ({self.seconds[name]:.0f} s)[/dim]")
            return
        self.console.print(f"[bold]{title}[/bold]")
        began = time.monotonic()
        try:
            work()
            self.state["done"].append(name)
        finally:
            spent = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.seconds[name] = round(spent, 1)
            self._save()

    def _save(self) -> None:
        write_object(self.path, self.state)
