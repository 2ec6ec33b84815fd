"""What a checkpoint knows about itself besides its weights: ``elastic.json`` and the Hugging Face side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_files import plain_numbers, read_object, write_object
from ..files.reading import inside
from ..recipe.types import did_you_mean
from ..space import Budget, ElasticSpace, ParentShape, SubmodelSpec
from ..space.stated import checked_name, listed, section, shown
from .hf_quantised import Quantised, from_file

FILE = "elastic.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint; ``elastic.json`` beside the shards and ``elastic_config.json`` in exports.

    Args:
        shape: the model the weights belong to.
        space: choices and stored order; ``None`` for a model that is not elastic.
        budgets, submodels: the trained family, by name.
        ranking: digest of the ranking that sorted the weights; ``None`` for unsorted ones.
        hf_config: the parent's ``config.json``, from which exports are derived.
        versions: package versions that wrote the file.
        quantised: how the weights will be stored that training rounds already; ``None`` where they are what they are.
            Only in ``elastic.json``: directories say it in ``hf_quant_config.json``.
    """

    shape: ParentShape
    space: ElasticSpace | None = None
    budgets: tuple[Budget, ...] = ()
    submodels: Mapping[str, SubmodelSpec] = field(default_factory=dict)
    ranking: str | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    quantised: Quantised | None = None

    def submodel(self, name: str) -> SubmodelSpec:
        """A submodel by name. Raises ``UserError`` listing the known names."""
        if name not in self.submodels:
            known = ", ".join(self.submodels) or "none: the checkpoint is not elastic"
            hint = did_you_mean(name, self.submodels)
            raise UserError(f"unknown submodel {name!r}{hint or ';'} this checkpoint has {known}")
        return self.submodels[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "shape": self.shape.to_dict(),
            "space": self.space.to_dict() if self.space else None,
            "budgets": [b.to_dict() for b in self.budgets],
            "submodels": {n: s.to_dict() for n, s in self.submodels.items()},
            "ranking": self.ranking,
            "hf_config": plain_numbers(dict(self.hf_config)),
            "versions": dict(self.versions),
            **({"quantised": dict(self.quantised.file)} if self.quantised is not None else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = FILE) -> Manifest:
        """Inverse of ``to_dict``. Raises ``UserError`` for an unknown version or a damaged file."""
        if data.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{source} has format_version {data.get('format_version')!r}, this release reads "
                f"{FORMAT_VERSION}; use the elastic-megatron release that wrote it"
            )
        try:
            return cls._of(data)
        except KeyError as e:
            raise UserError(f"{source} is damaged (it has no {e}); restore it from a backup") from None
        except (TypeError, ValueError, AttributeError) as e:
            what = e if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
            raise UserError(f"{source} is damaged ({what}); restore it from a backup") from None

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Manifest:
        space = None if data["space"] is None else ElasticSpace.from_dict(data["space"])
        submodels = {
            checked_name(name, "submodel"): SubmodelSpec.from_dict(widths)
            for name, widths in section(data["submodels"], "submodels").items()
        }
        manifest = cls(
            shape=ParentShape.from_dict(section(data["shape"], "shape")),
            space=space,
            budgets=tuple(Budget.from_dict(b) for b in listed(data["budgets"], "budgets")),
            submodels=submodels,
            ranking=data["ranking"],
            hf_config=section(data["hf_config"], "hf_config"),
            versions=section(data["versions"], "versions"),
            quantised=from_file(data["quantised"]) if "quantised" in data else None,
        )
        if not isinstance(manifest.ranking, str | None):
            raise UserError(f"ranking is {shown(manifest.ranking)}; it must be a digest or null")
        if space is None and submodels:
            raise UserError("it has submodels and no space that they are of")
        if space is not None and space.parent != manifest.shape:
            raise UserError("shape and space disagree")
        for name, spec in submodels.items():
            assert space is not None
            space.check(spec, f"submodel {name}")
        return manifest

    def write(self, path: Path) -> None:
        write_object(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``elastic.json`` or ``elastic_config.json``. Raises ``UserError`` where it is missing or damaged."""
        data = read_object(
            inside(path.parent, path.name, path.parent),
            f"is {path.parent} a checkpoint of this project?",
            "restore it from a backup",
        )
        return cls.from_dict(data, str(path))
