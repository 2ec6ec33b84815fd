"""The same rows are the same documents, whatever the file is called and however it is packed; the rest is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from elastic_megatron.data import documents, inputs, json_lines, unpack
from elastic_megatron.data.documents import Tally, read_documents
from elastic_megatron.data.inputs import Reading, look_into
from elastic_megatron.errors import UserError
from elastic_megatron.files.lock import beside, locked

TEXTS = [f"Sentence number {i}." for i in range(6)]
ROWS = "".join(
    json.dumps({"id": i, "body": text, "text": text.upper()}) + "\n" for i, text in enumerate(TEXTS)
)
# as the program zstd writes it
ZSTD = ZstdCompressor(write_checksum=True)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda raw: ZSTD.compress(raw),
    ".frames.zst": lambda raw: ZSTD.compress(raw[:40]) + ZSTD.compress(raw[40:]),
    ".members.gz": lambda raw: gzip.compress(raw[:40]) + gzip.compress(raw[40:]),
    ".streams.xz": lambda raw: lzma.compress(raw[:40]) + lzma.compress(raw[40:]),
}  # fmt: skip


def texts(paths: list[Path], **reading: Any) -> list[str]:
    how = Reading(**reading)
    return [document.text for document in read_documents(look_into(paths, how), how, None, Tally())]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.jsonl.part-00", "rows", "rows.txt"]
)
def test_rows_are_rows_under_any_name(tmp_path: Path, name: str) -> None:
    """Told by a key, by a name, or by content alone; with any packing, byte order mark and line ends."""
    for suffix, pack in PACK.items():
        for raw in (ROWS.encode(), ROWS.encode("utf-8-sig"), ROWS.replace("\n", "\r\n").encode()):
            (path := tmp_path / f"{name}{suffix}").write_bytes(pack(raw))
            assert texts([path], json_key="body") == TEXTS
            assert texts([path]) == [text.upper() for text in TEXTS]


def test_text_stays_text(tmp_path: Path) -> None:
    """A few lines of JSON in a text, or a name, make no rows of it; ``as_text`` takes anything."""
    told = 'Write rows like this:\n{"text": "x"}\n[1] a note\nand so on.\n'
    (tmp_path / "a.md").write_text(told, encoding="utf-8-sig")
    (tmp_path / "rows").write_text(ROWS)
    (tmp_path / "list.txt").write_text("[" + ROWS.replace("\n", ",\n  ")[:-4] + "]")
    assert texts([tmp_path / "a.md"]) == [told]
    assert texts([tmp_path / "rows"], as_text=True) == [ROWS]
    (tmp_path / "half").write_text("# of a log\n" + ROWS.splitlines()[0])
    (tmp_path / "told.JSONL.part-0").write_text("no rows\n")
    for name in ("half", "told.JSONL.part-0"):
        with pytest.raises(UserError, match=f"{name}:1: not JSON"):
            texts([tmp_path / name])
    (tmp_path / "pretty").write_text(json.dumps([{"text": "x"}], indent=1))
    with pytest.raises(UserError, match="pretty is one JSON value over several lines.*jq.*--as-text"):
        texts([tmp_path / "pretty"])
    with pytest.raises(UserError, match=r"list\.txt:1: not JSON.*jq -c.*--as-text"):
        texts([tmp_path / "list.txt"])
    with pytest.raises(UserError, match="exclude each other"):
        texts([tmp_path / "rows"], as_text=True, json_key="text")


@settings(max_examples=60, deadline=None)
@given(
    suffix=st.sampled_from([s for s in PACK if s]), cut=st.floats(0, 1), flip=st.none() | st.integers(0, 7)
)
def test_damaged_archives_are_never_shorter_data(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, cut: float, flip: int | None
) -> None:
    """Cut short, followed by something else, or with one bit changed: the same rows, or refused by the file's name."""
    whole = PACK[suffix](ROWS.encode())
    at = min(int(cut * len(whole)), len(whole) - 1)
    if suffix == ".members.gz" and whole[:at] == gzip.compress(ROWS.encode()[:40]):
        at += 1  # an archive of one member is whole
    damaged = bytearray(whole[:at] if flip is None else whole)
    if flip is not None:
        damaged[at] ^= 1 << flip
    for content in (bytes(damaged), whole + b"rows and more rows"):
        (path := tmp_path_factory.mktemp("d") / f"rows.jsonl{suffix}").write_bytes(content)
        try:
            found = texts([path], json_key="body")
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            # an empty file holds nothing; bits of gzip's header say nothing of the content
            assert found == (TEXTS if content else [])


def test_bad_lines_are_left_out_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are all there, and each that is not is counted under its reason with the first place."""
    monkeypatch.setattr(documents, "LINE_LIMIT", 5000)
    monkeypatch.setattr(json_lines, "LINE_LIMIT", 5000)
    bad = {
        b"{oops": "not JSON", b'{"text": "\xff"}': "not UTF-8", b"[1]": "no object", b'{"t": 1}': "no key",
        b'{"text": null}': "no string", b'{"text": "\\udfff"}': "half of a surrogate pair",
        b'{"text": "a", "text": "b"}': "repeated key", b" ": "blank line", b'{"text": ""}': "empty text",
        b'{"text": "' + b"x" * 12_000 + b'"}': "too long",
        b'{"m":' + b"[" * 2000 + b"]" * 2000 + b"}": "nested too deeply", b'{"text": "b"}\0\0': "not JSON",
    }  # fmt: skip
    good = [b'{"text": "a", "n": ' + b"7" * 4400 + b"}", b'{"text": "b\\u0000\\u2028", "x": NaN, "y": 1e999}']
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good[0], *bad, *bad, good[1]]))
    tally, how = Tally(), Reading(skip_bad_lines=True)
    found = [d.text for d in read_documents(look_into([path], how), how, None, tally)]
    assert found == ["a", "b\0\u2028"]
    reasons = list(bad.values())
    assert {r: left.count for r, left in tally.left.items()} == {r: 2 * reasons.count(r) for r in reasons}
    assert {r: left.first for r, left in tally.left.items()} == {
        r: f"{path}:{2 + reasons.index(r)}" for r in reasons
    }


def test_pipes_are_read_once_and_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process substitution gives is an input; a FIFO without a writer, a device or a folder is refused."""
    monkeypatch.setattr(inputs, "WRITER_SECONDS", 0.2)
    for suffix, pack in PACK.items():
        fifo = tmp_path / f"fifo{suffix}"
        os.mkfifo(fifo)
        with pytest.raises(UserError, match="a pipe that nobody writes to"):
            look_into([fifo], Reading())
        writer = threading.Thread(target=fifo.write_bytes, args=[pack(ROWS.encode())])
        writer.start()
        assert texts([fifo], json_key="body") == TEXTS
        writer.join(10)
    for path, said in ((Path("/dev/zero"), "is a device"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=said):
            look_into([path], Reading())
    os.link(tmp_path / "fifo", tmp_path / "again")
    writer = os.open(tmp_path / "fifo", os.O_RDWR)
    os.write(writer, ROWS.encode() * 10)
    with pytest.raises(UserError, match="given twice"):
        monkeypatch.setattr(inputs, "_HEAD", 16)
        look_into([tmp_path / "fifo", tmp_path / "again"], Reading())
    os.close(writer)


def test_what_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives and binary formats, UTF-16, an archive within an archive; zstd where its package is missing."""
    contents = {first + b"\x00 and more": what for first, (what, _) in unpack._NO_TEXT.items()}
    contents |= {
        b"a line\nb\0\n": ":2: holds a NUL byte", gzip.compress(b"\0" * 100): "holds a NUL byte",
        gzip.compress(gzip.compress(b"text")): "gzip archive inside a gzip one",
        "\ufeffa text".encode("utf-16-le"): "UTF-16", gzip.compress(b"PAR1....."): "a Parquet file",
    }  # fmt: skip
    contents[b"\x28\xb5\x2f\xfd rest"] = "needs the package zstandard"
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for content, said in contents.items():
        (path := tmp_path / "rows.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"rows.txt.*{said}"):
            look_into([path], Reading())


def test_bombs_are_refused_before_they_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in an archive, and a line, have bounds; so has what unpacking itself takes."""
    monkeypatch.setattr(documents, "_BOMB_BYTES", 1 << 20)
    (path := tmp_path / "text.gz").write_bytes(gzip.compress(b"a" * (3 << 20)))
    with pytest.raises(UserError, match="text.gz: unpacks to more than 100 times its size"):
        texts([path])
    monkeypatch.setattr(documents, "TEXT_LIMIT", 1 << 20)
    (path := tmp_path / "text.txt").write_bytes(b"a" * (1 << 21))
    with pytest.raises(UserError, match="too much for one document"):
        texts([path])
    wide = lzma.compress(ROWS.encode(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])
    (path := tmp_path / "rows.xz").write_bytes(wide)
    with pytest.raises(UserError, match="rows.xz: the xz archive"):
        texts([path])


def test_an_input_that_changes_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Between the first look and the last byte; nothing is written then."""
    from elastic_megatron.data.prepare import Job, run

    (path := tmp_path / "rows.jsonl").write_text(ROWS)
    found = look_into([path], Reading())
    with path.open("a") as file:
        file.write(ROWS)
    with pytest.raises(UserError, match="rows.jsonl changed while it was read"):
        run(found, Job(tmp_path / "new" / "out", tokenizer_dir))
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]
    found = look_into([path], Reading())
    with pytest.raises(UserError, match="changed while it was read"):
        for _ in read_documents(found, Reading(), None, Tally()):
            os.utime(path, (1, 1))


def test_a_data_set_has_one_writer_and_no_input_is_overwritten(tmp_path: Path) -> None:
    from elastic_megatron.data.prepare import Job, prepare, run

    (path := tmp_path / "rows.bin").write_text(ROWS)
    how = Reading(json_key="body")
    with pytest.raises(UserError, match=r"would overwrite the input .*rows\.bin"):
        run(look_into([path], how), Job(tmp_path / "rows", "bytes", how))
    with locked(beside(tmp_path / "out_valid"), "another command"):
        with pytest.raises(UserError, match="is held by another command"):
            run(look_into([path], how), Job(tmp_path / "out", "bytes", how, valid_fraction=0.5))
        prepare([path], tmp_path / "out", "bytes", json_key="body")
    assert {each.name for each in tmp_path.iterdir()} == {"rows.bin", "out.bin", "out.idx", "out_tokenizer"}
    (tmp_path / "out_tokenizer" / "note").write_text("of an earlier run")
    prepare([path], tmp_path / "out", "bytes", json_key="body")
    assert not (tmp_path / "out_tokenizer" / "note").exists()
