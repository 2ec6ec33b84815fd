"""Count what a program asks of a GPU, without one: kernels, bytes, FLOPs, waits of the host, and collectives.

Tensors may be on torch's ``meta`` device, at any size: nothing is computed. Then a program that reads a number back
from the device cannot run at all, so one that does run has no such wait but those that ``synchronise`` stands for.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# NVIDIA's data sheet of the H100 SXM (https://www.nvidia.com/en-us/data-center/h100/): 3.35 TB/s; of the FLOP rates
# those with sparsity are twice these
BANDWIDTH = 3.35e12
DENSE_BF16, FP32 = 989e12, 67e12

# allocate or name memory, and launch nothing
_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach_",
              "set_", "resize_", "lift_fresh", "record_stream", "_local_scalar_dense", "squeeze_", "unsqueeze_",
              "t_", "transpose_"}  # fmt: skip
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
# read as many elements of the first argument as they write
_GATHERS = {"index_select", "index", "gather", "embedding"}
# touch as many elements of their first argument as of their source
_SCATTERS = {"index_add_", "index_add", "index_put_", "scatter_add_"}
_FILLS = {"zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
          "new_full", "arange"}  # fmt: skip
_COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
)


@dataclass
class Counts:
    """Of one program. ``seconds``: each kernel takes as long as its bytes or its FLOPs, whichever is longer."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    syncs: int = 0
    uploads: int = 0  # copies from the host; one from memory that is not pinned makes the host wait too
    collectives: int = 0
    collective_bytes: int = 0
    kernels: Tally[str] = field(default_factory=Tally)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{f.name: _minus(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def plus(self, other: Counts, times: int = 1) -> Counts:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kernels"}
        total = {name: value + times * getattr(other, name) for name, value in found.items()}
        names = {*self.kernels, *other.kernels}
        return Counts(**total, kernels=Tally({n: self.kernels[n] + times * other.kernels[n] for n in names}))

    def as_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kernels"}


def _minus(a: Any, b: Any) -> Any:
    if isinstance(a, Tally):
        return Tally({n: a[n] - b[n] for n in {*a, *b}})
    return a - b


_ACTIVE: list[Counting] = []


class Counting(TorchDispatchMode):
    """Counts the operations on tensors of ``device`` inside its context; those of other tensors are the host's."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.counts = device, Counts()

    def __enter__(self) -> Any:
        _ACTIVE.append(self)
        self._made = mock.patch.object(torch, "tensor", self._from_list(torch.tensor))
        self._made.start()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _ACTIVE.remove(self)
        self._made.stop()
        super().__exit__(*args)

    def _from_list(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``torch.tensor`` makes it on the host and copies; of that the operations show nothing."""

        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.device.type == self.device != "cpu":
                self.upload(waits=True)
            return out

        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read = {k: v for k, v in (kwargs or {}).items() if k != "out"}
        given = [t for t in tree_leaves((args, read)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        here = [t.device.type == self.device for t in (*given, *made)]
        if not any(here):
            return out
        self.counts.syncs += name in _WAITS or _by_mask(name, args)
        if name in _NO_KERNEL or _is_view(func):
            return out
        if (name in ("_to_copy", "copy_") and not all(here)) or self._host_index(name, args):
            self.upload(waits=True not in ((kwargs or {}).get("non_blocking"), *args[2:3]))
        flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) \
            if func._overloadpacket in flop_registry else 0  # fmt: skip
        self.launch(name, _moved(name, func, given, made), flops, _rate(given))
        return out

    def _host_index(self, name: str, args: Any) -> bool:
        """Is an index, a list perhaps, still with the host?"""
        indices = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dim()]
        return name.startswith("index") and any(t.device.type != self.device for t in indices)

    def upload(self, *, waits: bool) -> None:
        self.counts.uploads += 1
        self.counts.syncs += waits

    def launch(self, name: str, moved: int, flops: int = 0, rate: float = FP32, launches: int = 1) -> None:
        c = self.counts
        c.launches += launches
        c.bytes += moved
        c.flops += flops
        c.seconds += max(moved / BANDWIDTH, flops / rate)
        c.kernels[name] += launches


def kernel(name: str, reads: Iterable[Tensor], writes: Iterable[Tensor], *, flops: int = 0, launches: int = 1,
           more: int = 0) -> None:  # fmt: skip
    """Tell whoever counts of kernels that no operation of torch's stands for.

    Args:
        more: bytes that they hand to each other.
    """
    reads = list(reads)
    moved = sum(map(size, (*reads, *writes))) + more
    for counting in _ACTIVE:
        counting.launch(name, moved, flops, _rate(reads), launches)


def synchronise() -> None:
    """Tell whoever counts that the host waits for the device here."""
    for counting in _ACTIVE:
        counting.counts.syncs += 1


@contextmanager
def collectives(*, run: bool) -> Iterator[None]:
    """Count the collectives of ``torch.distributed``, by what a rank puts into them; ``run``: and do them."""

    def counted(real: Callable[..., Any], sends: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for counting in _ACTIVE:
                counting.counts.collectives += 1
                counting.counts.collective_bytes += size(args[sends])
            return real(*args, **kwargs) if run else mock.Mock()

        return call

    # all but two take what they send first
    second = {"all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"}
    dist: Any = torch.distributed
    with mock.patch.multiple(
        dist, **{name: counted(getattr(dist, name), int(name in second)) for name in _COLLECTIVES}
    ):
        yield


def size(t: Tensor) -> int:
    """Bytes in memory: what an expanded dimension repeats counts once."""
    elements = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        elements *= 1 if stride == 0 and length else length
    return elements * t.element_size()


def _moved(name: str, func: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operation reads and writes: every argument once, and every result."""
    if name in _FILLS:
        return sum(map(size, made))
    if name in _GATHERS:
        return sum(map(size, given[1:])) + 2 * sum(map(size, made))
    if name in _SCATTERS:
        return sum(map(size, given[1:])) + 2 * size(given[-1])
    once = list({id(t): t for t in given}.values())
    read = sum(map(size, once[1:] if name == "copy_" else once))
    return read + sum(map(size, made))


def _rate(given: Iterable[Tensor]) -> float:
    return DENSE_BF16 if any(t.dtype is torch.bfloat16 for t in given) else FP32


def _by_mask(name: str, args: Any) -> bool:
    """Does an index hold booleans? How many are true decides a size."""
    if name not in ("index", "index_put_", "index_put"):
        return False
    return any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])


def _is_view(func: Any) -> bool:
    """Do all results name memory of the arguments, unwritten?"""
    results = [r.alias_info for r in func._schema.returns]
    return bool(results) and all(a is not None and not a.is_write for a in results)
