"""Damage with the knowledge of a binary format: safetensors, pickles and torch's archives, token indices, arrays."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

from mutations import COMMAND, NOISE, Mutation, changed, dumped, other_kind

# call os.system, drop its result, go on; as protocols 0 and 4 write it
_CALLS = (
    f"cos\nsystem\n(S'{COMMAND}'\ntR0".encode(),
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(COMMAND)]) + COMMAND.encode() + b"\x85R0",
    f"cbuiltins\nexec\n(S'import os; os.system(\"{COMMAND}\")'\ntR0".encode(),
    f"ccollections\nOrderedDict\n(tRcos\nsystem\n(S'{COMMAND}'\ntR00".encode(),
)
_BOMBS = (
    b"\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINBYTES8 of 8 EiB
    b"(" * 100_000,
    b"(l" + b"(l" * 100_000,
    b"cbuiltins\nbytearray\n(L99999999999L\ntR0",
    b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'system'\ntR0",
    b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR0",
    b"ctorch.serialization\nload\n(S'/dev/zero'\ntR0",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR0",
    b"Pmodule.persistent\n0",
    b"\x80\xff",
)


def safetensors_header(path: Path, rng: random.Random) -> str:
    """Offsets, shapes, dtypes and names that the library refuses, or must read alike."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry, words = header[name], rng.choice(
        ("any", "any", "any", "offset", "shape", "dtype", "swap", "twice", "length", "trailing", "gap", "deep")
    )  # fmt: skip
    first, last = entry["data_offsets"]
    if words == "any":
        header, words = changed(header, rng)
    elif words == "offset":
        entry["data_offsets"] = rng.choice(
            (
                [-8, last],
                [first, len(body) + 8],
                [last, first],
                [first + 1, last],
                [first, last - 4],
                [2**63, 2**64],
                [first + 0.5, last],
            )
        )
    elif words == "shape":
        entry["shape"] = rng.choice(
            ([-1], [2**40, 2**40], [0], [], [1.5], entry["shape"][::-1], [*entry["shape"], 1])
        )
    elif words == "dtype":
        entry["dtype"] = rng.choice(("F64", "I8", "BF16", "F16", "U32", "F8_E4M3", "C64", "nope", "", 7))
    elif words == "swap":
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        words = f"{name} and {other} swapped"
    elif words == "gap":
        body = body[: len(body) // 2] + bytes(64) + body[len(body) // 2 :]
    text = dumped(header)
    if words == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry})[1:].encode()
    elif words == "deep":
        text = text[:-1] + b',"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    length = rng.choice((2**63, 2**40, 0, 1, len(text) + len(body) + 1)) if words == "length" else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + body + (b"x" * 8 if words == "trailing" else b""))
    return f"header: {words}"[:120]


def pickle_code(path: Path, rng: random.Random) -> str:
    """A call before the real object, after it, or in place of it."""
    data, call = path.read_bytes(), rng.choice(_CALLS)
    at = rng.choice(("before", "after", "alone"))
    start = 2 if data[:1] == b"\x80" else 0
    if at == "before":
        new = (
            data[:start] + call.removeprefix(b"\x80\x04") + data[start:]
            if rng.random() < 0.5
            else call + data
        )
    else:
        new = (data[:-1] if at == "after" else b"") + call + b"N."
    path.write_bytes(new)
    return f"call {at} it: {call[:24]!r}"


def pickle_bomb(path: Path, rng: random.Random) -> str:
    data, bomb = path.read_bytes(), rng.choice(_BOMBS)
    at = rng.choice((0, 2, rng.randrange(len(data)), len(data) - 1))
    path.write_bytes(data[:at] + bomb + data[at:])
    return f"{bomb[:12]!r} at {at}"


def pickle_name(path: Path, rng: random.Random) -> str:
    """A class, an attribute or a file name becomes another of the same length."""
    data = path.read_bytes()
    old, new = rng.choice(
        (
            (b"torch.Size", b"os.environx"[:10]), (b"_StorageInfo", b"_StorageLoad"), (b"__0_0.distcp", b"../../x.disc"),
            (b"Metadata", b"eval\0\0\0\0"), (b"offset", b"length"), (b"torch.distributed", b"os.path.distribut"),
            (b"size", b"SIZE"), (b"module", b"posix\0"), (b"builtins", b"subproce"), (b"float32", b"float64"),
        )
    )  # fmt: skip
    where = [i for i in range(len(data)) if data.startswith(old, i)]
    if not where:
        return pickle_bomb(path, rng)
    at = rng.choice(where)
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return f"{old!r} became {new!r}"


def archive_code(path: Path, rng: random.Random) -> str:
    """The pickle inside torch's archives, in place: everything else keeps its offset."""
    data = bytearray(path.read_bytes())
    members = list(_members(bytes(data), b"data.pkl"))
    if not members:
        return NOISE[0](path, rng)
    at, size = rng.choice(members)
    payload = rng.choice([c + b"N." for c in _CALLS] + [b + b"." for b in _BOMBS if len(b) < 100])[:size]
    data[at : at + len(payload)] = payload
    path.write_bytes(data)
    return f"data.pkl at {at} begins with {payload[:24]!r}"


def _members(data: bytes, name: bytes) -> Any:
    """(offset, size) of members stored under a name, by their local headers."""
    at = data.find(b"PK\x03\x04")
    while at >= 0 and at + 30 <= len(data):
        name_size, extra = struct.unpack_from("<HH", data, at + 26)
        if data[at + 30 : at + 30 + name_size].endswith(name):
            start = at + 30 + name_size + extra
            end = data.find(b".PK", start)
            yield start, max(0, (end if end >= 0 else len(data)) + 1 - start)
        at = data.find(b"PK\x03\x04", at + 4)


def archive_member(path: Path, rng: random.Random) -> str:
    """A whole archive (``common.pt``) written again, with one member changed; its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    name = rng.choice([n for n in members if n.endswith("data.pkl")] * 4 + list(members))
    file = path.with_name("member")
    file.write_bytes(members[name] or b"x")
    words = rng.choice(
        (pickle_code, pickle_code, pickle_bomb, pickle_name, *NOISE) if name.endswith("pkl") else NOISE
    )(file, rng)
    members[name] = file.read_bytes()
    file.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for member, content in members.items():
            new.writestr(member, content)
    return f"{name}: {words}"


def token_index(path: Path, rng: random.Random) -> str:
    """Fields of a ``.idx``: type, counts, lengths and places that do not fit the ``.bin``."""
    data = bytearray(path.read_bytes())
    offset, kind = rng.choice(
        (
            (9, "<Q"),
            (17, "<B"),
            (18, "<Q"),
            (26, "<Q"),
            (34, "<i"),
            (38, "<i"),
            (len(data) - 8, "<q"),
            (len(data) // 2, "<q"),
        )
    )
    limit = {
        "<Q": (0, 1, 2**62, 2**64 - 1),
        "<B": (0, 1, 4, 99, 255),
        "<i": (-1, 0, 2**31 - 1, 7),
        "<q": (-1, 2**62, 5, 0),
    }[kind]
    value = rng.choice(limit)
    struct.pack_into(kind, data, offset, value)
    path.write_bytes(data)
    return f"{value} at byte {offset}"


def array_header(path: Path, rng: random.Random) -> str:
    """The header of a ``.npy``: object arrays (a pickle), sizes beyond the file, other types."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size].decode(), data[10 + size :]
    kind = rng.choice(("object", "huge", "type", "order", "text"))
    if kind == "object":
        header, body = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", rng.choice(_CALLS) + b"N."
    elif kind == "huge":
        header = "{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }"
    elif kind == "type":
        header = header.replace("<i4", "<f8").replace("<i8", "<i2")
    elif kind == "order":
        header = header.replace("False", "True")
    else:
        header = "{'descr': __import__('os').system('" + COMMAND + "')}"
    text = header.strip().ljust(size - 1).encode() + b"\n"
    path.write_bytes(data[:8] + len(text).to_bytes(2, "little") + text + body)
    return f"header: {kind}"


SAFETENSORS: tuple[Mutation, ...] = (*[safetensors_header] * 8, *NOISE, other_kind)
PICKLE: tuple[Mutation, ...] = (
    *[pickle_code] * 4,
    *[pickle_bomb] * 3,
    *[pickle_name] * 3,
    *NOISE,
    other_kind,
)
SHARDS: tuple[Mutation, ...] = (*[archive_code] * 6, *NOISE, other_kind)
ARCHIVE: tuple[Mutation, ...] = (*[archive_member] * 8, *NOISE, other_kind)
INDEX: tuple[Mutation, ...] = (*[token_index] * 6, *NOISE, other_kind)
ARRAY: tuple[Mutation, ...] = (*[array_header] * 4, *NOISE, other_kind)
