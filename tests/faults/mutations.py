"""Ways in which a file is damaged, or made by somebody who means harm: any bytes, JSON, YAML and what is no file.

A mutation takes a path and a generator, changes the file, and says what it did. ``MARK`` in a payload is the path of a
file whose appearance proves that code ran.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], str]
MARK = "$FAULTS_MARK"  # the shell puts it in
COMMAND = f"touch {MARK}"

_NUMBERS = (
    0,
    -1,
    1,
    3,
    7,
    2**31,
    2**62,
    2**64 + 1,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    1e-308,
    float("inf"),
    float("nan"),
)
_TEXTS = (
    "", " ", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "a\0b", "\u202e\u0000", "\ud800", "NaN",
    "model.safetensors/../../hf/model.safetensors", "$(id)", "${HOME}", "%s%n", "-rf", "\n", "1e9", "¹²", "__class__",
)  # fmt: skip
_DIGITS = re.compile(rb"\d+")


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes()) or bytearray(b"x")
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bit flipped in byte {at}"


def overwrite(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 64, 1000))
    data[at : at + size] = rng.randbytes(min(size, max(1, len(data) - at)))
    path.write_bytes(data)
    return f"{size} random bytes at {at}"


def cut(path: Path, rng: random.Random) -> str:
    size = path.stat().st_size
    kept = rng.choice((0, 1, 7, 8, size // 2, max(0, size - 1), rng.randrange(size + 1)))
    os.truncate(path, kept)
    return f"cut to {kept} of {size} bytes"


def grow(path: Path, rng: random.Random) -> str:
    extra = rng.choice((b"\0", b"\n", b"}", b"x" * 4096, path.read_bytes()))
    with path.open("ab") as f:
        f.write(extra)
    return f"{len(extra)} bytes appended"


def blank(path: Path, rng: random.Random) -> str:
    """What a crash of the machine leaves: the size, without the bytes."""
    data = bytearray(path.read_bytes())
    at = rng.choice((0, len(data) // 2, max(0, len(data) - 512)))
    data[at:] = bytes(len(data) - at)
    path.write_bytes(data)
    return f"zeros from byte {at}"


def digits(path: Path, rng: random.Random) -> str:
    """One number of a text becomes another."""
    data = path.read_bytes()
    found = list(_DIGITS.finditer(data))
    if not found:
        return cut(path, rng)
    match, number = (
        rng.choice(found),
        rng.choice((b"0", b"-1", b"1e400", b"9" * 25, b"9" * 5000, b"0x10", b"1_0", b"4097")),
    )
    path.write_bytes(data[: match.start()] + number + data[match.end() :])
    return f"{match[0][:20].decode()} at {match.start()} became {number[:20].decode()}"


def other_kind(path: Path, rng: random.Random) -> str:
    """A folder, a pipe, a socket, a link to what never ends or to itself, or nothing."""
    kind = rng.choice(("folder", "pipe", "socket", "zeros", "loop", "nothing", "secret", "sparse"))
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            _socket(path)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "secret":
            path.symlink_to("/etc/passwd")
        case "sparse":
            path.touch()
            os.truncate(path, 1 << 36)
    return f"is {kind}"


def _socket(path: Path) -> None:
    short = Path("/tmp") / f"faults-{os.getpid()}-{path.parent.name}"  # a socket's name has 108 bytes at most
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(short))
    shutil.move(short, path)


def hostile(rng: random.Random) -> Any:
    """A JSON value that stands where another is expected."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind < 5:
        return rng.choice(_TEXTS)
    small: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 100_000)
    return rng.choice((*small, {"a": {"b": [1, {"c": None}]}}, [1, "x", None], [-1, 2**40]))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place below a JSON value, and its own."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [at, *(place for key, inner in entries for place in places(inner, (*at, key)))]


def changed(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON value with one place dropped, renamed, replaced or wrapped. A place near the top is as likely as all below."""
    found = places(value)
    depth = rng.randrange(max(map(len, found)) + 1)
    place = rng.choice([p for p in found if len(p) == depth] or found)
    if not place:
        return hostile(rng), "the whole replaced"
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    key, how = place[-1], rng.randrange(6)
    words = "/".join(map(str, place))[:80]
    if how == 0:
        del holder[key]
        return value, f"{words} dropped"
    if how == 1 and isinstance(holder, dict):
        name = rng.choice((*_TEXTS, str(key) + "x"))
        holder[name] = holder.pop(key)
        return value, f"{words} renamed to {name[:20]!r}"
    if how == 2:
        holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
        return value, f"{words} wrapped"
    if how == 3 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 2, 1000)) + rng.choice((0, 1))
        return value, f"{words} is now {holder[key]}"[:120]
    holder[key] = hostile(rng)
    return value, f"{words} is now {str(holder[key])[:30]}"


def json_value(path: Path, rng: random.Random) -> str:
    value, words = changed(json.loads(path.read_bytes()), rng)
    path.write_bytes(dumped(value))
    return words


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def json_text(path: Path, rng: random.Random) -> str:
    """What stands in no value: nesting, names given twice, other encodings, numbers beyond all bounds."""
    text = path.read_text()
    words, new = rng.choice(
        (
            ("nested 100,000 deep", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
            ("nested objects", '{"a":' * 5000 + "1" + "}" * 5000),
            ("deep value", text.rstrip().removesuffix("}") + ',"deep":' + "[" * 900 + "]" * 900 + "}"),
            ("given twice", text.rstrip().removesuffix("}") + "," + text.lstrip().removeprefix("{")),
            ("UTF-16", text.encode("utf-16").decode("latin-1")),
            ("BOM", "\ufeff" + text),
            ("long integer", text.rstrip().removesuffix("}") + ',"n":' + "9" * 100_000 + "}"),
            ("17 MiB", text + " " * (17 << 20)),
            ("comment", "// no JSON\n" + text),
            ("empty", ""),
        )
    )
    path.write_text(new, encoding="utf-8")
    return words


def json_line(path: Path, rng: random.Random) -> str:
    """One line of JSON lines."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    value, words = changed(json.loads(lines[at]), rng)
    lines[at] = dumped(value).decode()
    path.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}: {words}"


def yaml_text(path: Path, rng: random.Random) -> str:
    """Tags that construct, aliases that multiply, bases that go in circles, depth, and values out of place."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    head, colon, _ = lines[at].partition(":")
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    whole = {
        "alias bomb": [*bomb, *lines],
        "constructor": [f"x: !!python/object/apply:os.system ['{COMMAND}']", *lines],
        "module": ["x: !!python/module:os", *lines],
        "base is itself": [f"extends: {path.name}", *lines],
        "base is endless": ["extends: /dev/zero", *lines],
        "base is a secret": ["extends: /etc/passwd", *lines],
        "merge of itself": ["x: &x {<<: *x}", *lines],
        "nested": ["x: " + "[" * 3000 + "]" * 3000, *lines],
        "tabs": [f"\t{line}" for line in lines],
        "two documents": [*lines, "---", *lines],
        "long key": ["? " + "k" * 200_000, ": 1", *lines],
        "dropped": lines[:at] + lines[at + 1 :],
        "twice": [*lines, lines[at]],
    }
    name = rng.choice((*whole, *["value"] * 8))
    if name == "value":
        value = rng.choice(
            (
                *map(str, _NUMBERS),
                *(json.dumps(t) for t in _TEXTS),
                "[]",
                "{}",
                "null",
                "*a",
                "!!binary x",
                "60:60:60",
                "|",
            )
        )
        lines[at] = f"{head}: {value}" if colon else value
        path.write_text("\n".join(lines) + "\n", errors="replace")
        return f"{head.strip()[:40]} is now {value[:30]}"
    path.write_text("\n".join(whole[name]) + "\n")
    return name


NOISE: tuple[Mutation, ...] = (flip, overwrite, cut, grow, blank)
JSON: tuple[Mutation, ...] = (*[json_value] * 8, json_text, json_text, digits, flip, cut, blank, other_kind)
LINES: tuple[Mutation, ...] = (*[json_line] * 6, digits, *NOISE, other_kind)
YAML: tuple[Mutation, ...] = (*[yaml_text] * 10, digits, flip, cut, other_kind)
TEXT: tuple[Mutation, ...] = (*[digits] * 4, *NOISE, other_kind)
