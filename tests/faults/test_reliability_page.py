"""``docs/reliability.md`` quotes what the studies printed, and nothing else."""

from __future__ import annotations

import json

import page


def test_page_quotes_what_was_printed() -> None:
    """The tables of ``docs/reliability.md`` are those of ``docs/reliability.json``, and the counts are those promised."""
    found = json.loads(page.JSON.read_text())
    assert page.filled(page.PAGE.read_text(), found) == page.PAGE.read_text()
    least = {"kill": 200, "disk": 40, "race": 60, "mutate": 3000}
    assert {
        name: found["studies"][name]["trials"] >= count for name, count in least.items()
    } == dict.fromkeys(least, True)
    assert all(not study["faults"] for study in found["studies"].values())
