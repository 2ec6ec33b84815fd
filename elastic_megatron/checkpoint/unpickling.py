"""Pickles as data: nothing that one names is imported or called, and what reading may cost is bounded.

``pickle`` builds what a file asks for, with whatever code it names. Here each instruction that names, calls or fills
something asks a table, whose entries make plain records; what picklers no longer write is refused. It is no subclass of
``pickle.Unpickler``, which hashes anything and makes room for any number: a few bytes can take all memory, or for ever.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .pickle_names import Function, LaterError, Names, Record, Unknown, shown

# of a pickle: its bytes, the bytes of what is made of it, and its instructions, enough for 140,000 chunks of tensors
SIZE_LIMIT = 32 << 20
_MEMORY, _STEPS = 320 << 20, 12_000_000
# of a key, its parts and theirs, and what they may be
_KEY_PARTS = 64
_KEYS = frozenset({str, int, float, bool, bytes, type(None), torch.dtype})


def load(data: bytes, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds: plain values, and what ``names`` says of the rest.

    Args:
        persistent: what a persistent id stands for.

    Raises ``RefusedError``, ``LaterError``, and for damage ``UnpicklingError`` or any other exception.
    """
    if len(data) > SIZE_LIMIT:
        raise pickle.UnpicklingError(f"it has {len(data)} bytes, which no pickle of a checkpoint has")
    reader = _Reader(data, names, persistent)
    value = reader.run()
    if reader.read(1):
        raise pickle.UnpicklingError("more follows after its end")
    return value


class _Reader:
    """The stack machine of pickle's protocols 2 to 5, without what picklers no longer write."""

    def __init__(self, data: bytes, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        file = io.BytesIO(data)
        self.read, self.readline = file.read, file.readline
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # what lies below each mark
        self.memo: list[Any] = []

    def run(self) -> Any:
        steps = {code: (cost, partial(does, self, *of)) for code, (cost, does, *of) in _INSTRUCTIONS.items()}
        left, read = _MEMORY, self.read
        for _ in range(_STEPS):
            if (code := read(1)) == pickle.STOP:
                break
            if code not in steps:
                raise pickle.UnpicklingError(f"no pickler writes {code!r}" if code else "it ends too early")
            cost, does = steps[code]
            left += (does() or 0) - cost
            if left < 0:
                raise pickle.UnpicklingError("it would take more memory than that of any checkpoint")
        else:
            raise pickle.UnpicklingError("it goes on for longer than that of any checkpoint")
        if self.outer or len(self.stack) != 1:
            raise pickle.UnpicklingError("it holds more than one value")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) != size:
            raise pickle.UnpicklingError("it ends too early")
        return data

    # what each instruction does; what it returns are bytes that it sets free

    def protocol(self) -> None:
        version = self.exactly(1)[0]
        if version > pickle.HIGHEST_PROTOCOL:
            raise LaterError(f"pickle protocol {version}")

    def frame(self) -> None:
        if int.from_bytes(self.exactly(8), "little") > SIZE_LIMIT:
            raise pickle.UnpicklingError("it has a frame that is larger than it")

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_mark(self) -> None:
        self.marked()

    def pop(self) -> None:
        if self.stack:
            del self.stack[-1]
        else:
            self.marked()

    def value(self, value: Any) -> None:
        self.stack.append(value)

    def number(self, packed: struct.Struct) -> None:
        self.stack.append(packed.unpack(self.read(packed.size))[0])

    def long(self, length: struct.Struct) -> None:
        size = length.unpack(self.read(length.size))[0]
        self.stack.append(int.from_bytes(self.exactly(size), "little", signed=True))

    def text(self, length: struct.Struct) -> None:
        size = length.unpack(self.read(length.size))[0]
        self.stack.append(str(self.exactly(size), "utf-8", "surrogatepass"))

    def raw(self, length: struct.Struct) -> None:
        self.stack.append(self.exactly(length.unpack(self.read(length.size))[0]))

    def empty(self, make: Callable[[], Any]) -> None:
        self.stack.append(make())

    def tuple_of(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size:
            raise pickle.UnpicklingError("it takes more than there is")
        self.stack[-size:] = [items]

    def tuple_marked(self) -> int:
        self.value(tuple(self.marked()))
        return _MARK

    def frozen(self) -> None:
        items = self.marked()
        _check_keys(items)
        self.stack.append(items)

    def append(self) -> None:
        self._extend([self.stack.pop()])

    def appends(self) -> int:
        self._extend(self.marked())
        return _MARK

    def add(self) -> None:
        items = self.marked()
        _check_keys(items)
        self._extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def set_items(self) -> int:
        self._fill(self.marked())
        return _MARK

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Unknown:
            raise pickle.UnpicklingError(f"it appends to a {type(target).__name__}")

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            keys = items[::2]
            _check_keys(keys)
            target.update(zip(keys, items[1::2], strict=True))
        elif type(target) is not Unknown:
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def put(self, number: struct.Struct) -> None:
        place = number.unpack(self.read(number.size))[0]
        if place == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            self.memo[place] = self.stack[-1]

    def get(self, number: struct.Struct) -> None:
        self.stack.append(self.memo[number.unpack(self.read(number.size))[0]])

    def named(self) -> None:
        module, name = (str(self.readline()[:-1], "utf-8") for _ in range(2))
        self.stack.append(self.names.find(module, name))

    def named_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("it names something by no string")
        self.stack.append(self.names.find(module, name))

    def reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(self._made(called, arguments))

    def new_with_keywords(self) -> None:
        if self.stack.pop() != {}:
            raise pickle.UnpicklingError("it makes something with keywords")
        self.reduce()

    def _made(self, called: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something without a tuple of arguments")
        if isinstance(called, Function | Unknown):
            return called.call(*arguments)
        if isinstance(called, type) and issubclass(called, Record) and not arguments:
            return called()
        raise pickle.UnpicklingError(
            f"it makes a {shown(getattr(called, '__name__', None))} in a way of its own"
        )

    def build(self) -> int:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            filled = state != {}
            target.set_state(state)
            return _ITEMS if filled and state == {} else 0
        elif type(target) is not dict:  # what an OrderedDict has besides its items
            raise pickle.UnpicklingError(f"it changes a {type(target).__name__}")
        return 0

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise pickle.UnpicklingError("it refers to something outside")
        self.stack.append(self.persistent(self.stack.pop()))


def _check_keys(keys: list[Any]) -> None:
    """Raises where hashing one would run through a structure, which may be as large as two to its depth."""
    for parts in ([key] for key in keys):
        for part in parts:
            if isinstance(part, tuple) and len(parts) < _KEY_PARTS:
                parts += part
            elif type(part) not in _KEYS and not isinstance(part, Record):
                raise pickle.UnpicklingError(f"a {type(part).__name__} is a key")


_1, _2, _4, _8 = (struct.Struct(f"<{code}") for code in "BHIQ")
_MARK, _ITEMS = 96, 176
# of an instruction: the bytes of memory that it may take; what it does
_INSTRUCTIONS: Mapping[bytes, tuple[Any, ...]] = {
    pickle.PROTO: (8, _Reader.protocol),
    pickle.FRAME: (8, _Reader.frame),
    pickle.MARK: (_MARK, _Reader.mark),
    pickle.POP: (8, _Reader.pop),
    pickle.POP_MARK: (8, _Reader.pop_mark),
    pickle.NONE: (8, _Reader.value, None),
    pickle.NEWTRUE: (8, _Reader.value, True),
    pickle.NEWFALSE: (8, _Reader.value, False),
    pickle.EMPTY_TUPLE: (8, _Reader.value, ()),
    pickle.BININT1: (8, _Reader.number, _1),
    pickle.BININT2: (64, _Reader.number, _2),
    pickle.BININT: (64, _Reader.number, struct.Struct("<i")),
    pickle.BINFLOAT: (64, _Reader.number, struct.Struct(">d")),
    **{code: (64, _Reader.long, size) for code, size in ((pickle.LONG1, _1), (pickle.LONG4, _4))},
    **{
        code: (96, step, size)
        for step, codes in (
            (_Reader.text, (pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8)),
            (_Reader.raw, (pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8)),
        )
        for code, size in zip(codes, (_1, _4, _8), strict=True)
    },
    **{
        code: (64 + 16 * (n // 2), _Reader.tuple_of, n)
        for n, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), start=1)
    },
    pickle.TUPLE: (64, _Reader.tuple_marked),
    pickle.EMPTY_LIST: (64, _Reader.empty, list),
    pickle.APPEND: (64, _Reader.append),
    pickle.APPENDS: (64, _Reader.appends),
    pickle.EMPTY_SET: (64, _Reader.empty, list),  # sets are read as lists
    pickle.ADDITEMS: (64, _Reader.add),
    pickle.FROZENSET: (64, _Reader.frozen),
    pickle.EMPTY_DICT: (64, _Reader.empty, dict),
    pickle.SETITEM: (_ITEMS, _Reader.set_item),
    pickle.SETITEMS: (_ITEMS, _Reader.set_items),
    pickle.MEMOIZE: (16, _Reader.memoize),
    **{code: (16, _Reader.put, size) for code, size in ((pickle.BINPUT, _1), (pickle.LONG_BINPUT, _4))},
    **{code: (8, _Reader.get, size) for code, size in ((pickle.BINGET, _1), (pickle.LONG_BINGET, _4))},
    pickle.GLOBAL: (128, _Reader.named),
    pickle.STACK_GLOBAL: (128, _Reader.named_on_stack),
    pickle.REDUCE: (96, _Reader.reduce),
    pickle.NEWOBJ: (96, _Reader.reduce),
    pickle.NEWOBJ_EX: (96, _Reader.new_with_keywords),
    pickle.BUILD: (8, _Reader.build),
    pickle.BINPERSID: (96, _Reader.persistent_id),
}
