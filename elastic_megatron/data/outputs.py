"""Where ``prepare-data`` writes, checked before anything is done. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from elastic_megatron.data.inputs import Input
from elastic_megatron.errors import UserError
from elastic_megatron.files.targets import check_writable

BYTES = "bytes"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def outputs_of(output: Path, valid_fraction: float | None) -> list[Path]:
    """The prefixes of the data sets."""
    if valid_fraction is None:
        return [output]
    return [output.with_name(f"{output.name}_{side}") for side in ("train", "valid")]


def tokenizer_of(output: Path) -> Path:
    """Where the built-in tokenizer is saved."""
    return output.with_name(f"{output.name}_tokenizer")


def check_share(valid_fraction: float | None) -> None:
    """Raise ``UserError`` for a share of the documents that leaves one side without any."""
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise UserError(f"--valid-fraction {valid_fraction}: must lie between 0 and 1; for example 0.05")


def check_tokenizer(tokenizer: str | Path) -> None:
    """Raise ``UserError`` where there is no directory of a tokenizer; whether it loads is seen later."""
    if tokenizer == BYTES:
        return
    path = Path(tokenizer)
    if not path.is_dir():
        raise UserError(
            f"tokenizer {path}: no such directory; give a Hugging Face directory with tokenizer.json"
        )
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise UserError(
            f"tokenizer {path}: holds no tokenizer; give a Hugging Face directory with tokenizer.json"
        )


def check_outputs(
    output: Path, valid_fraction: float | None, tokenizer: str | Path, inputs: Sequence[Input]
) -> None:
    """Raise ``UserError`` where a file cannot be written, or would take the place of an input."""
    if output.name in ("", ".."):
        raise UserError(f"--output {output}: names no files; give a prefix, for example data/train")
    read = {os.path.realpath(each.path): each.path for each in inputs}
    for prefix in outputs_of(output, valid_fraction):
        for suffix in (".bin", ".idx"):
            file = prefix.with_name(f"{prefix.name}{suffix}")
            if file.is_dir():
                raise UserError(f"--output {output}: {file} is a directory; choose another prefix")
            if (taken := read.get(os.path.realpath(file))) is not None:
                raise UserError(
                    f"--output {output}: would overwrite the input {taken}; choose another prefix"
                )
    if tokenizer == BYTES and tokenizer_of(output).exists() and not tokenizer_of(output).is_dir():
        raise UserError(
            f"--output {output}: {tokenizer_of(output)} is in the way; move it, or choose another prefix"
        )
    check_writable(output.parent)
