"""Our row reader and the safetensors library: they refuse the same files, and read the others alike."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize

from elastic_megatron.checkpoint.raw import as_bytes
from elastic_megatron.checkpoint.safetensors_files import DTYPES, SafetensorsFiles
from elastic_megatron.errors import UserError

BITS = {"F32": 32, "BF16": 16, "F64": 64, "I64": 64, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "U16": 16, "C64": 64,
        "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6}  # fmt: skip
ODD: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 8, 1.0, 2.5, True, False, None, "", "F32", "8", "f32", "Q8", [], {}, [0], [0, 8], [8, 0], [0, 0],
    [0, 2**64], [2**63, 2**63], [1, 2, 3], [-4, 4], [0.0, 8.0], [True, 8], 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30,
    float("nan"), float("inf"), [2**32, 2**32], [2**63, 2], [0, 2**63],
)  # fmt: skip


def _file(header: bytes, data: bytes, stated: int | None = None) -> bytes:
    return (len(header) if stated is None else stated).to_bytes(8, "little") + header + data


def _valid(draw: random.Random) -> tuple[dict[str, Any], bytes]:
    """A header in any order, with scalars, empty tensors, dtypes of less than a byte, and all its bytes."""
    header: dict[str, Any] = {}
    end = 0
    for number in range(draw.randint(0, 4)):
        dtype = draw.choice([*BITS])
        shape = [draw.choice((0, 1, 2, 3, 4)) for _ in range(draw.randint(0, 3))]
        if BITS[dtype] < 8:
            shape.append(4)
        size = BITS[dtype]
        for n in shape:
            size *= n
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size // 8]}
        end += size // 8
    if draw.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    entries = list(header.items())
    draw.shuffle(entries)
    return dict(entries), draw.randbytes(end)


def _mutated(draw: random.Random) -> bytes:
    header, data = _valid(draw)
    names = [n for n in header if n != "__metadata__"]
    match draw.randint(0, 11):
        case 0 if names:  # a value of another kind, or another number
            draw.choice([header[n] for n in names])[draw.choice(("dtype", "shape", "data_offsets"))] = (
                draw.choice(ODD)
            )
        case 1 if names:  # inside a list
            values = draw.choice([header[n] for n in names])[draw.choice(("shape", "data_offsets"))]
            if values:
                values[draw.randrange(len(values))] = draw.choice(ODD)
        case 2 if names:
            entry = draw.choice([header[n] for n in names])
            del entry[draw.choice([*entry])]
        case 3 if names:  # two tensors share bytes, or leave some to nobody
            offsets = header[draw.choice(names)]["data_offsets"]
            offsets[draw.randrange(2)] += draw.choice((-2, -1, 1, 2))
        case 4:
            data = (
                data[: -draw.randint(1, 9)]
                if draw.random() < 0.5
                else data + draw.randbytes(draw.randint(1, 9))
            )
        case 5:
            header["__metadata__"] = draw.choice(
                ({"a": 1}, {"a": None}, [], None, "x", {"a": {"b": "c"}}, {})
            )
        case 6 if names:
            header[draw.choice(names)] = draw.choice(ODD)
        case _:
            pass
    text = json.dumps(header, ensure_ascii=draw.random() < 0.5, separators=(",", ":"))
    match draw.randint(0, 11):
        case 0:
            text = draw.choice((" ", "\n", "\ufeff", "\t\t", "\0", "[", "/**/")) + text
        case 1:
            text += draw.choice((" ", "   \n", "\0", "}", "{}", "//", "\x0b"))
        case 2 if names:  # the same name twice, the same entry or another one
            text = f'{{"{names[0]}":{json.dumps(header[draw.choice(names)])},{text[1:]}'
        case 3:
            text = text.replace(
                '"t0"', draw.choice((r'"\u00e9"', '"é\U0001f600"', r'"\ud800"', '""', '"a\\u0000b"'))
            )
        case 4:
            text = text.replace(":", draw.choice((": ", " :", ":\t")))
    raw = text.encode("utf-8", "surrogatepass")
    match draw.randint(0, 9):
        case 0 if raw:  # any byte
            at = draw.randrange(len(raw))
            raw = raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
        case 1:
            return _file(
                raw, data, draw.choice((0, 1, len(raw) - 1, len(raw) + 1, 2**63, 2**64 - 1, 100_000_001))
            )
        case 2:
            whole = _file(raw, data)
            return whole[: draw.randrange(len(whole) + 1)]
    return _file(raw, data)


def _library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the library reads from the bytes; ``None`` where it refuses them."""
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {name: (e["dtype"], list(e["shape"]), bytes(e["data"])) for name, e in found}


def _corpus(count: int) -> Iterator[bytes]:
    draw = random.Random(7)
    return (_mutated(draw) for _ in range(count))


def test_the_reader_refuses_what_the_library_refuses_and_reads_the_rest_alike(tmp_path: Path) -> None:
    """For 4,000 files made from valid ones by mutation; dtypes that torch lacks are refused by the tensor's name."""
    file = tmp_path / "model.safetensors"
    counts = {"refused": 0, "read": 0, "named": 0}
    for content in _corpus(4000):
        file.write_bytes(content)
        theirs = _library(content)
        try:
            files = SafetensorsFiles([file])
        except UserError as e:
            if theirs is None:
                counts["refused"] += 1
                assert str(file) in str(e) and "\n" not in str(e), content
            else:
                odd = [name for name, (dtype, _, _) in theirs.items() if dtype not in DTYPES]
                assert any(f"tensor {name!r} has dtype" in str(e) for name in odd), (content, str(e))
                counts["named"] += 1
            continue
        assert theirs is not None, content
        counts["read"] += 1
        assert files.entries.keys() == theirs.keys(), content
        for name, (dtype, shape, data) in theirs.items():
            entry = files.entries[name]
            assert (DTYPES[dtype], tuple(shape)) == (entry.dtype, entry.shape), content
            out = torch.empty(entry.shape, dtype=entry.dtype)
            files.read(name, 0, out)
            assert bytes(as_bytes(out)) == data, content
            if shape and shape[0] > 1:  # the last row by itself
                row = torch.empty((1, *shape[1:]), dtype=entry.dtype)
                files.read(name, shape[0] - 1, row)
                assert bytes(as_bytes(row)) == data[len(data) - row.nbytes :], content
    assert min(counts.values()) > 200, counts


def test_what_is_no_ordinary_file_or_has_no_bounds_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    vast = tmp_path / "vast"
    with open(vast, "wb") as f:  # a header that would be a GiB of objects; the file has a hole instead
        f.write((90_000_000).to_bytes(8, "little") + b"{")
        f.truncate(100_000_000)
    for path, said in (
        (tmp_path / "fifo", "ordinary file"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "none", "No such file"),
        (vast, "header of 90000000 bytes"),
    ):
        with pytest.raises(UserError, match=said):
            SafetensorsFiles([path])
