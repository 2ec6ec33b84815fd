"""The family, the router's choices and what quantisation did, as terminal tables."""

from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from elastic_megatron.report import format as say
from elastic_megatron.report.family import cost
from elastic_megatron.report.format import finite
from elastic_megatron.report.quantized import Json, Quantized
from elastic_megatron.report.quantized_page import kl, precision, unseen_words
from elastic_megatron.report.read import read_run
from elastic_megatron.report.router import certainty


def family_table(report: dict[str, Any]) -> Table:
    """One row per submodel, the parent first; values that ``report`` lacks are dashes.

    ``report`` is the object of ``report.json``. Losses are in its ``data.unit``, nats per token by default;
    ``closed`` is the share of the gap between sorted slice and parent that training closed; ``cost`` is
    target and realised.
    """
    parent, unit = report.get("parent") or {}, (report.get("data") or {}).get("unit") or "nats per token"
    title = f"{escape(str(report.get('name') or 'family'))}, loss in {escape(unit)}"
    table = _table(title)
    for heading in ("params", "active", "unsorted", "sorted", "trained", "closed", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    if parent:
        sizes = [_shown(parent.get(key), say.count) for key in ("total_params", "active_params")]
        table.add_row(
            "parent",
            *sizes,
            "–",
            "–",
            _shown(parent.get("loss"), say.loss),
            "–",
            "–",
        )
    for name, m in (report.get("submodels") or {}).items():
        table.add_row(
            escape(name),
            _shown(m.get("total_params"), say.count),
            _shown(m.get("active_params"), say.count),
            *(
                _shown(m.get(f"loss_{key}"), say.loss)
                for key in ("unsorted_slice", "sorted_slice", "trained")
            ),
            _shown(m.get("gap_closed"), say.percent),
            _cost(m),
        )
    return table


def _cost(m: dict[str, Any]) -> str:
    target, realised = m.get("target_cost"), m.get("realised_cost")
    if not (finite(target) and finite(realised)):
        return "–"
    asked, got = cost(target), cost(realised)
    return f"{asked.removesuffix(' %') if got.endswith(' %') else asked} → {got}"


def _table(title: str) -> Table:
    """Room for 80 columns: no outer frame, and the first column is never squeezed away."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("size", style="bold", no_wrap=True)
    return table


def _shown(value: Any, show: Any) -> str:
    return show(value) if finite(value) else "–"


def router_table(router_line: dict[str, Any]) -> Table:
    """Rows are budgets, columns are axes: the chosen width and how probable it is.

    ``router_line`` is the object under ``router`` in a line of ``metrics.jsonl``. Where layers choose
    separately the width is a range and the probability a mean over layers. Doubtful choices (below one
    half) are yellow.
    """
    budgets = router_line.get("budgets") or {}
    axes = list(dict.fromkeys(axis for budget in budgets.values() for axis in budget.get("widths") or {}))
    table = _table(_router_title(router_line))
    for heading in ["cost", "target", *(say.axis_title(axis) for axis in axes)]:
        table.add_column(heading, justify="right")
    for name, budget in budgets.items():
        costs = [
            _shown(budget.get(key), lambda ratio: say.percent(ratio, 1)) for key in ("realised", "target")
        ]
        table.add_row(escape(name), *costs, *(_choice(budget, axis) for axis in axes))
    return table


def _router_title(line: dict[str, Any]) -> str:
    title = f"router at step {line.get('step', '?')}"
    return f"{title}, temperature {line['tau']:.2f}" if finite(line.get("tau")) else title


def _choice(budget: dict[str, Any], axis: str) -> Text:
    chosen, probs = (budget.get("widths") or {}).get(axis), (budget.get("probs") or {}).get(axis)
    if chosen is None:
        return Text("–")
    if not probs:
        return Text(say.width(chosen))
    sure = certainty(probs)
    return Text(
        f"{say.width(chosen)} ({say.percent(sure).replace(' ', '')})", style="yellow" if sure < 0.5 else ""
    )


def quantized_table(run_dir: Path) -> Table | None:
    """What the run folder says of quantisation; ``None`` for a run that was not quantised. Writes nothing.

    Three rows a submodel: as it was, after calibration (PTQ), after distillation (QAD). Loss and KL to the teacher are
    in nats per token, changes are of the loss, bytes are of the weights on disk. Raises ``UserError`` as ``read_run``.
    """
    found = read_run(run_dir).quantized
    if found is None:
        return None
    known = found.facts()
    table = _table(f"{precision(known['format'])}, loss and KL to the teacher in nats per token")
    table.caption, table.caption_justify = _calibration_words(found), "left"
    table.add_column("weights", no_wrap=True)
    for heading in ("loss", "change", "KL", "recovered", "on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = precision(known["unquantised_weights"])
    for name, m in known["submodels"].items():
        plain, packed = m["bytes"]["unquantised"], m["bytes"]["quantised"]
        table.add_row(escape(name), *_state(before, m["unquantised"], None, None, plain))
        table.add_row("", *_state("PTQ", m["ptq"], m["loss_change_ptq"], None, packed))
        if m["qad"] is not None:
            table.add_row("", *_state("QAD", m["qad"], m["loss_change_qad"], m["kl_recovered"], packed))
    return table


def _state(words: str, measured: Json, moved: Any, won_back: Any, stored: Any) -> tuple[str, ...]:
    return (
        words,
        _shown(measured["loss"], lambda loss: f"{loss:.4f}"),
        _shown(moved, say.change),
        _shown(measured["kl"], kl),
        _shown(won_back, say.percent),
        _shown(stored, say.size),
    )


def _calibration_words(found: Quantized) -> str:
    told = []
    if finite(tokens := found.calibration.get("tokens")):
        told.append(f"calibrated on {say.count(tokens)} tokens")
    if unseen := unseen_words(found.calibration.get("unseen")):
        told.append(f"experts without a token: {unseen}")
    if found.stored.sizes:
        told.append(f"on disk: as an export, BF16 where it is not {precision(found.format)}")
    if found.stored.kept:
        told.append(f"not quantised: {', '.join(found.stored.kept)}")
    return escape("\n".join(told))
