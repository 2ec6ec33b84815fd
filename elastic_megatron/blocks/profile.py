"""Measure the layers of a model at many widths: the table behind latency budgets (``cost.latency``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..cost.latency import FORMAT_VERSION
from ..space import ParentShape
from ..space.axes import AXES
from .model import build_model

Step = Callable[[], None]


def profile_layers(
    shape: ParentShape,
    choices: Mapping[str, Sequence[int]],
    *,
    tokens: int,
    batch: int = 1,
    repeats: int = 5,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Time one stock Megatron layer of every type at every combination of its widths.

    Layers are those of a ``HybridModel`` with a single layer; embedding, final norm and output layer are
    timed by themselves. Every round visits all points once, each with one untimed pass, and a point's time
    is the median over rounds, so that a machine that slows down for a while slows all points alike. Weights
    are random, hence experts evenly loaded. Needs ``runtime.start`` on one process: the times are of one
    rank.

    Args:
        choices: widths of the elastic axes; the others stay as in ``shape``. ``num_layers`` is not an axis of
            the table, since it only counts layers.
        tokens: tokens per pass over all ``batch`` sequences, a multiple of it.
        repeats: rounds.
        backward: time forward and backward instead of a forward pass without gradients.

    Returns:
        The JSON object that ``LatencyTable.load`` reads; seconds.
    """
    assert tokens % batch == 0, (tokens, batch)
    grids = {name: _axes(name, choices) for name in ("ends", *sorted(set(shape.hybrid_layer_pattern)))}
    points = [(name, point) for name, axes in grids.items() for point in product(*axes.values())]
    times: dict[tuple[str, tuple[int, ...]], list[float]] = {p: [] for p in points}
    for _ in range(repeats):
        for name, point in points:
            widths = dict(zip(grids[name], point, strict=True))
            times[name, point].append(_time(shape, name, widths, (tokens // batch, batch), backward, dtype))
    tables = {
        name: {
            "axes": axes,
            "seconds": _nest([median(times[name, p]) for p in product(*axes.values())], axes),
        }
        for name, axes in grids.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "device": str(runtime.start().device),
        "tokens": tokens,
        "unit": "seconds",
        "shape": {k: v for k, v in shape.to_dict().items() if _measured(k, v)},
        "symbols": {name: table for name, table in tables.items() if name != "ends"},
        "ends": tables["ends"],
    }


def _axes(name: str, choices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The grid of a layer type (or of the ends): the elastic axes that it has, ascending."""
    owned = [a.name for a in AXES if a.name == "hidden_size" or a.symbol == name]
    return {a: sorted(set(choices[a])) for a in owned if a in choices}


def _measured(field: str, value: Any) -> bool:
    """Is this field of a shape a size that the times depend on?"""
    return type(value) is int and field != "max_position_embeddings"


def _nest(flat: list[float], axes: Mapping[str, Sequence[int]]) -> Any:
    for values in reversed(list(axes.values())):
        flat = [flat[i : i + len(values)] for i in range(0, len(flat), len(values))]  # type: ignore[misc]
    return flat[0]


def _time(
    shape: ParentShape,
    name: str,
    widths: Mapping[str, int],
    size: tuple[int, int],
    backward: bool,
    dtype: torch.dtype,
) -> float:
    """Seconds of one pass over ``size`` = (sequence length, batch), after one that is not timed."""
    if name == "ends":
        step, layer = _ends_step, {"hybrid_layer_pattern": "-", "ffn_hidden_size": 8}
    else:
        step, layer = (
            _layer_step,
            {"hybrid_layer_pattern": name, "vocab_size": 8},
        )  # only the ends need it whole
    model = build_model(shape.override(**layer, **widths), dtype=dtype)
    run = step(model.train(backward), size, backward)
    run()
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - began


def _layer_step(model: Any, size: tuple[int, int], backward: bool) -> Step:
    layer, like = model.decoder.layers[0], next(model.parameters())
    x = torch.randn(*size, model.config.hidden_size, dtype=like.dtype, device=like.device)
    x.requires_grad_(backward)

    def forward() -> Tensor:
        # the transformer layer returns (hidden states, context), the others hidden states
        out = layer(hidden_states=x, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    return _pass(forward, model, backward)


def _ends_step(model: Any, size: tuple[int, int], backward: bool) -> Step:
    like = next(model.parameters())
    ids = torch.randint(model.vocab_size, (size[1], size[0]), device=like.device)
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None

    def forward() -> Tensor:
        hidden = model.embedding(
            input_ids=ids, position_ids=torch.arange(size[0], device=ids.device).expand_as(ids)
        )
        return model.output_layer(model.decoder.final_norm(hidden), weight=weight)[0]

    return _pass(forward, model, backward)


def _pass(forward: Callable[[], Tensor], model: nn.Module, backward: bool) -> Step:
    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = forward()
        if backward:
            model.zero_grad(set_to_none=True)
            out.sum().backward()

    return run


def _wait() -> None:
    """Until the accelerator has done what it was asked."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
