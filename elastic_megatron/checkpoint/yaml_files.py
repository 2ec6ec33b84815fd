"""YAML that other programs wrote, read as plain values: of bounded size, depth and cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..files.reading import read_text

_SIZE, _DEPTH = 1 << 20, 64
# YAML 1.1 reads 1:1:1:… as a number of base 60, in time that grows with the square of its length
_LONG_NUMBER = re.compile(r"[-+\w.:]{256,}")
_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(file: Path) -> Any:
    """The document in a file. What aliases repeat is one object, so it may look larger than memory.

    Raises ``OSError``, ``UserError`` for what is no file or too large, ``UnicodeDecodeError``, ``yaml.YAMLError``, and
    ``ValueError`` for what no program writes: deep nesting, merged mappings, endless numbers.
    """
    text, depth = read_text(file, _SIZE), 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(event, yaml.ScalarEvent) and not event.style:
            if event.value == "<<":
                raise ValueError("it merges mappings")
            if _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"{event.value[:20]}… is too long for a number")
    return yaml.load(text, Loader=_Loader)
