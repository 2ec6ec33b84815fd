"""Everything that decides whether a job's numbers fit together, and the same with a few of them changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, Protocol

from ..errors import UserError
from ..quantization.formats import FORMATS
from ..space import ElasticSpace, ParentShape, TensorLayout
from .parallel import Batch, Layout

# key of the recipe, as a `key=value` override writes it -> its new value
Change = Mapping[str, Any]
# format, as recipes spell it -> neighbouring input columns that share a scale
BLOCKS = {form.name: form.block for form in FORMATS.values()}


class Calibration(Protocol):
    """What a pass over calibration data feeds, as in a recipe's ``rank`` or ``quantize``."""

    @property
    def samples(self) -> int: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...


@dataclass(frozen=True)
class LayoutSizes:
    """A ``Layout`` that can be changed."""

    tensor: int
    sequence: bool
    expert: int
    expert_tensor: int | None
    pipeline: int
    virtual_pipeline: int | None
    context: int
    world_size: int | None
    recompute: bool = False
    distributed_optimizer: bool = False
    dispatcher: str = "alltoall"


@dataclass(frozen=True)
class Setting:
    """A model, its family, and the numbers it is to run with.

    Args:
        stages: of training; ``calibration``: of a pass over data, and the ``section`` of the recipe that says so.
        ranks_per_node: where the ranks are counted in nodes, else ``None``; ``most_per_node`` and ``most_nodes`` limit
            what may be asked for.
        blocks: columns of a quantisation block, 1 without: every rank's share of a width is whole blocks.
        quantised: the weights that are stored in such blocks.
        frozen: are the widths those of a trained family, which no setting changes?
        draws: do the stages draw widths (a run with budgets)?
        granule: axis -> what its widths are multiples of, as the recipe wants it.
        gpus: will it run on GPUs, whose kernels do not take every size?
    """

    shape: ParentShape
    space: ElasticSpace | None
    parallel: LayoutSizes
    stages: tuple[Batch, ...] = ()
    calibration: Calibration | None = None
    section: str = "rank"
    ranks_per_node: int | None = None
    most_per_node: int | None = None
    most_nodes: int | None = None
    blocks: int = 1
    quantised: tuple[TensorLayout, ...] = ()
    frozen: bool = False
    draws: bool = False
    granule: Mapping[str, int] = field(default_factory=dict)
    gpus: bool = False

    @classmethod
    def of(
        cls,
        shape: ParentShape,
        space: ElasticSpace | None,
        parallel: Layout,
        stages: Sequence[Batch] = (),
        **rest: Any,
    ) -> Setting:
        return cls(shape, space, sizes_of(parallel), tuple(stages), **rest)

    def changed(self, change: Change) -> Setting | None:
        """This with other numbers; ``None`` where they are no legal widths of the model."""
        setting = self
        for key, value in change.items():
            section, _, name = key.partition(".")
            if section == "parallel":
                setting = replace(setting, parallel=replace(setting.parallel, **{name: _plain(name, value)}))
            elif section == "slurm":
                nodes, node = setting.nodes, setting.ranks_per_node or 1
                nodes, node = (value, node) if name == "nodes" else (nodes, value)
                if setting.most_nodes is not None and nodes > setting.most_nodes:
                    return None
                parallel = replace(setting.parallel, world_size=nodes * node)
                setting = replace(setting, parallel=parallel, ranks_per_node=node)
            elif section == "quantize" and name == "format":
                setting = replace(setting, blocks=BLOCKS[value])
            elif section == setting.section:
                setting = replace(setting, calibration=_with(setting.calibration, name, value))
            elif section == "stages":
                index, _, own = name.partition(".")
                stages = list(setting.stages)
                stages[int(index)] = _with(stages[int(index)], own, value)
                setting = replace(setting, stages=tuple(stages))
            else:
                assert section == "space", key
                space = _with_space(setting, name, value)
                if space is None:
                    return None
                setting = replace(setting, space=space)
        return setting

    @property
    def nodes(self) -> int:
        return (self.parallel.world_size or 1) // (self.ranks_per_node or 1)

    def nodes_or_ranks(self, ranks: int) -> Change:
        """The change that starts this many ranks."""
        if self.ranks_per_node is None:
            return {"parallel.world_size": ranks}
        return {"slurm.nodes": ranks // self.ranks_per_node}


def sizes_of(parallel: Layout) -> LayoutSizes:
    """The numbers of a recipe's ``parallel`` section, or of anything like it."""
    if isinstance(parallel, LayoutSizes):
        return parallel
    taken = {
        f.name: _plain(f.name, getattr(parallel, f.name))
        for f in fields(LayoutSizes)
        if hasattr(parallel, f.name)
    }
    return LayoutSizes(**taken)


def _plain(name: str, value: Any) -> Any:
    return value == "full" if name == "recompute" and isinstance(value, str) else value


def _with(section: Any, name: str, value: Any) -> Any:
    """A section of a recipe with one field changed; what it derives from its fields follows."""
    if hasattr(section, "model_copy"):
        return section.model_copy(update={name: value})
    return SimpleNamespace(**{**vars(section), name: value})


def _with_space(setting: Setting, name: str, value: Any) -> ElasticSpace | None:
    space, (part, _, axis) = setting.space, name.partition(".")
    assert space is not None and part in ("choices", "lanes")
    choices, lanes = dict(space.choices), dict(space.lanes)
    (choices if part == "choices" else lanes)[axis] = value
    try:
        return ElasticSpace.build(
            space.parent, choices, lanes, setting.granule, sorted(space.per_layer), space.layer_order
        )
    except UserError:
        return None
