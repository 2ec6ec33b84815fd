"""``docs/reliability.md`` quotes what the studies printed, and nothing else."""

from __future__ import annotations

import json

import page


def test_page_quotes_what_was_printed() -> None:
    """The tables of ``docs/reliability.md`` are those of ``docs/reliability.json``, and the counts are those promised."""
    found = json.loads(page.JSON.read_text())
    text = page.PAGE.read_text()
    assert page.filled(text, found) == text and all(block in text for block in page.render(found).values())
    emptied = page.filled(text, found | {"studies": {}})
    assert len(emptied) < len(text) and page.filled(emptied, found) == text
    least = {"kill": 200, "disk": 40, "race": 60, "mutate": 3000}
    assert {
        name: found["studies"][name]["trials"] >= count for name, count in least.items()
    } == dict.fromkeys(least, True)
    assert all(not study["faults"] for study in found["studies"].values())
