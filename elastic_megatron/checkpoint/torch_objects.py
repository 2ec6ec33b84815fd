"""What pickled tensors and the objects beside them stand for: their description, of which nothing is built.

What is read here is what torch may be given to load afterwards, so each entry refuses the arguments with which the real
function or class would run foreign code, take memory that the file does not have, or look outside of a storage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from .dist_metadata import dtypes, number, size
from .pickle_names import Attributes, Function, Names, Record, Unknown

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
    }.items()
}  # fmt: skip
_SIMPLE_ARRAYS = re.compile(r"[<>|=]?([biufc])(\d{1,2})")
_MEGATRON_ENUMS = {
    "megatron.core.enums": ("ModelType",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": (
        *(
            "AttnBackend",
            "AttnMaskType",
            "AttnType",
            "CudaGraphModule",
            "CudaGraphScope",
            "InferenceCudaGraphScope",
        ),
        *("LayerType", "ModelType"),
    ),
    "signal": ("Signals",),
}


class SavedStorage(NamedTuple):
    """The record that holds a storage, and how many bytes of it."""

    dtype: torch.dtype
    record: str
    nbytes: int


class SavedTensor(NamedTuple):
    """How a tensor lies in a storage; ``offset`` and ``stride`` count values."""

    storage: SavedStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def storage(pid: Any) -> SavedStorage:
    """What the persistent id of a storage says. Raises ``ValueError``."""
    kind, dtype, record, location, count = pid
    legal = kind == "storage" and type(dtype) is torch.dtype and type(count) is int and count >= 0
    if not legal or type(location) is not str or type(record) is not str or not record.isdecimal():
        raise ValueError("what it refers to outside is no storage")
    return SavedStorage(dtype, record, count * dtype.itemsize)


def _tensor(saved: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    if type(saved) is not SavedStorage:
        raise ValueError("a tensor lies in no storage")
    return _as_dtype(saved, offset, shape, stride, saved.dtype)


def _typed_tensor(
    saved: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> Any:
    """Of a dtype that has no storage class."""
    if type(saved) is not SavedStorage or type(dtype) is not torch.dtype:
        raise ValueError("a tensor lies in no storage, or has no dtype")
    return _as_dtype(saved, offset, shape, stride, dtype)


def _as_dtype(saved: SavedStorage, offset: Any, shape: Any, stride: Any, dtype: torch.dtype) -> SavedTensor:
    shape, stride, (offset,) = size(shape), size(stride), size((offset,))
    if len(shape) != len(stride):
        raise ValueError("a tensor has other strides than dimensions")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    count = prod(shape)
    if count and (max(last + 1, count) * dtype.itemsize > saved.nbytes):
        raise ValueError("a tensor is larger than its storage")
    return SavedTensor(saved, dtype, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> SavedTensor:
    if type(data) is not SavedTensor:
        raise ValueError("a parameter is no tensor")
    return data


def _plain(check: Callable[..., bool], make: Callable[..., Any]) -> Function:
    """A function of plain arguments."""

    def call(*arguments: Any) -> Any:
        if not check(*arguments):
            raise ValueError("a function is called with what pickles do not give it")
        return make(*arguments)

    return Function(call)


def _scalars(*values: Any) -> bool:
    return all(type(v) in (int, float, str, type(None)) for v in values)


def _scalar_list(*lists: Any) -> bool:
    return all(type(values) in (list, tuple) and _scalars(*values) for values in lists) and len(lists) <= 1


class _BytesFile(Record):
    """``io.BytesIO``: its content."""

    __slots__ = ("content",)

    def set_state(self, state: Any) -> None:
        content, position, attributes = state
        if type(content) is not bytes or type(position) is not int or attributes is not None:
            raise ValueError("a file in memory is not as pickles keep it")
        self.content = content


class _ArrayType(Record):
    """``numpy.dtype`` of plain numbers; its state is their byte order."""

    __slots__ = ("itemsize",)

    def __init__(self, name: Any = "", *_: Any) -> None:
        found = _SIMPLE_ARRAYS.fullmatch(name) if type(name) is str else None
        if found is None:
            raise ValueError("an array is of no plain numbers")
        self.itemsize = int(found[2])

    def set_state(self, state: Any) -> None:
        version, order, *rest = state
        if type(version) is not int or order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None]:
            raise ValueError("an array is of no plain numbers")


class _Array(Record):
    """``numpy.ndarray``: shape, type and bytes."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        if type(dtype) is not _ArrayType or type(content) is not bytes:
            raise ValueError("an array is of no plain numbers")
        if prod(size(shape)) * dtype.itemsize != len(content):
            raise ValueError("an array is not as large as its shape")


def _array_scalar(dtype: Any, content: Any) -> bool:
    return type(dtype) is _ArrayType and type(content) is bytes and len(content) == dtype.itemsize


_OF_TENSORS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("collections", "OrderedDict"): Function(lambda: {}),
    ("torch", "Size"): Function(size),
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **dtypes(),
}
_BUILTIN = {
    "bytes": _plain(lambda *a: not a, bytes),
    "bytearray": _plain(lambda *a: all(type(v) is bytes for v in a) and len(a) < 2, bytearray),
    "set": _plain(_scalar_list, lambda *a: [*a]),
    "frozenset": _plain(_scalar_list, lambda *a: [*a]),
    "complex": _plain(lambda *a: _scalars(*a) and len(a) == 2, complex),
    "slice": _plain(lambda *a: _scalars(*a) and len(a) == 3, slice),
    "range": _plain(lambda *a: _scalars(*a) and len(a) == 3, range),
}
_OF_OBJECTS: Mapping[tuple[str, str], Any] = {
    **_OF_TENSORS,
    **{(module, name): f for name, f in _BUILTIN.items() for module in ("builtins", "__builtin__")},
    **{(module, name): Function(number) for module, names in _MEGATRON_ENUMS.items() for name in names},
    ("_codecs", "encode"): _plain(
        lambda *a: len(a) == 2 and type(a[0]) is str and a[1] in ("latin1", "latin-1"),
        lambda text, coding: text.encode(coding),
    ),
    ("_io", "BytesIO"): _BytesFile,
    ("argparse", "Namespace"): Attributes,
    ("types", "SimpleNamespace"): Attributes,
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"): Attributes,
    ("pathlib", "PosixPath"): _plain(
        lambda *a: all(type(v) is str for v in a), lambda *parts: "/".join(parts)
    ),
    ("torch", "device"): _plain(lambda *a: _scalars(*a) and len(a) < 3, lambda *a: ":".join(map(str, a))),
    ("torch.serialization", "_get_layout"): Function(number),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): Function(_ArrayType),
    **{
        (f"{package}.multiarray", name): made
        for package in ("numpy.core", "numpy._core")
        for name, made in {
            "_reconstruct": _plain(
                lambda cls, shape, code: cls is _Array and shape == (0,), lambda *_: _Array()
            ),
            "scalar": _plain(_array_scalar, lambda *_: None),
        }.items()
    },
}
TENSORS = Names(_OF_TENSORS)
OBJECTS = Names(_OF_OBJECTS)
# what is only looked at: classes that are not known are left out, methods too, which pickles get by their name
_METHOD = {
    (module, "getattr"): Function(lambda *_: Unknown("a method")) for module in ("builtins", "__builtin__")
}
DESCRIPTIONS = Names({**_OF_OBJECTS, **_METHOD}, others=True)
