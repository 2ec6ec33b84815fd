"""Which number to change to what: changes are tried by the rules that found the problem, not guessed."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from .batch_rules import BATCH_RULES
from .block_rules import whole_blocks
from .kernel_rules import kernel_rules
from .layout_rules import RULES, Problem
from .setting import Change, Setting

# how many numbers are changed at most, and how many repairs of what a change breaks are tried
_DEPTH, _BREADTH = 3, 4


def problems_of(setting: Setting) -> list[Problem]:
    """Everything that does not fit."""
    return [
        problem for rule in (*RULES, *BATCH_RULES, whole_blocks, kernel_rules) for problem in rule(setting)
    ]


def remedies(setting: Setting, problem: Problem, most: int = 2) -> list[Change]:
    """Changes after which this problem is gone and no other has come, at most one for the same keys.

    A change that breaks something else is taken together with what repairs that, where no simpler one will do.
    """
    allowed = Counter(_kind(other) for other in problems_of(setting))
    allowed.subtract([_kind(problem)])
    for depth in range(_DEPTH):
        found: dict[tuple[str, ...], Change] = {}
        for change in problem.changes:
            whole = _mended(setting, change, allowed, depth)
            if whole is not None:
                found.setdefault(tuple(whole), whole)
            if len(found) == most:
                break
        if found:
            return list(found.values())
    return []


def _mended(setting: Setting, change: Change, allowed: Counter[str], depth: int) -> Change | None:
    """The change, with at most ``depth`` more, if then no problems but those allowed are left."""
    changed = setting.changed(change)
    if changed is None:
        return None
    left = Counter(allowed)
    for problem in problems_of(changed):
        left[_kind(problem)] -= 1
        if left[_kind(problem)] < 0:
            return _mended_further(setting, change, problem, allowed, depth)
    return change


def _mended_further(
    setting: Setting, change: Change, problem: Problem, allowed: Counter[str], depth: int
) -> Change | None:
    for further in problem.changes[:_BREADTH] if depth else ():
        if not set(further) & set(change):
            whole = _mended(setting, {**change, **further}, allowed, depth - 1)
            if whole is not None:
                return whole
    return None


def _kind(problem: Problem) -> str:
    """What a problem says, whatever the numbers are."""
    return re.sub(r"\d+", "#", problem.text)


def described(setting: Setting, problem: Problem) -> str:
    """The problem and its remedies in one line: `...; set KEY=VALUE and KEY=VALUE, or set KEY=VALUE`."""
    ways = [said(change) for change in remedies(setting, problem)]
    ways += [problem.otherwise] if problem.otherwise else []
    return f"{problem.text}; {', or '.join(ways) or 'choose another layout'}"


def said(change: Change) -> str:
    """`set KEY=VALUE and KEY=VALUE`, each as an override on the command line."""
    again = " and rank again" if any(key.startswith("space.lanes.") for key in change) else ""
    return "set " + " and ".join(f"{key}={written(value)}" for key, value in change.items()) + again


def written(value: Any) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
