"""YAML text as a tree whose every node knows where it was written.

The dialect is YAML 1.2's core schema, not PyYAML's 1.1: `3e-4` is a number, `on` and `1:30` are text, `010`
is ten. A key given twice is an error.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from elastic_megatron.recipe.types import LARGEST, Text


class Unreadable:
    """Stands for a value that `Reader` complained about, so that nobody else does."""


Scalar = str | int | float | bool | Unreadable | None


# Of what is written in several places the larger layer wins: a file's is above those of the files it extends, in
# their order, and that of the command line is above all.
Layer = tuple[float, ...]
COMMAND_LINE: Layer = (math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Mark:
    """Where something was written, the directory that its relative paths start from, and its layer."""

    where: str
    base: Path
    layer: Layer = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A YAML value; the mark of an entry of a mapping is that of its key."""

    value: "Scalar | dict[str, Node] | list[Node]"
    mark: Mark

    def plain(self) -> object:
        """The value as dicts, lists and scalars; strings are `Text`."""
        match self.value:
            case dict() as entries:
                return {key: node.plain() for key, node in entries.items()}
            case list() as items:
                return [node.plain() for node in items]
            case str() as text:
                return Text(text, self.mark.base)
            case scalar:
                return scalar

    def locate(self, at: tuple[str | int, ...]) -> Mark:
        """The mark of the node at this path, or of the deepest section of the path that was written."""
        return self.deepest(at).mark

    def deepest(self, at: tuple[str | int, ...]) -> "Node":
        """The node at this path, or the deepest section of the path that was written."""
        node = self
        for part in at:
            match node.value, part:
                case dict() as entries, str() if part in entries:
                    node = entries[part]
                case list() as items, int() if part < len(items):
                    node = items[part]
                case _:
                    break
        return node


# What nobody writes by hand: a short text can stand for any number of values, by aliases of aliases.
MOST_VALUES = 10_000
DEEPEST = 40
_LONGEST_KEY = 200

_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = (f"{_TAG}map", f"{_TAG}seq")
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _CoreSchema:
    """Tells the type of an unquoted scalar; shared by reader and writer so that a dump reads back equal."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _name, _pattern, _first_characters in _CORE_SCHEMA:
    for _character in _first_characters:
        _CoreSchema.yaml_implicit_resolvers.setdefault(_character, []).append(
            (_TAG + _name, re.compile(f"(?:{_pattern})\\Z"))
        )


class _Loader(_CoreSchema, yaml.SafeLoader):
    pass


class _Dumper(_CoreSchema, yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def to_yaml(data: object) -> str:
    """`data` as YAML text, innermost collections on one line."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )


def _scalar(node: yaml.ScalarNode) -> Scalar:
    """The value of a scalar. Raises ValueError if the text does not fit the tag, or the tag is not plain YAML."""
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if kind not in _READ:
        raise ValueError(f"not valid YAML: tag {_short(node.tag)} is not allowed here")
    try:
        value = _READ[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"not valid YAML: {_short(text)} is no {_WORDS.get(kind, kind)}") from None
    if kind == "int" and abs(value) >= LARGEST:
        raise ValueError(f"{_short(text)} is too large; whole numbers lie below 2**63")
    if kind == "str" and re.search(r"[\x00\ud800-\udfff]", text):
        raise ValueError(f"{_short(text)} holds a character that no text has")
    return value


def _integer(text: str) -> int:
    """A number so long that Python would not print it is as good as the first one that is too large."""
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10)) if len(text) < 100 else LARGEST


_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _integer,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": lambda text: text,
}


_WORDS = {"int": "whole number", "float": "number", "bool": "switch"}


def _short(text: str) -> str:
    return repr(text if len(text) < 40 else f"{text[:30]}...")


class Reader:
    """Turns one piece of YAML text into a tree and collects what is wrong with it.

    `where` gives the printed location of a line and a column, both from 1; `base` is the directory of
    relative paths. Complaints are appended to `problems` as whole lines.
    """

    def __init__(
        self, where: Callable[[int, int], str], base: Path, problems: list[str], layer: Layer
    ) -> None:
        self._where, self._base, self._problems, self._layer = where, base, problems, layer
        self._open: list[yaml.Node] = []
        self._values = 0

    def read(self, text: str) -> Node | None:
        """The tree of `text` (an empty text is null), or None after a syntax error."""
        start = Mark(self._where(1, 1), self._base, self._layer)
        try:
            root = _Loader(text).get_single_node()
            found = Node(None, start) if root is None else self._node(root, start)
            return found if self._values <= MOST_VALUES else None
        except RecursionError:
            self._problems.append(f"{start.where}: lists and mappings are nested too deeply")
            return None
        except yaml.MarkedYAMLError as error:
            # A key without its colon is complained about where the next line begins.
            key = error.context == "while scanning a simple key"
            mark = error.context_mark if key else error.problem_mark or error.context_mark
            where = self._where(mark.line + 1, mark.column + 1) if mark else start.where
            line = text.splitlines()[mark.line : mark.line + 1] if mark else []
            remedy = "; in brackets, put quotes around text with ${NAME}" if "${" in "".join(line) else ""
            self._problems.append(f"{where}: not valid YAML: {error.problem or error.context}{remedy}")
            return None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            where = self._where(before.count("\n") + 1, len(before) - before.rfind("\n"))
            self._problems.append(f"{where}: not valid YAML: {chr(error.character)!r} is not allowed")
            return None

    def _mark(self, node: yaml.Node) -> Mark:
        where = self._where(node.start_mark.line + 1, node.start_mark.column + 1)
        return Mark(where, self._base, self._layer)

    def _node(self, node: yaml.Node, mark: Mark) -> Node:
        self._values += 1
        if self._values > MOST_VALUES:
            if self._values == MOST_VALUES + 1:
                self._problems.append(f"{mark.where}: more than {MOST_VALUES} values, aliases followed")
            return Node(Unreadable(), mark)
        if len(self._open) == DEEPEST:
            self._problems.append(f"{mark.where}: lists and mappings are nested too deeply")
            return Node(Unreadable(), mark)
        if any(node is parent for parent in self._open):
            self._problems.append(f"{mark.where}: an alias may not contain itself")
            return Node(Unreadable(), mark)
        self._open.append(node)
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
                raise ValueError(f"not valid YAML: tag {_short(node.tag)} is not allowed here")
            if isinstance(node, yaml.MappingNode):
                return Node(self._entries(node), mark)
            if isinstance(node, yaml.SequenceNode):
                return Node([self._node(item, self._mark(item)) for item in node.value], mark)
            assert isinstance(node, yaml.ScalarNode)
            return Node(_scalar(node), mark)
        except ValueError as error:
            self._problems.append(f"{mark.where}: {error}")
            return Node(Unreadable(), mark)
        finally:
            self._open.pop()

    def _entries(self, node: yaml.MappingNode) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            mark = self._mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problems.append(f"{mark.where}: a key must be a plain word")
                continue
            # The text itself: a budget may be called 12 or on.
            key: str = key_node.value
            if len(key) > _LONGEST_KEY:
                self._problems.append(f"{mark.where}: a key of {len(key)} characters")
                continue
            if key == "<<":
                self._problems.append(
                    f"{mark.where}: '<<' does not merge; write the keys out, or use extends"
                )
                continue
            if key in entries:
                self._problems.append(
                    f"{mark.where}: key {key!r} is given twice (first at {entries[key].mark.where})"
                )
            entries[key] = self._node(value_node, mark)
        return entries
