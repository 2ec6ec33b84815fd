"""A checkpoint is the state that was saved, or an error that says which file is not; never something else."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from saved_models import Student, move, student, whole

from elastic_megatron.checkpoint import distributed, integrity, tracker
from elastic_megatron.checkpoint.distributed import Saver
from elastic_megatron.checkpoint.manifest import FILE
from elastic_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def model() -> Student:
    return student()


@pytest.fixture(scope="module")
def saved(model: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one run, a step apart, with side files."""
    folder = tmp_path_factory.mktemp("saved")
    source = folder / "hf"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    for iteration in (1, 2):
        write(folder / "run", iteration, model, hf_files=source)
        move(model)
    return folder / "run"


def write(root: Path, iteration: int, model: Student, **kwargs: Any) -> Path:
    return distributed.save(
        root, iteration, model.chunks, model.manifest, optimizer=model.optimizer, state={"step": iteration},
        **kwargs,
    )  # fmt: skip


def read(path: Path, model: Student) -> dict[str, Any]:
    return distributed.load(path, model.chunks, optimizer=model.optimizer)


def assert_same(a: Path, b: Path) -> None:
    mine, theirs = whole(a), whole(b)
    assert mine.keys() == theirs.keys() and mine
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(
    ("dtype", "sharded"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=["fp32", "whole optimizer", "bf16"],
)  # fmt: skip
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_another_model_that_loads_a_checkpoint_saves_the_same_one(
    tmp_path: Path, dtype: torch.dtype, sharded: bool, async_save: bool
) -> None:
    """Weights, router and optimizer state; the gradient step after loading is the same one as well."""
    first = student(dtype=dtype, distributed=sharded)
    with Saver(tmp_path, async_save=async_save) as saver:
        saver.save(1, first.chunks, first.manifest, optimizer=first.optimizer, state={"step": 1})
        move(first)
        saver.save(2, first.chunks, first.manifest, optimizer=first.optimizer)
    second = student(dtype=dtype, distributed=sharded, seed=2, steps=1)
    assert read(tmp_path / "iter_0000001", second) == {"step": 1}
    assert_same(write(tmp_path, 3, second), tmp_path / "iter_0000001")
    move(second)
    assert_same(write(tmp_path, 4, second), tmp_path / "iter_0000002")
    names = whole(tmp_path / "iter_0000001").keys()
    assert any("exp_avg_sq.budget_router." in n for n in names) and any(
        "exp_avg.decoder." in n for n in names
    )


def test_an_async_save_writes_the_files_of_a_sync_one_while_the_weights_change(
    model: Student, tmp_path: Path
) -> None:
    now = write(tmp_path / "sync", 5, model, keep_last=1)
    with Saver(tmp_path / "async", async_save=True) as saver:
        saver.save(5, model.chunks, model.manifest, optimizer=model.optimizer, state={"step": 5})
        move(model)
        assert tracker.newest(tmp_path / "async") is None  # no one has polled
        saver.finish()
        later = tracker.newest(tmp_path / "async")
    assert later is not None and digests(later) == digests(now)
    assert_same(later, now)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but torch's index, which holds a random number."""
    files = json.loads((folder / integrity.FILE).read_text())["files"]
    return {name: digest for name, digest in files.items() if name != ".metadata"}


def test_polling_completes_a_save_that_is_written_and_only_then(model: Student, tmp_path: Path) -> None:
    with Saver(tmp_path, async_save=True) as saver:
        saver.poll()
        saver.save(1, model.chunks, model.manifest)
        polls = 0
        while tracker.newest(tmp_path) is None:
            saver.poll()
            polls += 1
            assert polls < 100_000
        saver.poll()
        saver.save(2, model.chunks, model.manifest)
        saver.save(3, model.chunks, model.manifest)  # waits for 2
        named = tracker.newest(tmp_path)
        assert named is not None and named.name == "iter_0000002"
    assert [p.name for p in tracker.complete(tmp_path)] == [f"iter_000000{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("written", [False, True], ids=["writing", "written"])
def test_an_exception_leaves_the_previous_checkpoint_and_no_writer(
    model: Student, tmp_path: Path, written: bool
) -> None:
    """Nor the results of one that was done, which Megatron would take for those of the next save."""
    write(tmp_path, 1, model)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt), Saver(tmp_path, async_save=True) as saver:
        saver.save(2, model.chunks, model.manifest)
        writer = ({p.pid for p in psutil.Process().children(recursive=True)} - before).pop()
        while written and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before
    named = tracker.newest(tmp_path)
    assert named is not None and named.name == "iter_0000001" and read(named, model) == {"step": 1}
    read(write(tmp_path, 3, model, keep_last=1), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000003", tracker.TRACKER]


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file of this process, or of one that it forks, may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 500, 100_000], ids=["at once", "in side files", "in shards"])
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(
    model: Student, tmp_path: Path, async_save: bool, size: int
) -> None:
    write(tmp_path, 1, model)
    before = whole(tmp_path / "iter_0000001")
    with (
        disk_full_after(size),
        pytest.raises(UserError) as caught,
        Saver(tmp_path, async_save=async_save) as saver,
    ):
        saver.save(2, model.chunks, model.manifest)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    named = tracker.newest(tmp_path)
    assert named == tmp_path / "iter_0000001" and not before.keys() ^ whole(named).keys()
    assert read(named, model) == {"step": 1}


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)


def remove(file: Path, share: float) -> None:
    file.unlink()


FILES = (".metadata", "__0_0.distcp", FILE, "metadata.json", "hf/tokenizer.json")


@settings(max_examples=60)
@given(
    name=st.sampled_from(FILES),
    damage=st.sampled_from([cut, flip, remove]),
    share=st.floats(0, 1, exclude_max=True),
)
def test_any_byte_of_any_file_that_is_lost_or_changed_is_noticed(
    saved: Path, name: str, damage: Callable[[Path, float], None], share: float
) -> None:
    folder = saved / "iter_0000001"
    kept = (folder / name).read_bytes()
    try:
        integrity.verify(folder)
        damage(folder / name, share)
        with pytest.raises(UserError) as caught:
            integrity.verify(folder)
    finally:
        (folder / name).write_bytes(kept)
    assert str(caught.value).startswith(str(folder / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, remove])
def test_loading_refuses_a_damaged_file_by_its_name(
    saved: Path, model: Student, tmp_path: Path, name: str, damage: Callable[[Path, float], None]
) -> None:
    folder = tmp_path / "iter_0000001"
    shutil.copytree(saved / folder.name, folder)
    damage(folder / name, 0.7)
    before = [p.clone() for chunk in model.chunks for p in chunk.parameters()]
    with pytest.raises(UserError, match=f"^{folder / name} ") as caught:
        read(folder, model)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, [p for chunk in model.chunks for p in chunk.parameters()]))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_of_another_iteration_is_noticed(
    saved: Path, model: Student, tmp_path: Path, name: str
) -> None:
    """As whole and readable as its own: torch alone would load it."""
    folder = tmp_path / "iter_0000001"
    shutil.copytree(saved / "iter_0000001", folder)
    shutil.copy(saved / "iter_0000002" / name, folder / name)
    with pytest.raises(UserError, match=name):
        read(folder, model)
    (folder / integrity.FILE).unlink()
    read(folder, model)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"algorithm": "sha256"}', '{"files": 3}'])
def test_a_damaged_integrity_file_is_a_one_line_error(saved: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(saved / "iter_0000001", tmp_path / "x")
    (tmp_path / "x" / integrity.FILE).write_text(content)
    what = "(is damaged|is no valid JSON|holds a list)"
    with pytest.raises(UserError, match=f"^{tmp_path / 'x' / integrity.FILE} {what}") as caught:
        integrity.verify(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_megatron_verifies_our_files_and_we_verify_megatrons(
    saved: Path, model: Student, tmp_path: Path
) -> None:
    verify = dist_checkpointing.validation.verify_integrity_manifest
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(saved / "iter_0000001", ours)
    verify(str(ours))
    flip(ours / ".metadata", 0.5)
    with pytest.raises(dist_checkpointing.core.CheckpointingException, match=".metadata"):
        verify(str(ours))
    theirs.mkdir()
    dist_checkpointing.save(
        {"model": model.chunks[0].sharded_state_dict()}, str(theirs), verify_integrity=True
    )
    integrity.verify(theirs)
    flip(theirs / "__0_0.distcp", 0.5)
    with pytest.raises(UserError, match="__0_0.distcp is damaged"):
        integrity.verify(theirs)


@given(sizes=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 99)), world=st.integers(1, 9))
def test_every_file_is_dealt_to_one_rank_and_no_rank_gets_much_more(
    sizes: dict[str, int], world: int
) -> None:
    shares = [integrity._share(sizes, rank, world) for rank in range(world)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[n] for n in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_a_checkpoint_from_before_integrity_files_loads(saved: Path, model: Student, tmp_path: Path) -> None:
    shutil.copytree(saved / "iter_0000001", tmp_path / "x")
    (tmp_path / "x" / integrity.FILE).unlink()
    assert read(tmp_path / "x", model) == {"step": 1}
