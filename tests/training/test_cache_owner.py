"""A teacher's cache belongs to the run that comes first."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.files import lock
from elastic_megatron.training.teacher_cache import _claim


def test_of_runs_that_claim_a_cache_at_once_one_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one has looked, found nothing and waits, while the first writes whose it is."""
    told: list[str] = []

    def second() -> None:
        try:
            _claim(tmp_path, {"teacher": "b"})
        except UserError as error:
            told.append(str(error))

    other = threading.Thread(target=second)
    with lock.locked(lock.within(tmp_path), "train"):
        other.start()
        said = ""
        while "waiting for it" not in said and other.is_alive():
            time.sleep(0.01)
            said += capsys.readouterr().err
        (tmp_path / "teacher.json").write_text('{"teacher": "a"}')
    other.join(60)
    assert told and "is of teacher a, but this run has b" in told[0]
    _claim(tmp_path, {"teacher": "a"})
