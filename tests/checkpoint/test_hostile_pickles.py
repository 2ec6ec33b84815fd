"""Reading a ``torch_dist`` checkpoint never runs what is in it, and ends in one line whatever is in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import ATTACKS, put_metadata, put_object, put_tensor, saved
from saved_models import Student, student
from torch.distributed.checkpoint.metadata import Metadata
from torch_dist_by_hand import write_by_hand

from elastic_megatron.checkpoint import distributed, integrity
from elastic_megatron.checkpoint.common_state import DistState
from elastic_megatron.checkpoint.dist_check import check_folder
from elastic_megatron.checkpoint.dist_metadata import read_metadata
from elastic_megatron.checkpoint.foreign import foreign_manifest
from elastic_megatron.checkpoint.source import open_source, open_stored
from elastic_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron")

COMMON = "common_state/shard_0_1"
STATE = "decoder.layers.0.mixer.out_proj._extra_state/shard_0_1"
# where a pickle may lie, by what is put there
PLACES: dict[str, Callable[[Path, bytes], object]] = {
    ".metadata": put_metadata,
    "common state": lambda folder, prefix: put_object(folder, COMMON, saved([{"state": {}}], prefix)),
    "state of a module": lambda folder, prefix: put_object(folder, STATE, saved([None], prefix)),
    "pickle in the state of a module": lambda folder, prefix: put_object(
        folder, STATE, saved([torch.frombuffer(bytearray(prefix + pickle.dumps({})), dtype=torch.uint8)])
    ),
    "tensor": put_tensor,
    "common.pt": lambda folder, prefix: (folder / "common.pt").write_bytes(saved({"state": {}}, prefix)),
}


@pytest.fixture(scope="module")
def model() -> Student:
    return student(steps=1)


@pytest.fixture(scope="module")
def run(model: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    folder = distributed.save(
        root, 1, model.chunks, model.manifest, optimizer=model.optimizer, state={"step": 1}
    )
    (folder / integrity.FILE).unlink()  # whoever changes a file can write its digest, too
    return root


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """The iteration of a copy, which a test may damage."""
    shutil.copytree(run, tmp_path / "run")
    return next((tmp_path / "run").glob("iter_*"))


def entrances(root: Path, model: Student) -> dict[str, Callable[[], object]]:
    """What the commands open a checkpoint by."""
    folder = next(root.glob("iter_*"))
    return {
        "before torch reads": lambda: check_folder(folder),
        "export, slice": lambda: dict(open_stored(root).state()),
        "eval, generate, rank": lambda: open_source(root).fill(model.chunks),
        "resumed train, quantize": lambda: distributed.load(folder, model.chunks, optimizer=model.optimizer),
    }


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_run_where_python_reads_them(attack: str, tmp_path: Path) -> None:
    """Or what follows would show nothing."""
    assert pickle.loads(ATTACKS[attack](f"touch {tmp_path / 'ran'}") + pickle.dumps(7)) == 7
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_checkpoint_is_run_by_any_command(
    attack: str, place: str, folder: Path, model: Student, tmp_path: Path
) -> None:
    """A command that reads the place refuses it; exporting reads no objects."""
    marker = tmp_path / "ran"
    PLACES[place](folder, ATTACKS[attack](f"touch {marker}"))
    for entrance, call in entrances(folder.parent, model).items():
        if entrance == "export, slice" and place not in (".metadata", "tensor"):
            call()
        else:
            assert str(folder) in refused(call)
        assert not marker.exists(), entrance


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("legacy", [True, False], ids=["common.pt", "object"])
def test_nothing_in_the_arguments_of_a_foreign_checkpoint_is_run(
    attack: str, legacy: bool, tmp_path: Path
) -> None:
    marker, folder = tmp_path / "ran", tmp_path / "c"
    write_by_hand(folder, {"embedding.word_embeddings.weight": torch.ones(8, 2)})
    content = saved({"args": Namespace(hybrid_layer_pattern="M")}, ATTACKS[attack](f"touch {marker}"))
    if legacy:
        (folder / "common.pt").write_bytes(content)
    else:
        put_object(folder, COMMON, content)
    for read in (DistState(folder).common, lambda: foreign_manifest(folder, None)):
        if attack in ("by a function of torch", "by attributes of an allowed module"):
            with contextlib.suppress(UserError):  # left out, like any class of a package that is not known
                read()
        else:
            refused(read)
        assert not marker.exists()


# --- what takes all memory, or never ends ---

BOMBS: dict[str, bytes] = {
    "memo": b"\x80\x04Nr\x00\x00\x00\x80.",
    "memo, a little": b"\x80\x04Nr\xff\xff\xff\x0f.",
    "bytearray8": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "binbytes8": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
    "binunicode8": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b".",
    "long4": b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"\x01.",
    "long4 below zero": b"\x80\x02\x8b" + (1 << 31).to_bytes(4, "little") + b"\x01.",
    "frame": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 45).to_bytes(6, "little") + b"\x85R.",
    "range": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\n\x8a\x06"
    + (1 << 45).to_bytes(6, "little")
    + b"\x85R\x85R.",
    "key of 2^200 parts": b"\x80\x04})" + b"2\x86" * 200 + b"Ns.",
    "key of 2^200 parts, by memo": b"\x80\x04})\x94"
    + b"".join(b"h%c\x86\x94" % i for i in range(200))
    + b"Ns.",
    "nested tuples": b"\x80\x04N" + b"\x85" * 2_000_000 + b".",
    "nested lists": b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "marks": b"\x80\x04" + b"(" * 9_000_000 + b".",
    "dicts of something": b"\x80\x04" + b"}NNs" * 4_000_000 + b".",
    "size": b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 1_000_000 + b"t\x85R.",
    "longer than any": b"\x80\x04N" + b"N0" * 17_000_000 + b".",
    "no end": b"\x80\x04" + b"N0" * 100,
    "later protocol": b"\x80\x63N.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02Nq\x00Q.",
    "buffers": b"\x80\x05\x97.",
}
_READS = """
import json, sys
from pathlib import Path
from elastic_megatron.checkpoint.common_state import DistState
from elastic_megatron.checkpoint.dist_metadata import read_metadata
from elastic_megatron.errors import UserError
for folder in map(Path, sys.argv[1:]):
    told = []
    for read in (read_metadata, lambda f: DistState(f).common()):
        try:
            read(folder)
        except UserError as e:
            told.append(str(e))
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    print(json.dumps([folder.name, told, peak]), flush=True)
"""


def test_bombs_end_soon_and_below_a_gigabyte(tmp_path: Path) -> None:
    """In ``.metadata``, and as the arguments of a foreign checkpoint, where classes that are not known are left out."""
    for name, bomb in BOMBS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(bomb)
        if len(bomb) < 1 << 20:
            (tmp_path / name / "common.pt").write_bytes(saved(7, bomb.removesuffix(b".") + b"0"))
    ran = subprocess.run(
        [sys.executable, "-c", _READS, *(str(tmp_path / name) for name in BOMBS)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(BOMBS)
    for name, told, peak in lines:
        assert told and all("\n" not in line and len(line) < 1000 for line in told), (name, told)
        assert peak < 1 << 20, (name, peak)


# --- what is let through is what torch reads ---


def _zipped(records: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", how) as target:
        target.comment = comment
        for name, data in records:
            target.writestr(name, data)
    return out.getvalue()


PICKLE = ("c/data.pkl", pickle.dumps({"state": {}}, 2))
OTHER = ("c/data.pkl", pickle.dumps({"state": 7}, 2))
ARCHIVES = {
    "the same record twice": _zipped([PICKLE, OTHER]),
    "the same record in other letters": _zipped([PICKLE, ("c/DATA.PKL", OTHER[1])]),
    "the same record in two folders": _zipped([PICKLE, ("d/data.pkl", OTHER[1])]),
    "code of TorchScript": _zipped([PICKLE, ("c/constants.pkl", OTHER[1])]),
    "compressed": _zipped([PICKLE], zipfile.ZIP_DEFLATED),
    "said to be compressed": _zipped([PICKLE]).replace(
        b"PK\1\2\x14\3\x14\0\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x08\0"
    ),
    "a comment": _zipped([PICKLE], comment=b"PK\5\6" + bytes(18)),
    "two archives": _zipped([PICKLE]) + _zipped([OTHER]),
    "something before": b"PK\3\4" + bytes(26) + _zipped([PICKLE]),
    "two pickles": _zipped([("c/data.pkl", PICKLE[1] + OTHER[1])]),
    "no archive": PICKLE[1],
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_an_archive_that_others_may_read_otherwise_is_refused(archive: str, tmp_path: Path) -> None:
    for content in (_zipped([PICKLE]), ARCHIVES[archive]):
        (tmp_path / "common.pt").write_bytes(content)
        if content == _zipped([PICKLE]):
            assert DistState(tmp_path).common() == {"state": {}}
        else:
            assert str(tmp_path / "common.pt") in refused(DistState(tmp_path).common)


def _mutated(data: bytes, generator: random.Random) -> bytes:
    """A byte changed, a stretch left out or doubled, cut off, or an instruction put in."""
    at = generator.randrange(len(data))
    more = at + generator.randrange(1, 9)
    kind = generator.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[more:]
    if kind == 2:
        return data[:more] + data[at:]
    if kind == 3:
        instruction = generator.choice(
            [b"0", b"N", b"(", b"}", b"]", b")", b"\x85", b"R", b"b", b"\x81", b"h\x01", b"u"]
        )
        return data[:at] + instruction + data[at:]
    return data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]


def test_metadata_that_is_let_through_is_what_torch_reads(tmp_path: Path) -> None:
    """Of 2,000 damaged ones each is refused in one line, or says to torch what it says here, if torch can read it."""
    write_by_hand(tmp_path, {"w": torch.ones(4, 6), "b": torch.ones(3).half()}, {"w": [[2, 2], [6]]}, files=2)
    file, generator, alike = tmp_path / ".metadata", random.Random(1), 0
    sound = file.read_bytes()
    for _ in range(2000):
        file.write_bytes(damaged := _mutated(sound, generator))
        try:
            ours = read_metadata(tmp_path)
        except UserError as e:
            assert "\n" not in str(e) and str(file) in str(e)
            continue
        try:
            theirs: Metadata = pickle.loads(damaged)
        except Exception:  # it may read less
            continue
        assert _said(theirs) == (
            {
                key: (*t.size, t.properties.dtype, *((c.offsets, c.sizes) for c in t.chunks))
                for key, t in ours.tensors.items()
            },
            {
                (key, offset): (p.relative_path, p.offset, p.length)
                for (key, offset), p in ours.places.items()
            },
        )
        alike += 1
    assert 20 < alike < 1000


def _said(metadata: Metadata) -> tuple[dict[str, Any], dict[Any, Any]]:
    items: Any = metadata.state_dict_metadata.items()
    tensors = {
        key: (*t.size, t.properties.dtype, *((c.offsets, c.sizes) for c in t.chunks)) for key, t in items
    }
    return tensors, {
        (i.fqn, i.offset): (p.relative_path, p.offset, p.length) for i, p in metadata.storage_data.items()
    }


def test_objects_that_are_let_through_are_what_torch_reads(tmp_path: Path) -> None:
    """The same of archives, damaged anywhere: what is let through, torch reads, and no command runs."""
    state = {"step": 3, "rng": torch.arange(5), "args": Namespace(a=torch.bfloat16, b=[1, (2.5, None)])}
    write_by_hand(tmp_path, {"w": torch.ones(2)})
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    file, generator, let_through = tmp_path / "common.pt", random.Random(2), 0
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for _ in range(1000):
        file.write_bytes(_mutated(buffer.getvalue(), generator))
        try:
            check_folder(tmp_path)
        except UserError as e:
            assert "\n" not in str(e) and str(file) in str(e)
            continue
        with contextlib.suppress(Exception):  # it may read less
            torch.load(file, weights_only=False)
        let_through += 1
    assert 50 < let_through < 900


STATES: list[Any] = [
    [
        {
            "state": {
                "step": 3,
                "lr": 1e-3,
                "names": ["a", ("b", None)],
                "big": 1 << 70,
                "bytes": b"\xffx",
                "empty": b"",
            }
        }
    ],
    [
        {
            "rng": [
                np.random.default_rng(1).integers(0, 99, 5),
                torch.arange(5).byte(),
                {1, 2},
                frozenset("a"),
                1j,
            ]
        }
    ],
    {
        "args": Namespace(dtype=torch.bfloat16, shape=torch.Size((2, 3)), device=torch.device("cpu")),
        "x": np.float64(2),
    },
    [io.BytesIO(b"content"), bytearray(b"more"), slice(1, 2), torch.nn.Parameter(torch.ones(2, 3).t())],
]


@pytest.mark.parametrize("state", STATES)
def test_states_of_a_run_are_let_through(folder: Path, state: Any) -> None:
    (folder / "common.pt").write_bytes(saved(state))
    check_folder(folder)
