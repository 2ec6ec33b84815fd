"""Disks that fill, refuse or fail: one line and the right exit status, and the last good state as it was.

Errors are raised at a call to the file system, as the kernel would (``moments``), and they are real where this process
may arrange them: a small tmpfs, or else a limit of file sizes; a folder that another user owns. Sources are cut short
before and while they are read. Afterwards the fault is gone, and the same command finishes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fault_cases import CASES, Case, digest
from kill_study import Undisturbed, undisturbed
from moments import Strike
from settled import check_finished, check_left, lock_left
from tally import Lane, Lanes, Tally
from worlds import World, fresh
from zygote import Ran

REFUSED, RETRY = 2, 75
NOBODY = 65534
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
PASSING = (errno.EIO, errno.ESTALE, errno.EBUSY)
# errors at a call, by command
POINTS = {
    "import": 12, "export": 12, "export quantised": 6, "slice": 12, "prepare-data": 8, "prepare-data over": 6,
    "report": 2, "report quantised": 4, "rank": 10, "train": 16, "quantize": 10, "submit": 10,
}  # fmt: skip
SAMPLE = {"import": 2, "slice": 2, "prepare-data over": 1, "submit": 1}
FULL = ("import", "export", "slice", "prepare-data", "rank", "train", "quantize")
SOURCES = {
    "import": ("hf", "model.safetensors"), "slice": ("family", "model.safetensors"),
    "export": ("train", "checkpoints/iter_0000005/__0_0.distcp"),
    "export quantised": ("quantize", "checkpoints/iter_0000000/amax.safetensors"),
    "prepare-data over": ("hf", "tokenizer.json"), "rank": ("data", "train.bin"), "train": ("data", "train.idx"),
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """One point: what is wrong with the disk, in words, and how it is arranged.

    Args:
        strike: an error at a call.
        room: bytes of the disk (a tmpfs, or the largest file).
        owner: another user owns the folder, and it is closed to the command.
        source: (folder of the world, file) that is cut to ``share``, before or, with ``strike``, while it is read.
    """

    words: str
    strike: Strike | None = None
    room: int = 0
    owner: bool = False
    source: tuple[str, str] | None = None
    share: float = 0.5

    def __str__(self) -> str:
        return self.words


def study(lanes: Lanes, points: dict[str, int], seed: int, tally: Tally, real: bool = True) -> None:
    """So many errors at calls of each command and, where ``real``, the real ones too."""
    rng = random.Random(seed)
    trials: list[Callable[[Lane], None]] = []
    for name in dict.fromkeys([*points, *(FULL if real else ())]):
        case, straight = CASES[name], undisturbed(CASES[name], lanes.first)
        refusals = [
            *_at_calls(straight, points.get(name, 0), rng),
            *(_real(case, straight, rng) if real else ()),
        ]
        trials += [partial(_trial, case, straight, refusal, tally) for refusal in refusals]
    lanes(trials)


def _at_calls(straight: Undisturbed, count: int, rng: random.Random) -> Iterator[Refusal]:
    for call in sorted(rng.sample(range(1, straight.calls + 1), min(count, straight.calls))):
        number = rng.choice(LASTING + PASSING)
        lasting = number in LASTING
        words = (
            f"{errno.errorcode[number]} from call {call} on"
            if lasting
            else f"{errno.errorcode[number]} at call {call}"
        )
        yield Refusal(words, Strike("error", call, number, lasting=lasting))


def _real(case: Case, straight: Undisturbed, rng: random.Random) -> Iterator[Refusal]:
    size = sum(f.stat().st_size for f in straight.folder.rglob("*") if f.is_file())
    if case.name in FULL:
        for share in (0.1, 0.5, 0.9):
            room = int(size * share)
            yield Refusal(f"disk of {share:.0%} of what is written", room=room)
        yield Refusal("folder of another user", owner=True)
    if case.name in SOURCES:
        for share in (0.0, 0.3, 0.98):
            yield Refusal(
                f"{'/'.join(SOURCES[case.name])} cut to {share:.0%}", source=SOURCES[case.name], share=share
            )
        for call in rng.sample(range(2, 12), 2):
            strike = Strike("truncate", call, reads=True)
            yield Refusal(f"{SOURCES[case.name][1]} cut at call {call}", strike, source=SOURCES[case.name])


def _trial(case: Case, straight: Undisturbed, refusal: Refusal, tally: Tally, lane: Lane) -> None:
    with _arranged(case, refusal, lane) as (folder, how, world):
        before = {n: digest(folder / n, folder) for n in straight.files if (folder / n).is_file()}
        [ran] = lane.zygote.run(case.run(world, folder, **how))
        tally.count(case.name, f"exit {ran.status}", _kind(refusal))
        moment = f"{refusal}{f' ({ran.struck})' if ran.struck else ''}"
        if problem := _told_badly(case, ran, refusal):
            tally.fault(case.name, problem[0], moment, problem[1])
        for kind, seen in check_left(case, folder, before, straight) if ran.status else ():
            tally.fault(case.name, kind, moment, seen)
        _lifted(folder, refusal, lane.world, world)
        if ran.status == 0 and refusal.source is None and case.command != "submit":
            again = ran
        else:
            [again] = lane.zygote.run(case.run(world, folder))
        done = [p for p in check_finished(case, folder, straight, lane) if ran.status or p[0] != "debris"]
        if again.status == REFUSED and all(map(lock_left, done)):
            pass  # it had been done, and says that it is there
        elif again.status:
            tally.fault(case.name, "does not finish", moment, f"exit {again.status}: {again.last}")
        else:
            for kind, seen in done:
                tally.fault(case.name, kind, moment, seen)


def _kind(refusal: Refusal) -> str:
    if refusal.source is not None:
        return "source cut short"
    if refusal.room:
        return "tmpfs full" if may_mount() else "file-size limit"
    return "another user's folder" if refusal.owner else refusal.words.split()[0]


def _told_badly(case: Case, ran: Ran, refusal: Refusal) -> tuple[str, str] | None:
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    if ran.hung:
        return "hang", f"still there after {ran.wall:.0f} s"
    if ran.traceback:
        return "traceback", ran.last
    if ran.left:
        return "left running", f"{ran.left} processes"
    if ran.status == -signal.SIGBUS and refusal.source is not None and refusal.strike is not None:
        return None  # the kernel's answer to a mapped file that is cut: no line, and not promised
    if ran.status not in (0, REFUSED, RETRY):
        return "status", f"exit {ran.status}: {ran.last}"
    # submit says in a second line which jobs it took out of the queue again
    if ran.status and not 1 <= len(errors) <= 1 + case.slurm:
        return "not one line", f"exit {ran.status} with {len(errors)} error lines: {ran.last}"
    return None


@contextlib.contextmanager
def _arranged(case: Case, refusal: Refusal, lane: Lane) -> Iterator[tuple[Path, dict[str, object], World]]:
    """The folder of the trial, how to run in it, and the world to read from."""
    world, how = lane.world, {}
    with contextlib.ExitStack() as stack:
        if refusal.room and may_mount():
            shutil.rmtree(lane.folder, ignore_errors=True)
            stack.enter_context(_own_disk(lane.folder))
        elif refusal.room:
            how["file_size"] = max(1, refusal.room // 4)
        folder = case.prepare(lane.world, lane.folder)
        if refusal.room and may_mount():
            used = os.statvfs(folder)
            _resize(folder, (used.f_blocks - used.f_bfree) * used.f_frsize + refusal.room)
        if refusal.source is not None:
            world = _cut_world(lane, *refusal.source, None if refusal.strike else refusal.share)
            if case.recipes:
                world.write_recipes(folder)
        if refusal.strike is not None and refusal.source is not None:
            how["strike"] = Strike(
                "truncate", refusal.strike.call, gate=str(world / "/".join(refusal.source)), reads=True,
                below=str(world.root),
            )  # fmt: skip
        elif refusal.strike is not None:
            how["strike"] = refusal.strike
        if refusal.owner:
            folder.chmod(0o555)
            if os.getuid() == 0:
                how["user"] = NOBODY
        yield folder, how, world
        folder.chmod(0o755)


def _lifted(folder: Path, refusal: Refusal, sound: World, world: World) -> None:
    """The disk has room again, the folder is ours again, and the source is whole."""
    folder.chmod(0o755)
    if refusal.source is not None:
        name = "/".join(refusal.source)
        shutil.copy2(sound / name, world / name)
    if refusal.room and may_mount():
        _resize(folder, 512 << 20)


def _cut_world(lane: Lane, top: str, file: str, share: float | None) -> World:
    """A world of links in which one folder is a copy, with a file cut short."""
    root = fresh(lane.folder.with_name(f"{lane.folder.name}-world"))
    for path in lane.world.root.iterdir():
        if path.name != top:
            (root / path.name).symlink_to(path)
    shutil.copytree(lane.world / top, root / top)
    if share is not None:
        os.truncate(root / top / file, int((root / top / file).stat().st_size * share))
    return World(root)


@contextlib.contextmanager
def _own_disk(folder: Path) -> Iterator[None]:
    """A file system in memory, mounted at a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "none", str(folder)], check=True, timeout=30)
    try:
        yield
    finally:
        # lazily: what a command left running may still be in it, and is counted elsewhere
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, timeout=30)


_MAY: list[bool] = []


def may_mount() -> bool:
    """May this process mount a file system? Tried once."""
    if not _MAY:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
            _MAY.append(subprocess.run(command, capture_output=True, timeout=30).returncode == 0)
            if _MAY[0]:
                subprocess.run(["umount", folder], check=True, timeout=30)
    return _MAY[0]
