"""How a command that fails ends: what may succeed later, what never will, and what is a defect."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from elastic_megatron import cli
from elastic_megatron.conversion.disk import write_errors
from elastic_megatron.errors import AGAIN, BAD_INPUT, DIVERGED, DivergedError, RetryableError, UserError

STATUS = {
    AGAIN: ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EBUSY", "ENOTCONN", "ESHUTDOWN", "ETIMEDOUT"],
    BAD_INPUT: ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST"],
    1: ["ENOENT", "EBADF", "EINVAL"],
}


def ended(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit status and words of a command that fails with this error."""

    def fail(_: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(cli, "_parse", lambda _: argparse.Namespace(handler=fail))
    status = cli.main([])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("status", STATUS)
def test_the_exit_status_tells_a_full_disk_from_a_wrong_path_and_both_from_a_defect(
    status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ELASTIC_MEGATRON_DEBUG", raising=False)
    for name in STATUS[status]:
        number = getattr(errno, name)
        error = OSError(number, os.strerror(number), "/some/file")
        found, said = ended(error, monkeypatch, capsys)
        assert found == status, name
        assert ("Traceback" in said) == (status == 1), name
        assert status == 1 or (said.count("\n") == 1 and said.startswith("error: /some/file: ")), said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_conversion_tells_them_apart_too_on_whichever_side_it_writes(tmp_path: Path, number: int) -> None:
    """torch wraps the errors of its writers."""
    inner = OSError(number, os.strerror(number), "/some/file")
    status = AGAIN if number == errno.ENOSPC else BAD_INPUT
    for error in (inner, CheckpointException("write", {0: _wrap_exception(inner)})):
        said = rf"cannot be written \(/some/file: {inner.strerror}\)"
        with pytest.raises(UserError, match=said) as told, write_errors(tmp_path):
            raise error
        assert told.value.status == status


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_that_torch_wraps_is_one(interruption: BaseException, tmp_path: Path) -> None:
    """It is neither a folder that cannot be written nor a damaged checkpoint."""
    wrapped = CheckpointException("read", {0: _wrap_exception(interruption)})
    with pytest.raises(type(interruption)) as raised, write_errors(tmp_path):
        raise wrapped
    assert raised.value is interruption


def test_what_a_command_prints_is_json_whatever_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"loss": float("nan"), "of": [1.5, float("inf"), {"x": "NaN"}]}
    monkeypatch.setattr(cli, "_parse", lambda _: argparse.Namespace(handler=lambda _: told, json=True))
    assert cli.main([]) == 0
    assert capsys.readouterr().out == '{"loss": null, "of": [1.5, null, {"x": "NaN"}]}\n'


@pytest.mark.parametrize("swallowed", [True, False])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_that_strikes_in_a_destructor_or_in_other_code_ends_the_command_too(
    number: int, status: int, swallowed: bool
) -> None:
    """Python prints what is raised there, and goes on. And C++ turns what is raised in it into errors of its own."""
    code = f"""if True:
        import argparse, os, time
        from elastic_megatron import cli

        class Slow:
            def __del__(self):
                os.kill(os.getpid(), {number})
                time.sleep(0.01)

        def handler(_):
            if {swallowed}:
                Slow()
                time.sleep(30)
            try:
                os.kill(os.getpid(), {number})
                time.sleep(30)
            except BaseException:
                raise ValueError("could not determine the shape") from None

        cli._parse = lambda _: argparse.Namespace(handler=handler)
        raise SystemExit(cli.main([]))
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, "Traceback" in ran.stderr) == (status, "", False), ran.stderr


def test_an_error_for_people_ends_with_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, status in ((UserError, BAD_INPUT), (DivergedError, DIVERGED), (RetryableError, AGAIN)):
        assert ended(kind("words"), monkeypatch, capsys) == (status, "error: words\n")


def test_the_bare_name_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """No arguments: exit 0, and on stdout what ``--help`` prints."""
    assert cli.main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0 and bare.out == capsys.readouterr().out and not bare.err
