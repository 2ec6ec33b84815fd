"""How a command that fails ends: what may succeed later, what never will, and what is a defect."""

from __future__ import annotations

import argparse
import errno
import os

import pytest

from elastic_megatron import cli
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


def test_an_error_for_people_ends_with_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, status in ((UserError, BAD_INPUT), (DivergedError, DIVERGED), (RetryableError, AGAIN)):
        assert ended(kind("words"), monkeypatch, capsys) == (status, "error: words\n")
