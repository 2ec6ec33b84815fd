"""Which weights of a Hugging Face directory are quantised, and how: ModelOpt's two descriptions. No torch.

``hf_quant_config.json`` and ``quantization_config`` of ``config.json`` say the same twice: the algorithm, and the
modules that it leaves alone, by name or by pattern. Nothing is guessed from the tensors; they are checked against it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..files.json_files import read_object
from ..files.reading import inside
from ..quantization.formats import FORMATS, Format
from ..space import ElasticSpace, ParentShape, SubmodelSpec, TensorLayout, ends, tensors_of
from ..space.stated import listed, section, shown
from .hf_keys import canonical, exported_fp32, hf_keys, module_of

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

    def stored_keys(self, shape: ParentShape) -> tuple[tuple[int, TensorLayout, int | None], ...]:
        """(layer, layout, expert) of every weight of a model of this shape that is stored in the format."""
        return _stored_keys(self, shape)

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return re.compile("|".join(translate(p) for p in self.patterns) or r"(?!)")


@lru_cache(maxsize=8)
def _stored_keys(
    quantised: Quantised, shape: ParentShape
) -> tuple[tuple[int, TensorLayout, int | None], ...]:
    sizes = parent_fields(shape)
    return tuple(
        (layer, layout, expert)
        for layer, symbol in enumerate(shape.hybrid_layer_pattern)
        for layout in tensors_of(symbol, sizes)
        for expert in (range(shape.num_moe_experts) if layout.per_expert else (None,))
        if quantised.stores(layout, layer, expert)
    )


def described(form: Format, modules: Sequence[str], version: str) -> Quantised:
    """The descriptions that ModelOpt's exporter writes, of a model whose linears are quantised but for ``modules``."""
    producer = {"name": "modelopt", "version": version}
    group = {"group_size": form.block} if form.block > 1 else {}
    numbers = {"dynamic": False, "num_bits": form.bits, "type": "float", **group}
    quantization = {"quant_algo": form.algo, "kv_cache_quant_algo": None, **group, _EXCLUDED: list(modules)}
    config = {
        "config_groups": {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}},
        _IGNORED: list(modules), "quant_algo": form.algo, "producer": producer, "quant_method": "modelopt",
    }  # fmt: skip
    return Quantised(form, tuple(modules), {"producer": producer, "quantization": quantization}, config)


def from_file(file: Mapping[str, Any]) -> Quantised:
    """The same, from what ``described`` put into ``hf_quant_config.json``. Raises ``LookupError``, ``TypeError`` or
    ``UserError`` for anything else."""
    stated = file["quantization"]
    modules = listed(stated[_EXCLUDED], _EXCLUDED)
    if odd := [module for module in modules if not isinstance(module, str)]:
        raise UserError(f"{_EXCLUDED} has {shown(odd[0])}, which is no name of a module")
    return described(FORMATS[stated["quant_algo"]], modules, file["producer"]["version"])


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
    if method != "modelopt" or not isinstance(algo, str) or algo not in FORMATS:
        raise UserError(
            f"{directory} is quantised by {str(method)[:40]} with quant_algo={str(algo)[:40]}; only "
            f"{' and '.join(FORMATS)} in ModelOpt's layout can be read: give that, or the directory with the BF16 or "
            "FP32 weights"
        )
    data = read_object(
        inside(directory, FILE, directory), f"config.json says quant_algo={algo}: copy it there"
    )
    stated = data.get("quantization")
    if not isinstance(stated, dict):
        raise UserError(f"{file} has no quantization; copy it again")
    _check(file, FORMATS[algo], stated, entry)
    return Quantised(FORMATS[algo], tuple(map(canonical, stated.get(_EXCLUDED) or ())), data, entry)


def _check(file: Path, form: Format, stated: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Raise ``UserError`` unless the two descriptions say the same, and nothing that is not read."""
    if stated.get("quant_algo") != form.algo:
        raise UserError(
            f"{file} says quant_algo={str(stated.get('quant_algo'))[:40]}, config.json {form.algo}; restore the "
            "right one"
        )
    lists = [said.get(key) or [] for said, key in ((stated, _EXCLUDED), (entry, _IGNORED))]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise UserError(f"{file} or config.json has a list of excluded modules that is none; copy both again")
    if odd := sorted(set(lists[0]) ^ set(lists[1])):
        raise UserError(
            f"{file} and config.json exclude different modules ({shown(odd[0])} is in one); restore the right one"
        )
    cache = stated.get("kv_cache_quant_algo") or entry.get("kv_cache_scheme")
    if cache:
        raise UserError(
            f"{file} quantises the key and value cache too ({str(cache)[:40]}), whose scales cannot be cut yet; "
            "export it without"
        )
    if stated.get("quantized_layers") or entry.get("quantized_layers"):
        raise UserError(f"{file} mixes formats by layer (quantized_layers); one format for all can be read")
    groups = [stated.get("group_size"), *_group_values(entry, "group_size")]
    if form.block > 1 and (other := [size for size in groups if size not in (None, form.block)]):
        raise UserError(f"{file}: group_size {shown(other[0])}; {form.algo} blocks have {form.block} columns")
    if other := [bits for bits in _group_values(entry, "num_bits") if bits != form.bits]:
        raise UserError(
            f"{file.with_name('config.json')}: {form.algo} with num_bits {shown(other[0])}; {form.bits} bits for "
            "weights and inputs can be read"
        )


def _group_values(entry: Mapping[str, Any], name: str) -> list[Any]:
    """What ``config_groups`` says of weights and inputs."""
    groups = section(entry.get("config_groups") or {}, f"config_groups of {KEY}").values()
    found = [g.get(what) for g in groups if isinstance(g, dict) for what in ("weights", "input_activations")]
    return [f[name] for f in found if isinstance(f, dict) and name in f]


def stored_bytes(quantised: Quantised, space: ElasticSpace, spec: SubmodelSpec, *, rest: int = 2) -> int:
    """Bytes of a submodel's weights on disk.

    ``rest``: bytes of a number that is left alone; the small tensors that exports keep so are FP32 all the same.
    """
    sizes = parent_fields(space.parent)
    outer = {**sizes, "hidden_size": spec.get("hidden_size", space.parent.hidden_size)}
    whole = list(ends(space.parent.tie_embeddings))
    if space.parent.tie_embeddings:
        whole.append(ends(True)[0])  # a head of its own, as exports write it
    total = sum(_bytes(quantised, t, outer, rest, quantised.stores(t, None, None)) for t in whole)
    stored = {(layer, layout.name, expert) for layer, layout, expert in quantised.stored_keys(space.parent)}
    for layer in space.kept_layers(spec):
        own = {**sizes, **space.layer_sizes(spec, layer)}
        for layout in tensors_of(space.parent.hybrid_layer_pattern[layer], own):
            experts = space.kept("num_moe_experts", own["num_moe_experts"]) if layout.per_expert else (None,)
            counted = Counter((layer, layout.name, expert) in stored for expert in experts)
            total += sum(n * _bytes(quantised, layout, own, rest, how) for how, n in counted.items())
    return total


def _bytes(
    quantised: Quantised, layout: TensorLayout, sizes: Mapping[str, int], rest: int, stored: bool
) -> int:
    if not stored:
        return (4 if exported_fp32(layout) else rest) * layout.numel(sizes)
    # rows of one linear are spread over as many tensors as it has names, each with scalars of its own
    rows, columns = layout.shape(sizes)
    more = len(hf_keys(layout)) - 1
    return quantised.format.nbytes(rows, columns) + more * quantised.format.nbytes(0, columns)
