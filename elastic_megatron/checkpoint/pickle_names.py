"""What the names in a pickle stand for: plain records in the place of instances, and functions without their code."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# of Python's own library, what configurations hold; whatever else of it a file calls was put there to do harm
_HARMLESS = frozenset(
    {
        "argparse",
        "collections",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "pathlib",
        "re",
        "signal",
    }
    | {"types", "uuid"}
)
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "nt"}


class RefusedError(pickle.UnpicklingError):
    """A pickle names what no file of its kind needs; its message says what."""


class LaterError(pickle.UnpicklingError):
    """A pickle holds what only a later release of some package writes; its message says what."""


class Record:
    """What stands for an instance of a class. Made without arguments, then given its state."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a {type(self).__name__} has no state")


class Fields(Record):
    """A record whose state is a dict of known names; ``legal`` says what each may be.

    ``set_state`` raises ``LaterError`` for a name that is not known.
    """

    __slots__ = ()
    _legal: ClassVar[Mapping[str, Callable[[Any], bool]]]

    def __init_subclass__(cls, legal: Mapping[str, Callable[[Any], bool]]) -> None:
        cls._legal = legal

    def set_state(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError(f"the state of a {type(self).__name__} is no dict")
        for name, value in state.items():
            if name not in self._legal:
                raise LaterError(f"a {type(self).__name__} with the field {shown(name)}")
            if not self._legal[name](value):
                raise pickle.UnpicklingError(f"{name} of a {type(self).__name__} is no legal value")
            setattr(self, name, value)
        state.clear()  # the memo keeps it


class Attributes(Record):
    """A record of any names, like ``argparse.Namespace``."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise pickle.UnpicklingError("the state of a namespace is no dict of names")
        self.fields.update(state)


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """Stands for a function: what calling it gives, without its code. Raises ``ValueError`` or ``TypeError``."""

    call: Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Unknown(Record):
    """Stands for a class or function that is not known, and for all that is made of it: by its name alone."""

    name: str

    def __repr__(self) -> str:
        return self.name

    def set_state(self, state: Any) -> None: ...

    def call(self, *_: Any) -> Unknown:
        """Raises ``RefusedError`` where that was put into the file to do harm."""
        package = self.name.partition(".")[0]
        if package in _STANDARD_LIBRARY and package not in _HARMLESS:
            raise RefusedError(self.name)
        return self


@dataclass(frozen=True)
class Names:
    """What the names in a pickle stand for.

    Args:
        known: by (module, name), exactly: subclasses of ``Record``, ``Function``s, and values.
        others: whether what is not known is left out (``Unknown``) or refused.
        later: whether only a later release can have written what is not known.
    """

    known: Mapping[tuple[str, str], Any]
    others: bool = False
    later: Callable[[str, str], bool] = lambda module, name: False

    def find(self, module: str, name: str) -> Any:
        found = self.known.get((module, name))
        if found is not None:
            return found
        full = shown(f"{module}.{name}")
        if self.others:
            return Unknown(full)
        raise LaterError(full) if self.later(module, name) else RefusedError(full)


def shown(name: object) -> str:
    """A name from a file, fit for one line."""
    text = str(name)[:100] if isinstance(name, str) else type(name).__name__
    return text if text.isprintable() else ascii(text)
