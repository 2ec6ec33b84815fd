"""How outcomes are shown and kept."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu.bench import share_of_limit

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "apex",
             "nvidia-modelopt", "flash-attn", "elastic-megatron")  # fmt: skip


def lines(outcome: Mapping[str, Any]) -> Iterator[str]:
    """A step's own line, with the number that is nearest to its limit, and one for everything it told."""
    told = outcome["findings"]
    name, seconds = f"{outcome['name']}: {outcome['title']}", f"[{outcome['seconds']:.0f} s]"
    yield f"{outcome['outcome']:<9}  {name}{_headline(told)}  {seconds}"
    for finding in told:
        yield f"    {finding['what']}: {_value(finding)}"
    if outcome["rehearsed_with"]:
        yield f"    rehearsed with {'; '.join(outcome['rehearsed_with'])}"
    if outcome["reason"]:
        yield f"    {outcome['outcome']}: {outcome['reason']}"


def _headline(findings: Sequence[Mapping[str, Any]]) -> str:
    limited = [f for f in findings if "limit" in f]
    numbers = limited or [f for f in findings if "value" in f]
    if not numbers:
        return ""
    shown = max(numbers, key=lambda f: share_of_limit(dict(f))) if limited else numbers[0]
    return f" | {_value(shown)} ({shown['what']})"


def _value(finding: Mapping[str, Any]) -> str:
    if "text" in finding:
        return finding["text"]
    unit = f" {finding['unit']}" if finding["unit"] else ""
    limit = f", at most {finding['limit']:.4g}{unit}" if "limit" in finding else ""
    return f"{finding['value']:.4g}{unit}{limit}"


def summary(outcomes: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(o["outcome"] for o in outcomes)
    return ", ".join(
        f"{counts[name]} {name}" for name in ("pass", "rehearsed", "skip", "fail") if counts[name]
    )


def results(outcomes: Sequence[Mapping[str, Any]], *, rehearse: bool) -> dict[str, Any]:
    """What is kept: the machine, the versions, and every outcome."""
    return {
        "rehearsed": rehearse,
        "gpus": [] if rehearse else gpus(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "versions": versions(),
        "steps": list(outcomes),
    }


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of every GPU, as ``nvidia-smi`` says; none where it is missing."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        rows = (line.split(", ") for line in done.stdout.splitlines())
        return [dict(zip(fields, row, strict=False)) for row in rows]
    return []


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def file_name(outcome: Mapping[str, Any], folder: Path) -> Path:
    """Where the results of this machine go."""
    names = [gpu["name"] for gpu in outcome["gpus"]] or ["gpu"]
    return folder / f"gpu_check_{names[0].lower().replace(' ', '_').replace('/', '_')}.json"
