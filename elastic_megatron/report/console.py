"""The family and the router's choices as terminal tables."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from elastic_megatron.report import format as say
from elastic_megatron.report.family import cost
from elastic_megatron.report.read import finite
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
