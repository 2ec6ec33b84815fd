"""Which number to change to what: changes are tried by the rules that found the problem, not guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .layout_rules import RULES, Problem
from .setting import Change, Setting


def problems_of(setting: Setting) -> list[Problem]:
    """Everything that does not fit."""
    return [problem for rule in RULES for problem in rule(setting)]


def remedies(setting: Setting, problem: Problem, most: int = 2) -> list[Change]:
    """Changes after which this problem is gone and no other has come, at most one for the same keys.

    Single changes are tried first; where none does, with the first repair of what it breaks.
    """
    before = len(problems_of(setting))
    found: dict[tuple[str, ...], Change] = {}
    for change in problem.changes:
        if tuple(change) not in found and _left(setting, change) < before:
            found[tuple(change)] = change
    for change in problem.changes if not found else ():
        second = next((c for c in _followed(setting, change) if _left(setting, c) < before), None)
        if second is not None:
            found[tuple(second)] = second
            break
    return list(found.values())[:most]


def _left(setting: Setting, change: Change) -> float:
    changed = setting.changed(change)
    return float("inf") if changed is None else len(problems_of(changed))


def _followed(setting: Setting, change: Change) -> Iterator[Change]:
    """A change together with each change that may mend what it breaks."""
    changed = setting.changed(change)
    known = {problem.text for problem in problems_of(setting)}
    for problem in problems_of(changed) if changed is not None else ():
        if problem.text not in known:
            yield from ({**change, **further} for further in problem.changes)


def described(setting: Setting, problem: Problem) -> str:
    """The problem and its remedies in one line: `...; set KEY=VALUE and KEY=VALUE, or set KEY=VALUE`."""
    ways = [said(change) for change in remedies(setting, problem)]
    ways += [problem.otherwise] if problem.otherwise else []
    return f"{problem.text}; {', or '.join(ways) or 'choose another layout'}"


def said(change: Change) -> str:
    """`set KEY=VALUE and KEY=VALUE`, each as an override on the command line."""
    again = " and rank again" if any(key.startswith("space.lanes.") for key in change) else ""
    return "set " + " and ".join(f"{key}={_value(value)}" for key, value in change.items()) + again


def _value(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
