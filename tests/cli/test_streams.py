"""Commands and the terminal, pipe or signal at their other end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes/tiny_cpu/parent.yaml"
COMMAND = [sys.executable, "-m", "elastic_megatron.cli"]
_NOT_OURS = ("ELASTIC_MEGATRON_DEBUG", "PYTHONUNBUFFERED")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in _NOT_OURS} | {"OMP_NUM_THREADS": "1"}


def ran(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which ``em`` is the command."""
    em = f'em() {{ {" ".join(COMMAND)} "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", em + script], capture_output=True, timeout=120, cwd=folder, env=ENVIRONMENT | variables
    )


def test_what_file_names_hide_is_shown_and_not_sent_to_the_terminal(tmp_path: Path) -> None:
    """Escape sequences, carriage returns, right-to-left marks and bytes that are no UTF-8; on any terminal."""
    name = b"\x1b[31mred\r\xe2\x80\xae\xff\x07\xc3\xa9"
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [*COMMAND, "plan", name], capture_output=True, timeout=120, cwd=tmp_path,
            env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        shown = rb"\x1b[31mred\r\u202e\udcff\x07" + ("é".encode() if encoding == "utf-8" else rb"\xe9")
        assert (done.returncode, done.stderr) == (2, b"error: " + shown + b": no such file\n")


def test_a_reader_that_has_seen_enough_and_a_closed_stream_are_no_failures(tmp_path: Path) -> None:
    done = ran("em recipe schema | head -n 1; echo ${PIPESTATUS[0]}", tmp_path)
    assert done.stdout == b"{\n0\n" and done.stderr == b""
    done = ran("em plan nowhere --json <&- >&-; echo $? >&2", tmp_path)
    assert done.stderr.splitlines() == [b"error: nowhere: no such file", b"2"]
    # were the number of the closed stream given to a file, the file would be what is printed on it
    done = ran(
        "em recipe schema >&-; echo $?; em plan nowhere 2>&-; echo $?; em recipe schema <&- | wc -l", tmp_path
    )
    said = done.stdout.split()
    assert said[:2] == [b"0", b"2"] and int(said[2]) > 100 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """While it is printed, and where all of it was still in the buffer when the command was done."""
    for command in ("recipe schema", f"recipe show {RECIPE}"):
        done = ran(f"em {command} > /dev/full; echo $?", tmp_path)
        [line] = done.stderr.splitlines()
        assert done.stdout == b"75\n" and line.startswith(b"error: ") and b"No space left" in line


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """While it looks at its input, and while it writes, with the private folder of its output made."""
    os.mkfifo(fifo := tmp_path / "rows.jsonl")
    for waits in (False, number == signal.SIGTERM):
        command = [*COMMAND, "prepare-data", str(fifo), "--output", "out/data", "--tokenizer", "bytes"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=ENVIRONMENT)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b'{"text": "a"}\n' * (8000 if waits else 1))
        try:
            if waits:
                deadline = time.monotonic() + 100
                while (
                    not (tmp_path / "out").exists() and process.poll() is None and time.monotonic() < deadline
                ):
                    time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=100)
        finally:
            process.kill()
            os.close(writer)
        assert process.returncode == status, said
        assert said.splitlines() == ([b"interrupted"] if number == signal.SIGINT else [])
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
