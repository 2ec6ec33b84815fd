"""Records are found again byte by byte, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.data.record_files import KEY_BYTES, SUFFIX, Records, listing


def key(n: int) -> bytes:
    return n.to_bytes(KEY_BYTES, "little")


def written(folder: Path, *payloads: bytes) -> None:
    """Payload n under key n."""
    records = Records(folder, {})
    for n, payload in enumerate(payloads):
        records.append(key(n), [np.frombuffer(payload, np.uint8)])


def read(folder: Path, n: int, size: int) -> bytes | None:
    found = Records(folder, listing(folder)).get(key(n), size)
    return None if found is None else found.tobytes()


@settings(max_examples=50)
@given(st.lists(st.binary(min_size=0, max_size=70), max_size=8))
def test_what_was_written_is_read(payloads: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        written(Path(name), *payloads)
        for n, payload in enumerate(payloads):
            assert read(Path(name), n, len(payload)) == payload
            assert read(Path(name), n, len(payload) + 1) is None
        assert read(Path(name), len(payloads), 4) is None


def test_parts_of_any_type_follow_each_other(tmp_path: Path) -> None:
    records = Records(tmp_path, {})
    parts = [np.arange(6, dtype=np.int32).reshape(2, 3).T, np.ones(5, np.float16)]
    records.append(key(1), parts)
    assert read(tmp_path, 1, 34) == b"".join(part.tobytes() for part in parts)


def test_new_records_are_for_those_who_list_later(tmp_path: Path) -> None:
    """Those who look from now on, and another writer at the same time has a file of its own."""
    one, other = (Records(tmp_path, listing(tmp_path)) for _ in range(2))
    for records in (one, other):
        records.append(key(1), [np.zeros(8, np.uint8)])
        records.append(key(1), [np.zeros(8, np.uint8)])
        assert records.get(key(1), 8) is None and (key(1), 8) not in records
    found = listing(tmp_path)
    assert sorted(len(keys) // KEY_BYTES for _, keys in found.values()) == [1, 1]
    later = Records(tmp_path, found)
    assert (key(1), 8) in later and later.get(key(1), 8) is not None


@pytest.mark.parametrize("size", [1, 31, 32, 100])
def test_a_file_that_ends_anywhere_has_the_records_before(tmp_path: Path, size: int) -> None:
    payloads = [bytes([n]) * size for n in range(3)]
    written(tmp_path, *payloads)
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    whole = path.read_bytes()
    record = (len(whole) - 32) // 3
    for end in {*range(0, len(whole), 7), 31, 32, 32 + record, len(whole) - 1}:
        cut = tmp_path / f"cut{end}"
        cut.mkdir()
        (cut / path.name).write_bytes(whole[:end])
        complete = max(0, end - 32) // record
        for n, payload in enumerate(payloads):
            assert read(cut, n, size) == (payload if n < complete else None)


def test_any_changed_byte_of_a_record_hides_it_and_no_other(tmp_path: Path) -> None:
    payloads = [bytes([n]) * 20 for n in range(3)]
    written(tmp_path, *payloads)
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    whole = path.read_bytes()
    record = (len(whole) - 32) // 3
    for at in (*range(20), *range(32, 52)):  # key and check, and the payload
        broken = tmp_path / f"broken{at}"
        broken.mkdir()
        place = 32 + record + at
        (broken / path.name).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert read(broken, 1, 20) is None
        assert read(broken, 1 ^ 4, 20) is None, "a key that was damaged is no other's"
        assert [read(broken, n, 20) for n in (0, 2)] == [payloads[0], payloads[2]]


def test_a_record_written_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    written(tmp_path, b"abcd")
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    path.write_bytes(path.read_bytes()[:-30].ljust(path.stat().st_size, b"\0"))
    assert read(tmp_path, 0, 4) is None
    written(tmp_path, b"abcd")
    assert read(tmp_path, 0, 4) == b"abcd"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / f"short{SUFFIX}").write_bytes(b"EM")
    (tmp_path / f"other{SUFFIX}").write_bytes(b"x" * 300)
    (tmp_path / "teacher.json").write_text("{}")
    assert listing(tmp_path) == {}


def test_a_file_that_is_gone_has_no_records(tmp_path: Path) -> None:
    written(tmp_path, b"abcd")
    found = listing(tmp_path)
    next(tmp_path.glob(f"*{SUFFIX}")).unlink()
    assert Records(tmp_path, found).get(key(0), 4) is None
