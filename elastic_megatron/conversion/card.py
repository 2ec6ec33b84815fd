"""``README.md`` of an exported directory: what it is, what its models cost, how to cut, load and serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..checkpoint.manifest import Manifest
from ..cost import Cost, account, metric, sizes_of_parent, sizes_of_spec
from ..quantization.formats import FP8, NVFP4, Format
from ..space import Budget, ElasticSpace, ParentShape, SubmodelSpec, apart

CONTEXT = 8192
FORMATS = {"bf16": "BF16", "fp8": "FP8", "nvfp4": "NVFP4"}
_HEADINGS = [
    "parameters",
    "active",
    *(f"{f} weights (GiB)" for f in FORMATS.values()),
    "cache of a sequence (MiB)",
]
Models = dict[str, tuple[ElasticSpace, SubmodelSpec]]
_LAYERS = {"M": "Mamba-2", "E": "MoE", "*": "attention", "-": "dense MLP"}
_METRICS = {
    "active_params": "active parameters",
    "total_params": "parameters",
    "memory_bytes": "memory",
    "latency": "latency",
}
# what transformers' grouped matrix product needs of a row of expert weights
_ROW_BYTES = 16


def model_card(
    manifest: Manifest,
    *,
    title: str,
    submodel: str | None,
    elastic: bool,
    dtype: torch.dtype,
    stored: tuple[Format, int] | None = None,
) -> str:
    """The text, with the metadata that Hugging Face reads at its top.

    Args:
        manifest: of the source; where ``elastic``, of the directory itself.
        submodel: the one that was cut out; ``None`` for a whole model.
        elastic: whether the directory carries ``elastic_config.json``.
        dtype: of most weights, or of those that are not quantised.
        stored: format and bytes of quantised weights.
    """
    space = manifest.space
    if elastic:
        assert space is not None, "only an elastic model is exported as one"
        parts = _family(manifest, space, submodel)
    elif submodel is not None:
        assert space is not None, "a manifest with submodels has a space"
        parts = _submodel(manifest, space, submodel)
    else:
        parts = _whole(manifest.shape)
    models = _models(manifest, submodel, elastic)
    form = stored[0] if stored else None
    parts += [_stored(*stored)] if stored else []
    parts = [_metadata(manifest.shape, elastic, form), f"# {title}", *parts, *_use(models, dtype, form)]
    return "\n\n".join(parts) + "\n"


def _models(manifest: Manifest, submodel: str | None, elastic: bool) -> Models:
    """The models that a directory holds, by name; the whole one has the name ``whole``."""
    space = manifest.space or ElasticSpace(manifest.shape, ())
    if submodel is not None and not elastic:
        return {submodel: (space, manifest.submodel(submodel))}
    named = manifest.submodels if elastic else {}
    whole = {} if space.full() in named.values() else {"whole": (space, space.full())}
    return whole | {name: (space, spec) for name, spec in named.items()}


def _metadata(shape: ParentShape, elastic: bool, form: Format | None) -> str:
    tags = ["nemotron_h"]
    tags += ["mamba2"] if "M" in shape.hybrid_layer_pattern else []
    tags += ["moe"] if "E" in shape.hybrid_layer_pattern else []
    tags += ["elastic"] if elastic else []
    tags += ["modelopt", form.name] if form else []
    lines = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {t}" for t in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _stored(form: Format, size: int) -> str:
    what = {
        NVFP4.name: "values of 4 bits, an FP8 scale for 16 of them and an FP32 scale for each tensor",
        FP8.name: "values of 8 bits (e4m3) and an FP32 scale for each tensor",
    }[form.name]
    return (
        f"The weights are quantised to {form.algo}: {what}, in the layout of ModelOpt's unified Hugging Face "
        f"checkpoints. They take {_significant(size / 2**30)} GiB. `hf_quant_config.json` lists the modules that are "
        "not quantised."
    )


def _whole(shape: ParentShape) -> list[str]:
    cost = account(shape, context_length=_context(shape))
    return [
        f"A language model of {_layers(shape)}, with the tensors and the `config.json` of a `nemotron_h` model. It "
        "was written by elastic_megatron.",
        _table(["", *_HEADINGS], [["this model", *_cells(cost)]]),
        _legend(shape),
    ]


def _family(manifest: Manifest, space: ElasticSpace, submodel: str | None) -> list[str]:
    shape = manifest.shape
    origin = f"`{submodel}`, itself a submodel of a larger family, and " if submodel is not None else ""
    loose = apart(manifest.submodels)
    kind = "size" if loose else "nested size"
    nested = f"{origin}{len(manifest.submodels)} {kind}{'s' * (len(manifest.submodels) != 1)}"
    rows = []
    for name, (_, spec) in _models(manifest, submodel, elastic=True).items():
        cost = account(space, spec, _context(shape))
        rows.append([name, *_cells(cost), *_budget(manifest, space, name, spec)])
    parts = [
        f"An elastic language model of {_layers(shape)}: one set of weights that holds {nested}. The "
        "directory is an ordinary one of the largest size; `elastic_config.json` says which components the others "
        "keep.",
        _table(["size", *_HEADINGS, "budget asked", "budget realised"], rows),
        _legend(shape),
        *([f"Every size is part of the largest one. {'; '.join(loose)}."] if loose else []),
    ]
    if manifest.budgets:
        parts.append(
            "A budget in percent was asked of the model that the family was trained from, and is realised as a share "
            "of the largest size here."
        )
    if not manifest.submodels:
        return parts
    active = {n: account(space, spec).active_params for n, spec in manifest.submodels.items()}
    return [
        *parts,
        "## Cut a size out",
        "Components lie by importance, so a size is cut by copying; nothing is trained or computed:",
        f"    elastic-megatron slice DIR DST --submodel {min(active, key=lambda n: active[n])}",
    ]


def _submodel(manifest: Manifest, space: ElasticSpace, name: str) -> list[str]:
    spec, context = manifest.submodel(name), _context(manifest.shape)
    asked = ""
    if budget := _budget_of(manifest, name):
        _, realised = _budget(manifest, space, name, spec)
        asked = f" Its budget was {_asked(budget)}; it has {realised}." if realised else ""
    costs = [_cells(account(space, s, context)) for s in (spec, space.full())]
    rows = [[heading, *cells] for heading, *cells in zip(_HEADINGS, *costs, strict=True)]
    for a in space.axes:
        rows.append([f"`{a}`", *(_widths(space, s, a) for s in (spec, space.full()))])
    shape = space.widest_shape(spec)
    return [
        f"A language model of {_layers(shape)}: the size `{name}`, cut out of a larger elastic model without further "
        f"training.{asked}",
        _table(["", name, "the model it was cut from"], rows),
        _legend(manifest.shape),
    ]


def _layers(shape: ParentShape) -> str:
    kinds = (f"{len(shape.layers_of(s))} {kind}" for s, kind in _LAYERS.items() if shape.layers_of(s))
    return f"{shape.num_layers} layers ({', '.join(kinds)})"


def _context(shape: ParentShape) -> int:
    return min(CONTEXT, shape.max_position_embeddings)


def _cells(cost: Cost) -> list[str]:
    """The columns of ``_HEADINGS``."""
    return [
        f"{cost.total_params:,}",
        f"{cost.active_params:,}",
        *(_significant(cost.weights_bytes[f] / 2**30) for f in FORMATS),
        _significant(cost.cache_bytes_per_sequence / 2**20),
    ]


def _legend(shape: ParentShape) -> str:
    return (
        "Active parameters are those that one token meets. FP8 and NVFP4 weights are what quantised exports of this "
        "model would take, with attention, the Mamba-2 layers before it, convolutions, embeddings and head in BF16. "
        f"The cache holds keys and values in BF16 and the state-space state in FP32, at {_context(shape):,} tokens."
    )


def _budget_of(manifest: Manifest, name: str) -> Budget | None:
    return next((b for b in manifest.budgets if b.name == name), None)


def _budget(manifest: Manifest, space: ElasticSpace, name: str, spec: SubmodelSpec) -> list[str]:
    """What the budget of a submodel asked for, and what it costs by the same metric; empty where not known."""
    budget = _budget_of(manifest, name)
    if budget is None:
        return ["", ""]
    if budget.metric == "latency":  # its table of measurements stays with the run
        return [_asked(budget), ""]
    cost = float(metric(sizes_of_spec(space, spec), budget))
    whole = float(metric(sizes_of_parent(manifest.shape), budget))
    return [_asked(budget), _amount(cost / whole if budget.unit == "ratio" else cost, budget)]


def _asked(budget: Budget) -> str:
    return f"{_amount(budget.target, budget)} {_METRICS[budget.metric]}"


def _amount(value: float, budget: Budget) -> str:
    if budget.unit == "ratio":
        return f"{100 * value:.1f} %"
    if budget.metric == "memory_bytes":
        return f"{_significant(value / 2**30)} GiB"
    return f"{_significant(1e3 * value)} ms" if budget.metric == "latency" else f"{value:,.0f}"


def _use(models: Models, dtype: torch.dtype, form: Format | None) -> Iterator[str]:
    """How to load and serve what the directory holds."""
    uneven = [n for n, (space, spec) in models.items() if space.differing(spec)]
    if len(models) == len(uneven) == 1:
        yield "## Serve"
        yield (
            "Its layers differ in width, which transformers' `nemotron_h` cannot state. `config.json` is that of a "
            "`nemotron_h_puzzle` model, and vLLM takes the class of it from the Python file beside it:"
        )
        yield "    vllm serve DIR --trust-remote-code"
    else:
        if form is None:
            yield "## Load"
            yield from _loading(models, uneven, dtype)
        yield "## Serve"
        yield "vLLM has the `nemotron_h` architecture built in, and needs no plug-in:"
        yield "    vllm serve DIR"
    if form is not None:
        yield f"transformers does not read {form.algo} weights in this layout."
    yield "Not tested here."


def _loading(models: Models, uneven: Sequence[str], dtype: torch.dtype) -> Iterator[str]:
    odd = [n for n, (space, spec) in models.items() if n not in uneven and _needs_eager(space, spec, dtype)]
    loaded = next((n for n, (space, spec) in models.items() if spec == space.full()), next(iter(models)))
    eager = ', experts_implementation="eager"' if loaded in odd else ""
    yield (
        "transformers 5.15 or later; on a CPU, earlier releases compute prompts longer than a chunk of the "
        "state-space scan wrongly."
    )
    yield "    from transformers import AutoModelForCausalLM"
    yield f'    model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto"{eager})'
    if odd:
        which = "" if len(models) == 1 else f" This concerns {_quoted(odd)}."
        yield (
            '`experts_implementation="eager"` is needed where the hidden size or the width of an expert is not a '
            f"multiple of {_ROW_BYTES // dtype.itemsize}: transformers' grouped matrix product wants rows of "
            f"{_ROW_BYTES} bytes.{which}"
        )
    if uneven:
        yield (
            f"Layers of {_quoted(uneven)} differ in width. Cut out, such a size is a `nemotron_h_puzzle` model, "
            "which transformers cannot build; vLLM can."
        )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _needs_eager(space: ElasticSpace, spec: SubmodelSpec, dtype: torch.dtype) -> bool:
    multiple = _ROW_BYTES // dtype.itemsize
    shape = space.widest_shape(spec)
    return bool(shape.layers_of("E")) and any(
        n % multiple for n in (shape.hidden_size, shape.moe_ffn_hidden_size)
    )


def _widths(space: ElasticSpace, spec: SubmodelSpec, axis: str) -> str:
    """The width of an axis; of each layer that the submodel keeps, where they differ."""
    width = spec[axis]
    if isinstance(width, int):
        return str(width)
    kept = [space.layer_sizes(spec, i)[axis] for i in space.kept_layers(spec) if i in space.layers(axis)]
    return ", ".join(map(str, kept if len(set(kept)) > 1 else kept[:1]))


def _significant(value: float) -> str:
    """Three digits, or all of a larger number's."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [headings, [":---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in cells)
