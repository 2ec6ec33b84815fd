"""The page's section on quantisation: what every size lost to it, and what distillation won back."""

from elastic_megatron.report import format as say
from elastic_megatron.report.charts import Line, LineChart
from elastic_megatron.report.family import table
from elastic_megatron.report.format import finite
from elastic_megatron.report.markup import Palette, bar, facts, figure, grid, named, section
from elastic_megatron.report.quantized import Json, Quantized, measured
from elastic_megatron.report.read import RunData


def quantized(run: RunData, palette: Palette) -> str | None:
    """Loss, KL and bytes of every size; KL over the tokens of distillation; how it was calibrated."""
    found = run.quantized
    if found is None:
        return None
    known = found.facts()
    before = precision(known["unquantised_weights"])
    after = precision(known["format"])
    columns = [
        ("size", "Size"),
        ("loss", f"Loss, {before}"),
        ("loss_ptq", "Loss, PTQ"),
        ("loss_qad", "Loss, QAD"),
        ("kl", f"KL, {before}"),
        ("kl_ptq", "KL, PTQ"),
        ("kl_qad", "KL, QAD"),
        ("recovered", "Lost KL recovered"),
        ("bytes", f"On disk, BF16 → {after}"),
    ]
    rows = [_cells(name, m, palette) for name, m in known["submodels"].items()]
    shown = [(key, title) for key, title in columns if any(row.get(key) for row in rows)]
    lead = (
        f"Loss and KL to the teacher in nats per token, lower is better: before quantisation, with {after} weights "
        "and inputs straight after calibration (PTQ), and after distillation on them (QAD)."
    )
    charts = [card for name in found.names if (card := _curve(found, name, palette))]
    return section(
        "quantized",
        "Quantisation",
        lead,
        table(shown, rows, "family"),
        grid(*charts, _calibration(found)),
    )


def precision(weights: str | None) -> str:
    """``nvfp4`` → ``NVFP4``."""
    return weights.upper() if weights else "unquantised"


def unseen_words(unseen: dict[str, list[int]] | None) -> str:
    """``decoder.layers.1: 3, 7`` for every layer with experts that calibration met with no token."""
    return "; ".join(f"{layer}: {', '.join(map(str, experts))}" for layer, experts in (unseen or {}).items())


def _cells(name: str, m: Json, palette: Palette) -> dict[str, str]:
    cells = {"size": f"<b>{named(name, palette)}</b>"}
    for key, what in (("", m["unquantised"]), ("_ptq", m["ptq"]), ("_qad", m["qad"] or {})):
        if finite(what.get("loss")):
            moved = m.get(f"loss_change{key}")
            note = f" <small>{say.change(moved)}</small>" if finite(moved) else ""
            cells[f"loss{key}"] = f"{what['loss']:.4f}{note}"
        if finite(what.get("kl")):
            cells[f"kl{key}"] = kl(what["kl"])
    if finite(m["kl_recovered"]):
        share = min(max(m["kl_recovered"], 0), 1)
        shown = say.percent(m["kl_recovered"])
        cells["recovered"] = f"<span>{shown}</span>{bar(share, palette.colour(name))}"
    if finite(m["bytes"]["quantised"]):
        cells["bytes"] = f"{say.size(m['bytes']['unquantised'])} → {say.size(m['bytes']['quantised'])}"
    return cells


def kl(value: float) -> str:
    """A divergence in nats."""
    return f"{value:.4f}" if abs(value) >= 0.001 else say.significant(value)


def _curve(found: Quantized, name: str, palette: Palette) -> str:
    """KL over the tokens of distillation, from PTQ on; nothing where there was none, or no teacher."""
    lines = [line for line in (found.ptq, *found.qad) if finite(measured(line, name)["kl"])]
    points = [(line.get("tokens") or 0, measured(line, name)["kl"]) for line in lines]
    if len(points) < 2:
        return ""
    levels = [
        (value, words, style)
        for line, words, style in (
            (found.ptq, "PTQ", "ink"),
            (found.unquantised, precision(found.unquantised.get("weights")), "parent"),
        )
        if finite(value := measured(line, name)["kl"])
    ]
    chart = LineChart(
        f"kl-{palette.names.index(name)}",
        f"KL of {name} to the teacher",
        [Line(name, palette.colour(name), points, shape=palette.shape(name))],
        "training tokens",
        "KL, nats per token",
        kl,
        levels=levels,
        height=240,
    )
    return figure(f"{name}: KL to the teacher", "", chart.draw())


def _calibration(found: Quantized) -> str:
    tokens, unseen = found.calibration.get("tokens"), found.calibration.get("unseen")
    rows = facts(
        [
            ("tokens of calibration", say.count(tokens) if finite(tokens) else None),
            ("experts without a token", unseen_words(unseen) or ("none" if found.calibration else None)),
            ("not quantised", "; ".join(found.stored.kept)),
        ]
    )
    note = (
        "An expert that calibration met with no token takes the input scale of its layer." if unseen else ""
    )
    return figure("Calibration", note, rows) if rows else ""
