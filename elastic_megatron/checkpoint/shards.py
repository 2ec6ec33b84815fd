"""The tensors of a sharded model: which part of each this rank holds, by the fact table.

A dimension is shared by ranks exactly where its extent on this rank is not the table's. A fused dimension that
is not interleaved by the table itself (``[z | x | B | C | dt]``) is shared segment by segment, so the ranks' parts
one after another are the table's order interleaved by rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost.sizes import parent_fields
from ..ops.locate import locate, weights
from ..space import ParentShape, TensorLayout, ends

# elements that are permuted at once: 16 MB in fp32, three or four times that with what an exchange sends and receives
TILE = 1 << 22


@dataclass(frozen=True)
class Shard:
    """A parameter or buffer of a pipeline chunk.

    Args:
        name: of the whole tensor in the whole model, as the local spec spells it.
        tensor: this rank's part, in the chunk's own storage.
        layout: of the whole tensor.
        sizes: of the whole model.
        layer, expert: whose tensor it is, numbered in the whole model.
        dim: the dimension that ranks share, ``None`` where this rank holds all of it.
        group: those ranks.
        module: path of the module that holds it, inside the chunk.
    """

    name: str
    tensor: Tensor
    layout: TensorLayout
    sizes: Mapping[str, int]
    layer: int | None
    expert: int | None
    dim: int | None
    group: Any
    module: str

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        if self.dim is None:
            return whole
        pieces: Sequence[Tensor] = [whole]
        if not self.layout.interleave:
            pieces = whole.split([s.size(self.sizes) for s in self.layout.dims[self.dim]], self.dim)
        own = [piece.chunk(self.group.size(), self.dim)[self.group.rank()] for piece in pieces]
        return torch.cat(own, self.dim)

    def permute(self, orders: Mapping[str, Sequence[int]]) -> None:
        """Permute axes of the whole, in place; collective over ``group``. Needs the memory of a few tiles."""
        for dim in range(self.tensor.dim()):
            by_rank = dim == self.dim and not self.layout.interleave
            positions = self.layout.gather(dim, self.sizes, orders, self.group.size() if by_rank else None)
            if positions is None or positions == list(range(len(positions))):
                continue
            source = torch.tensor(positions, device=self.tensor.device)
            for tile in _tiles(self.tensor, dim):
                if dim == self.dim:
                    tile.copy_(exchange(tile, dim, source, self.group))
                else:
                    tile.copy_(tile.index_select(dim, source))


def _tiles(tensor: Tensor, dim: int) -> Sequence[Tensor]:
    """Views of about ``TILE`` elements that together are the tensor, each with the whole of one dimension."""
    others = [d for d in range(tensor.dim()) if d != dim]
    if not others:
        return [tensor]
    across = max(others, key=lambda d: tensor.shape[d])
    return tensor.split(max(1, TILE * tensor.shape[across] // tensor.numel()), across)


def shards(chunk: Any, parent: ParentShape) -> Iterator[Shard]:
    """Every tensor of a bare pipeline chunk of a model of that shape; views, so that writing changes the chunk.

    Raises ``UserError`` for a tensor the fact table does not know.
    """
    groups, sizes = chunk.pg_collection, parent_fields(parent)
    first_expert = groups.ep.rank() * (parent.num_moe_experts // groups.ep.size())
    numbers = {
        f"decoder.layers.{i}.": module.layer_number - 1 for i, module in enumerate(chunk.decoder.layers)
    }
    embedding, *_ = ends(parent.tie_embeddings)
    for local, tensor in weights(chunk.state_dict()).items():
        module = local.rpartition(".")[0]
        if parent.tie_embeddings and local == "output_layer.weight":
            local = embedding.name  # the last pipeline stage has a copy of its own
        for prefix, number in numbers.items():
            if local.startswith(prefix):
                local = local.replace(prefix, f"decoder.layers.{number}.", 1)
                break
        layer, layout, expert = locate(parent, local)
        if expert is not None:
            expert += first_expert
        name = layout.name.format(e=expert)
        shape = layout.shape(sizes)
        dims = [d for d, (own, whole) in enumerate(zip(tensor.shape, shape, strict=True)) if own != whole]
        group = groups.expt_tp if layout.per_expert else groups.tp
        dim = dims[0] if dims else None
        assert dim is None or (len(dims) == 1 and tensor.shape[dim] * group.size() == shape[dim]), (
            f"{local} has shape {tuple(tensor.shape)}, {group.size()} ranks share {shape}"
        )
        name = name if layer is None else f"decoder.layers.{layer}.{name}"
        yield Shard(name, tensor, layout, sizes, layer, expert, dim, group, module)


def by_name(chunks: Sequence[Any], parent: ParentShape) -> dict[str, list[Shard]]:
    """This rank's shards by the name of the whole tensor; a tied embedding may be there twice."""
    found: dict[str, list[Shard]] = {}
    for chunk in chunks:
        for shard in shards(chunk, parent):
            found.setdefault(shard.name, []).append(shard)
    return found


@torch.no_grad()
def renumber(experts: Sequence[Tensor], order: Sequence[int], group: Any) -> None:
    """Put experts into another order among those of all ranks of ``group``, in place; collective.

    A few rows of every expert at a time: what moves at once is a tile, and not the experts of a layer.

    Args:
        experts: one tensor of each of this rank's experts, all of one shape.
        order: for each place, which expert goes there; both count through the ranks' experts.
    """
    source = torch.tensor(order, device=experts[0].device)
    rows = max(1, TILE // sum(expert[0].numel() for expert in experts))
    for tiles in zip(*(expert.split(rows) for expert in experts), strict=True):
        for tile, moved in zip(tiles, exchange(torch.stack(tiles), 0, source, group), strict=True):
            tile.copy_(moved)


@torch.no_grad()
def fill(parts: Mapping[str, Sequence[Shard]], state: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a whole model's tensors, one at a time, into this rank's parts of them."""
    missing = set(parts)
    for name, whole in state:
        missing.discard(name)
        for shard in parts.get(name, ()):
            shard.tensor.copy_(shard.part_of(whole))
    assert not missing, f"{len(missing)} tensors got no weights, among them {min(missing)}"


def exchange(local: Tensor, dim: int, source: Tensor, group: Any) -> Tensor:
    """This rank's part of a permuted tensor, every rank having an equal part of ``dim``; collective.

    Needs the memory of three parts besides ``local``.

    Args:
        local: this rank's part.
        dim: the dimension that the ranks of ``group`` share.
        source: int64, for each position of the whole result, where it comes from; positions count through the
            ranks' parts one after another.
    """
    own, rank = local.shape[dim], group.rank()
    if group.size() == 1:
        return local.index_select(dim, source)
    holder = source // own
    wanted = holder[rank * own : (rank + 1) * own]
    # to every rank what it wants of mine, in the order in which it wants it
    sent = source[holder == rank] - rank * own
    counts = (holder.view(group.size(), own) == rank).sum(1).tolist()
    send = local.transpose(0, dim).index_select(0, sent)
    received = torch.empty_like(send)
    torch.distributed.all_to_all_single(
        received, send, wanted.bincount(minlength=group.size()).tolist(), counts, group=group
    )
    # what came from one rank lies together; back to where it belongs
    result = torch.empty_like(received)
    result[wanted.argsort(stable=True)] = received
    return result.transpose(0, dim)
