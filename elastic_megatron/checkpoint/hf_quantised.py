"""Which weights of a Hugging Face directory are quantised, and how: ModelOpt's two descriptions. No torch.

``hf_quant_config.json`` and ``quantization_config`` of ``config.json`` say the same twice: the algorithm, and the
modules that it leaves alone, by name or by pattern. Nothing is guessed from the tensors; they are checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..quantization.formats import FORMATS, Format
from ..space import ElasticSpace, SubmodelSpec, TensorLayout, ends, tensors_of
from .hf_keys import exported_fp32, hf_keys, module_of
from .json_files import read_object

FILE = "hf_quant_config.json"
KEY = "quantization_config"
_EXCLUDED, _IGNORED = "exclude_modules", "ignore"


@dataclass(frozen=True)
class Quantised:
    """How the weights of a directory are stored.

    Args:
        format: of the quantised ones.
        patterns: of the modules that are not.
        file: ``hf_quant_config.json``.
        config: ``quantization_config`` of ``config.json``.
    """

    format: Format
    patterns: tuple[str, ...]
    file: Mapping[str, Any] = field(repr=False, hash=False)
    config: Mapping[str, Any] = field(repr=False, hash=False)

    def excludes(self, key: str) -> bool:
        """Is the module of this tensor left alone?"""
        return self._excluded.fullmatch(module_of(key)) is not None

    def stores(self, layout: TensorLayout, layer: int | None, expert: int | None) -> bool:
        """Is this tensor of the model stored in the format?

        Raises ``UserError`` where only some of the modules that Megatron keeps in one are.
        """
        if not quantisable(layout):
            return False
        keys = hf_keys(layout, layer, expert)
        excluded = [self.excludes(key) for key in keys]
        if any(excluded) and not all(excluded):
            raise UserError(
                f"{FILE} excludes {module_of(keys[excluded.index(True)])!r} but not "
                f"{module_of(keys[excluded.index(False)])!r}, which are one linear; exclude both or neither"
            )
        return not all(excluded)

    def excluding(self, modules: Iterable[str]) -> Quantised:
        """The same format with these modules left alone, by name."""
        names = list(modules)
        quantization = {**self.file["quantization"], _EXCLUDED: names}
        file = {**self.file, "quantization": quantization}
        return Quantised(self.format, tuple(names), file, {**self.config, _IGNORED: names})

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return re.compile("|".join(translate(p) for p in self.patterns) or r"(?!)")


def quantisable(layout: TensorLayout) -> bool:
    """Linears; the router of the experts is one, and stays fp32."""
    return layout.role == "matmul" and not layout.fp32


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without what it says of quantisation: that of the numbers the weights stand for."""
    return {k: v for k, v in config.items() if k != KEY}


def read_quantised(directory: Path, config: Mapping[str, Any]) -> Quantised | None:
    """How a directory with this ``config.json`` is quantised; ``None`` where it is not.

    Raises ``UserError`` that names what cannot be read: another algorithm or another tool's layout, a mix of
    formats, a quantised cache, descriptions that are missing or disagree.
    """
    file, entry = directory / FILE, config.get(KEY)
    if entry is None and not file.exists():
        return None
    if not isinstance(entry, dict):
        raise UserError(f"{directory} has {FILE}, but config.json has no {KEY}; restore it, or remove {FILE}")
    method, algo = entry.get("quant_method"), entry.get("quant_algo")
    if method != "modelopt" or algo not in FORMATS:
        raise UserError(
            f"{directory} is quantised by {method} with quant_algo={algo}; only {' and '.join(FORMATS)} in "
            "ModelOpt's layout can be read: give that, or the directory with the BF16 or FP32 weights"
        )
    data = read_object(file, f"config.json says quant_algo={algo}: copy it there")
    stated = data.get("quantization")
    if not isinstance(stated, dict):
        raise UserError(f"{file} has no quantization; copy it again")
    _check(file, FORMATS[algo], stated, entry)
    return Quantised(FORMATS[algo], tuple(stated.get(_EXCLUDED) or ()), data, entry)


def _check(file: Path, form: Format, stated: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Raise ``UserError`` unless the two descriptions say the same, and nothing that is not read."""
    if stated.get("quant_algo") != form.algo:
        raise UserError(
            f"{file} says quant_algo={stated.get('quant_algo')}, config.json {form.algo}; restore the right one"
        )
    lists = [said.get(key) or [] for said, key in ((stated, _EXCLUDED), (entry, _IGNORED))]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise UserError(f"{file} or config.json has a list of excluded modules that is none; copy both again")
    if odd := sorted(set(lists[0]) ^ set(lists[1])):
        raise UserError(
            f"{file} and config.json exclude different modules ({odd[0]!r} is in one); restore the right one"
        )
    cache = stated.get("kv_cache_quant_algo") or entry.get("kv_cache_scheme")
    if cache:
        raise UserError(
            f"{file} quantises the key and value cache too ({cache}), whose scales cannot be cut yet; export it "
            "without"
        )
    if stated.get("quantized_layers") or entry.get("quantized_layers"):
        raise UserError(f"{file} mixes formats by layer (quantized_layers); one format for all can be read")
    groups = {stated.get("group_size"), *_group_values(entry, "group_size")} - {None}
    if form.block > 1 and (other := groups - {form.block}):
        raise UserError(f"{file}: group_size {min(other)}; {form.algo} blocks have {form.block} columns")
    if other := set(_group_values(entry, "num_bits")) - {form.bits}:
        raise UserError(
            f"{file.with_name('config.json')}: {form.algo} with num_bits {min(other)}; {form.bits} bits for weights "
            "and inputs can be read"
        )


def _group_values(entry: Mapping[str, Any], name: str) -> list[Any]:
    """What ``config_groups`` says of weights and inputs."""
    groups = entry.get("config_groups")
    found = (
        [g.get(what) for g in groups.values() for what in ("weights", "input_activations")] if groups else []
    )
    return [f[name] for f in found if isinstance(f, dict) and name in f]


def stored_bytes(quantised: Quantised, space: ElasticSpace, spec: SubmodelSpec) -> int:
    """Bytes of a submodel's weights on disk: BF16 and, for the small tensors that exports keep so, FP32 beside."""
    sizes = parent_fields(space.parent)
    outer = {**sizes, "hidden_size": spec.get("hidden_size", space.parent.hidden_size)}
    total = sum(_bytes(quantised, t, outer, None, None) for t in ends(space.parent.tie_embeddings))
    if space.parent.tie_embeddings:
        total += _bytes(quantised, ends(True)[0], outer, None, None)  # a head of its own, as exports write it
    for layer in space.kept_layers(spec):
        own = {**sizes, **space.layer_sizes(spec, layer)}
        for layout in tensors_of(space.parent.hybrid_layer_pattern[layer], own):
            experts = space.kept("num_moe_experts", own["num_moe_experts"]) if layout.per_expert else (None,)
            total += sum(_bytes(quantised, layout, own, layer, e) for e in experts)
    return total


def _bytes(
    quantised: Quantised,
    layout: TensorLayout,
    sizes: Mapping[str, int],
    layer: int | None,
    expert: int | None,
) -> int:
    if not quantised.stores(layout, layer, expert):
        return (4 if exported_fp32(layout) else 2) * layout.numel(sizes)
    # rows of one linear are spread over as many tensors as it has names, each with scalars of its own
    rows, columns = layout.shape(sizes)
    more = len(hf_keys(layout)) - 1
    return quantised.format.nbytes(rows, columns) + more * quantised.format.nbytes(0, columns)
