"""What goes with the weights of a Hugging Face directory: tokenizer, templates, licences, and the code it names.

Code that ``auto_map`` of ``config.json`` does not name is not taken along: loaders would not run it, and nobody asked
for it. Links may not lead out of the directory (``files.reading.contained``), or an export would publish what they
lead to.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_files import parse, plain_numbers, write_object
from ..files.reading import inside, open_regular

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
# weights, and what an export writes itself
_WRITTEN = re.compile(
    r"\..*|.*\.safetensors|model\.safetensors\.index\.json|config\.json|elastic_config\.json|hf_quant_config\.json"
    r"|README\.md"
)
# a tokenizer may also have them as words
_NO_JSON = (b"Infinity", b"NaN", b"__float__")
# a module of the directory; "owner/name--module.Class" is code of a repository of the hub
_LOCAL = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)


def side_files(directory: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the files that an export takes along, sorted; some lie in a folder of the directory.

    Args:
        config: the model's ``config.json``, whose ``auto_map`` names code.

    Raises ``UserError`` where one is a link out of the directory or to nothing, or no ordinary file.
    """
    code = {f"{module}.py" for module in code_modules(config)}
    found = {path for pattern in (*_PATTERNS, *code) for path in directory.glob(pattern) if not path.is_dir()}
    # "tokenizer*" is also the name of code that nobody names
    names = sorted(
        str(path.relative_to(directory)) for path in found if path.suffix != ".py" or path.name in code
    )
    for name in names:
        try:
            open_regular(inside(directory, name, directory)).close()
        except OSError as e:
            raise UserError(
                f"{directory / name} cannot be read ({e.strerror}); copy it again, or remove it"
            ) from None
    return tuple(names)


def copy_side_files(directory: Path, config: Mapping[str, Any], destination: Path) -> tuple[str, ...]:
    """Copy them into a folder, which is made; returns their names. Raises ``UserError`` as ``side_files``."""
    names = side_files(directory, config)
    destination.mkdir(exist_ok=True)  # without its parents: who removed those wants them gone
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(directory / name, destination / name)
        if name.endswith(".json"):
            _make_strict(destination / name)
    return names


def _make_strict(file: Path) -> None:
    """Write numbers that JSON lacks, as in a ``generation_config.json`` of older programs, as it has them."""
    text = file.read_bytes()
    if any(word in text for word in _NO_JSON):
        with suppress(ValueError):  # what is no JSON at all is no business of ours
            data = parse(text)
            if (plain := plain_numbers(data)) != data:
                write_object(file, plain, indent=2)


def left_behind(directory: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what lies in a directory and is neither weights nor configuration nor taken along, sorted."""
    taken = {name.split(os.sep)[0] for name in side_files(directory, config)}
    return tuple(sorted(n for n in os.listdir(directory) if n not in taken and not _WRITTEN.fullmatch(n)))


def own_code(config: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """The entries of ``auto_map`` whose code lies in some of these files, all of it."""
    named = config.get("auto_map")
    found = {}
    for kind, value in named.items() if isinstance(named, dict) else ():
        texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
        modules = [_LOCAL.fullmatch(text) if isinstance(text, str) else None for text in texts]
        if modules and all(m is not None and f"{m[1]}.py" in files for m in modules):
            found[kind] = value
    return found


def code_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that ``auto_map`` names and that lie in the directory itself, sorted."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, dict) else ()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    matches = [_LOCAL.fullmatch(text) for text in texts if isinstance(text, str)]
    return tuple(sorted({match[1] for match in matches if match}))
