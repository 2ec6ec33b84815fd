"""``.metadata`` of a ``torch_dist`` folder: which tensors there are, in what chunks, and where their bytes lie.

torch reads this pickle by running what it says. Here it is read as data, by the classes that torch 2.13 and earlier
releases write there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import planner

from ..errors import UserError, of_os_error
from ..files.reading import inside, read_bytes
from . import unpickling
from .pickle_names import Attributes, Fields, Function, LaterError, Names, Record, RefusedError, shown
from .raw import REMEDY

FILE = ".metadata"
_DIMENSIONS = 8


class Size(tuple[int, ...]):
    """``torch.Size``, of numbers that a size can have."""

    __slots__ = ()


def size(numbers: Any = ()) -> Size:
    """What calling ``torch.Size`` gives. Raises ``ValueError``."""
    if type(numbers) not in (tuple, list, Size) or len(numbers) > _DIMENSIONS:
        raise ValueError("a size is no short tuple")
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
        raise ValueError("a size is no tuple of counts")
    return Size(numbers)


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _anything(_: Any) -> bool:
    return True


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


class Chunk(Fields, legal={"offsets": _is(Size), "sizes": _is(Size)}):
    """A box of a tensor."""

    __slots__ = ("offsets", "sizes")
    offsets: Size
    sizes: Size


class Properties(Record):
    """Of a tensor, what has an influence on its bytes."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 5 or type(state[0]) is not torch.dtype:
            raise ValueError("the properties of a tensor are no tuple that begins with its dtype")
        if len(state) > 5:
            raise LaterError(f"tensors with {len(state)} properties")
        self.dtype = state[0]


class TensorItem(Fields, legal={"properties": _is(Properties), "size": _is(Size), "chunks": _is(list)}):
    """A tensor: its properties, its shape and the chunks that it was cut into."""

    __slots__ = ("chunks", "properties", "size")
    properties: Properties
    size: Size
    chunks: list[Chunk]


class BytesItem(Fields, legal={}):
    """An object that is no tensor."""

    __slots__ = ()


class Index(Fields, legal={"fqn": _is(str), "offset": _is(Size, type(None)), "index": _is(int, type(None))}):
    """What a chunk or an object is found by."""

    __slots__ = ("fqn", "index", "offset")
    fqn: str
    offset: Size | None

    def __init__(self) -> None:
        self.offset = None


class Place(
    Fields,
    legal={
        "relative_path": lambda value: type(value) is str and value.isprintable(),
        "offset": _count,
        "length": _count,
        "transform_descriptors": _is(list, tuple, type(None)),
    },
):
    """Where a chunk or an object lies: ``length`` bytes of a file from ``offset``."""

    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")
    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any

    def __init__(self) -> None:
        self.transform_descriptors = None


_CONTENT = ("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version")
_OF_MEGATRON = ("mcore_data", "all_local_plans")


class _Content(
    Fields,
    legal={name: _anything for name in (*_CONTENT, *_OF_MEGATRON)}
    | {"state_dict_metadata": _is(dict), "storage_data": _is(dict)},
):
    """All of it. Megatron adds fields of its own, which no reader needs."""

    __slots__ = (*_CONTENT, *_OF_MEGATRON)
    state_dict_metadata: dict[Any, Any]
    storage_data: dict[Any, Any]


def _only(cls: type) -> type[Fields]:
    """A dataclass of torch's that is read past: any values of its fields."""
    names = tuple(f.name for f in dataclasses.fields(cls))
    return type(cls.__name__, (Fields,), {"__slots__": names}, legal=dict.fromkeys(names, _anything))


def number(value: Any) -> Any:
    """What calling an enumeration gives."""
    if type(value) not in (int, str):
        raise ValueError("an enumeration is called with no number")
    return value


def dtypes() -> dict[tuple[str, str], torch.dtype]:
    """Every dtype of this torch, under the names that it has in pickles."""
    named = ((name, getattr(torch, name)) for name in dir(torch) if name.islower() or name[-1].isdigit())
    return {("torch", name): value for name, value in named if isinstance(value, torch.dtype)}


_PACKAGE = "torch.distributed.checkpoint"
_NAMES = Names(
    {
        **dtypes(),
        ("torch", "Size"): Function(size),
        ("torch.serialization", "_get_layout"): Function(number),
        ("collections", "OrderedDict"): Function(lambda: {}),
        ("pathlib", "PosixPath"): Function(lambda *parts: "/".join(parts)),
        (f"{_PACKAGE}.metadata", "Metadata"): _Content,
        (f"{_PACKAGE}.metadata", "TensorStorageMetadata"): TensorItem,
        (f"{_PACKAGE}.metadata", "BytesStorageMetadata"): BytesItem,
        (f"{_PACKAGE}.metadata", "ChunkStorageMetadata"): Chunk,
        (f"{_PACKAGE}.metadata", "TensorProperties"): Properties,
        (f"{_PACKAGE}.metadata", "MetadataIndex"): Index,
        (f"{_PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"): Function(number),
        (f"{_PACKAGE}.metadata", "StorageMeta"): Attributes,
        (f"{_PACKAGE}.filesystem", "_StorageInfo"): Place,
        (f"{_PACKAGE}.planner", "SavePlan"): _only(planner.SavePlan),
        (f"{_PACKAGE}.planner", "WriteItem"): _only(planner.WriteItem),
        (f"{_PACKAGE}.planner", "TensorWriteData"): _only(planner.TensorWriteData),
        (f"{_PACKAGE}.planner", "WriteItemType"): Function(number),
    },
    later=lambda module, name: (
        module.startswith(f"{_PACKAGE}.") or (module == "torch" and name not in vars(torch))
    ),
)


@dataclass(frozen=True)
class DistMetadata:
    """What the ``.metadata`` of a folder says.

    Args:
        tensors, objects: by key.
        places: of a chunk by (key, its offsets), of an object by (key, None).
    """

    folder: Path
    tensors: Mapping[str, TensorItem]
    objects: Mapping[str, BytesItem]
    places: Mapping[tuple[str, Size | None], Place]

    def place(self, key: str, offsets: Size | None = None) -> Place:
        """Raises ``UserError`` where it is not known, or lies in no file of the folder."""
        found = self.places.get((key, offsets))
        if found is None:
            raise UserError(f"{self.folder / FILE} does not say where {key!r} is; {REMEDY}")
        return found

    def file(self, place: Place) -> Path:
        """Raises ``UserError`` where it is outside the folder."""
        return inside(self.folder, place.relative_path, self.folder / FILE)


def read_metadata(folder: Path) -> DistMetadata:
    """Read ``.metadata``; no code of it runs.

    Raises ``UserError`` where it is missing, damaged, of a later torch, or names what has no place there.
    """
    file = folder / FILE
    with reading(file):
        content = unpickling.load(read_bytes(file, unpickling.SIZE_LIMIT), _NAMES)
        if type(content) is not _Content:
            raise TypeError(f"it holds a {type(content).__name__}")
        items, places = content.state_dict_metadata, content.storage_data
        if not all(type(key) is str and type(item) in (TensorItem, BytesItem) for key, item in items.items()):
            raise TypeError("it says more than of tensors and objects what they are")
        if not all(type(index) is Index and type(place) is Place for index, place in places.items()):
            raise TypeError("it does not say where the tensors are")
        tensors = {key: item for key, item in items.items() if type(item) is TensorItem}
        for key, tensor in tensors.items():
            _check_tensor(key, tensor)
        return DistMetadata(
            folder,
            tensors,
            {key: item for key, item in items.items() if type(item) is BytesItem},
            {(index.fqn, index.offset): place for index, place in places.items()},
        )


def _check_tensor(key: str, tensor: TensorItem) -> None:
    dimensions = len(tensor.size)
    for chunk in tensor.chunks:
        if type(chunk) is not Chunk or not len(chunk.offsets) == len(chunk.sizes) == dimensions:
            raise TypeError(f"a chunk of {shown(key)} is not of its shape")
    assert type(tensor.properties.dtype) is torch.dtype


def is_tiling(shape: Iterable[int], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Do boxes (offsets, sizes) cover a shape, each place of it exactly once?

    They do where their volumes add up and each corner, but for those of the whole, is one of an even number of boxes:
    differences along all dimensions determine a function, so the number of boxes over a place is odd inside the
    shape and even outside; and volumes that add up leave no room for three.
    """
    shape, corners, volume = tuple(shape), set[tuple[int, ...]](), 0
    for offsets, sizes in (*boxes, ((0,) * len(shape), shape)):
        volume += prod(sizes)
        for corner in product(*((o, o + n) for o, n in zip(offsets, sizes, strict=True))):
            corners ^= {corner}
    return not corners and volume == 2 * prod(shape)


@contextlib.contextmanager
def reading(file: Path, remedy: str = REMEDY, damaged: type[UserError] = UserError) -> Iterator[None]:
    """What a pickle of a file may raise, as a ``UserError`` of one line, and of the kind ``damaged`` for damage."""
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        raise of_os_error(e, f"{file} cannot be read") or UserError(
            f"{file} cannot be read ({e.strerror}); {remedy}"
        ) from None
    except RefusedError as e:
        raise UserError(
            f"{file} names {e}, which no checkpoint needs and which could do harm; nothing of it was run: get the "
            "checkpoint from somebody you trust"
        ) from None
    except LaterError as e:
        raise UserError(
            f"{file} holds {e}, which torch {torch.__version__} does not know: a later release wrote it; install "
            "that one, or save the checkpoint with this one"
        ) from None
    except Exception as e:  # damaged pickles raise all kinds
        raise damaged(f"{file} is damaged ({type(e).__name__}: {reason(e)}); {remedy}") from None


def reason(error: Exception) -> str:
    """One short line."""
    return shown(" ".join(str(error).split()))
