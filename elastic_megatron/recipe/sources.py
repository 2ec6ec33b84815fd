"""Where a recipe's keys come from: files, the files that they extend, and the command line."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastic_megatron.errors import UserError
from elastic_megatron.files.reading import read_text
from elastic_megatron.recipe.document import COMMAND_LINE, Layer, Mark, Node, Reader, Unreadable
from elastic_megatron.recipe.types import expand

_LARGEST = 128 << 10
_MOST_FILES = 64


@dataclass
class Sources:
    """Reads and merges the sources of one document; whatever is wrong with them is added to `problems`.

    `kind` is what messages call it: a recipe, a chain, a cluster file. Where a file that it extends cannot be
    used, what can be read is returned all the same, and `complete` is false: keys may be missing.
    """

    problems: list[str] = field(default_factory=list)
    kind: str = "recipe"
    complete: bool = True
    _files: int = 0

    def file(
        self, shown: str, asked_at: str = "", chain: tuple["_Step", ...] = (), layer: Layer = ()
    ) -> Node | None:
        """The mapping in a file, merged over those that it extends; None if it cannot be used.

        `shown` is the path as the user would type it, `chain` the files that led here, `asked_at` a
        prefix for complaints about the file as a whole: the place that named it. Its layers begin with `layer`.
        """
        step = _Step(os.path.realpath(shown), shown, asked_at)
        if step.identity in [before.identity for before in chain]:
            self.problems.append(_circle((*chain, step)))
            return None
        self._files += 1
        if self._files > _MOST_FILES:  # files that extend two each, ten times over, are a thousand
            if self._files == _MOST_FILES + 1:
                self.problems.append(f"{asked_at}{shown}: more than {_MOST_FILES} files extend each other")
            return None
        text = self._text(shown, asked_at)
        if text is None:
            return None
        base = Path(os.path.abspath(shown)).parent
        reader = Reader(
            lambda line, column: f"{shown}:{line}:{column}", base, self.problems, (*layer, math.inf)
        )
        node = reader.read(text)
        if node is None or isinstance(node.value, Unreadable):
            return None
        if not isinstance(node.value, dict):
            found = "it is empty" if node.value is None else f"it holds a {_kind(node)}"
            self.problems.append(
                f"{node.mark.where}: a {self.kind} is a mapping of keys to values, but {found}"
            )
            return None
        return self._extended(shown, node, (*chain, step), layer)

    def _text(self, shown: str, asked_at: str) -> str | None:
        try:
            return read_text(Path(shown), _LARGEST)
        except FileNotFoundError:
            self.problems.append(f"{asked_at}{shown}: no such file")
        except UserError as error:
            self.problems.append(f"{asked_at}{error}")
        except OSError as error:
            self.problems.append(f"{asked_at}{shown}: cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self.problems.append(f"{asked_at}{shown}: is not UTF-8 text (byte {error.start})")
        return None

    def _extended(self, shown: str, node: Node, chain: tuple["_Step", ...], layer: Layer) -> Node:
        assert isinstance(node.value, dict)
        own = {key: child for key, child in node.value.items() if key != "extends"}
        merged: Node | None = None
        for number, (parent, mark) in enumerate(self._parents(node.value.get("extends"))):
            # The path as written stays the path shown, so that a reader can open it.
            path = os.path.normpath(os.path.join(os.path.dirname(shown), os.path.expanduser(parent)))
            read = self.file(path, f"{mark.where}: extends: ", chain, (*layer, number))
            self.complete = self.complete and read is not None
            if read is not None:
                merged = read if merged is None else merge(merged, read)
        return Node(own, node.mark) if merged is None else merge(merged, Node(own, node.mark))

    def _parents(self, extends: Node | None) -> list[tuple[str, Mark]]:
        """The files that a file extends, each with the place that names it."""
        if extends is None or isinstance(extends.value, Unreadable):
            self.complete = self.complete and extends is None
            return []
        items = extends.value if isinstance(extends.value, list) else [extends]
        if any(not isinstance(item.value, str) or not item.value for item in items):
            self.problems.append(f"{extends.mark.where}: extends: must be a path or a list of paths")
            self.complete = False
            return []
        parents = []
        for item in items:
            try:
                parents.append((expand(str(item.value)), item.mark))
            except ValueError as error:
                self.problems.append(f"{item.mark.where}: extends: {error}")
                self.complete = False
        return parents

    def override(self, root: Node, text: str, prefix: str = "") -> Node:
        """`root` with one `key.key=value` of the command line applied; the value is YAML.

        `prefix` is what the user wrote before it, to say which document is meant.
        """
        mark = Mark(f"command line `{prefix}{' '.join(text.split())}`", Path.cwd(), COMMAND_LINE)
        dotted, equals, value_text = text.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            self.problems.append(f"{mark.where}: write it as key=value, such as optimizer.lr=1e-4")
            return root
        reader = Reader(lambda line, column: mark.where, mark.base, self.problems, mark.layer)
        value = reader.read(value_text)
        if value is None:
            return root
        try:
            return _assign(root, keys, 0, value)
        except LookupError as error:
            self.problems.append(f"{mark.where}: {error.args[0]}")
            return root


@dataclass(frozen=True)
class _Step:
    """A file on the way along `extends`: itself, its path as shown, and the place that named it."""

    identity: str
    shown: str
    asked_at: str


def _circle(steps: Sequence[_Step]) -> str:
    """Complaint about files that extend each other; the same wherever the circle was entered."""
    first = next(index for index, step in enumerate(steps) if step.identity == steps[-1].identity)
    circle = list(steps[first + 1 :])
    start = min(range(len(circle)), key=lambda index: circle[index].identity)
    circle = circle[start:] + circle[:start]
    names = " -> ".join(step.shown for step in (*circle, circle[0]))
    return f"{circle[0].asked_at}goes round in a circle: {names}"


def merge(base: Node, top: Node) -> Node:
    """`top` over `base`: mappings merge key by key, everything else replaces, null removes what was inherited."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, node in top.value.items():
        if key not in merged:
            merged[key] = node
        elif node.value is None:
            del merged[key]
        else:
            merged[key] = merge(merged[key], node)
    return Node(merged, top.mark)


def _assign(node: Node, keys: list[str], depth: int, value: Node) -> Node:
    """A copy of `node` with `value` at `keys[depth:]`. Raises LookupError with a message for the user."""
    if depth == len(keys):
        return value
    key, path = keys[depth], ".".join(keys[:depth])
    match node.value:
        case list() as items:
            if not (key.isdecimal() and int(key) < len(items)):
                count = f"{len(items)} item" + "s" * (len(items) != 1)
                raise LookupError(f"{path} is a list of {count}, numbered from 0; it has no {key!r}")
            index = int(key)
            changed = _assign(items[index], keys, depth + 1, value)
            return Node([*items[:index], changed, *items[index + 1 :]], node.mark)
        case dict() as entries:
            pass
        case None | Unreadable():
            entries = {}
        case _:
            raise LookupError(f"{path} is a {_kind(node)}, so it has no {key!r} inside")
    if depth == len(keys) - 1 and key in entries and value.value is None:
        return Node({name: child for name, child in entries.items() if name != key}, node.mark)
    changed = _assign(entries.get(key, Node(None, value.mark)), keys, depth + 1, value)
    return Node({**entries, key: changed}, node.mark)


def _kind(node: Node) -> str:
    """What a node holds, in a user's words."""
    match node.value:
        case list():
            return "list"
        case str():
            return "text"
        case bool():
            return "switch"
        case _:
            return "number"
