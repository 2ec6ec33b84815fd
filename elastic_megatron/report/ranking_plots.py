"""Pictures of a ranking file for the `rank` command: one per axis, plus expert tokens and layer scores."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elastic_megatron.errors import UserError
from elastic_megatron.files.writing import replacing
from elastic_megatron.report.format import axis_title
from elastic_megatron.report.ranking import NEGLECTED, Ranking, ScoreCurve, read_ranking


def plot_ranking(ranking_path: Path, out_dir: Path) -> list[Path]:
    """Write PNG files into ``out_dir`` (created if needed) and return their paths.

    ``{axis}.png`` shows sorted scores, one line per layer; ``expert_tokens.png`` the tokens that each
    expert of each layer saw; ``num_layers.png`` one score per layer. Raises `UserError` if the ranking
    is missing or unreadable.
    """
    ranking = read_ranking(ranking_path)
    if ranking is None:
        raise UserError(f"{ranking_path} does not exist; run `rank` first, it writes the file")
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [
        _save(_scores(axis, curves), out_dir / f"{axis}.png") for axis, curves in ranking.curves.items()
    ]
    if ranking.expert_tokens:
        written.append(_save(_expert_tokens(ranking), out_dir / "expert_tokens.png"))
    if ranking.depth is not None:
        written.append(_save(_depth(ranking, ranking.depth), out_dir / "num_layers.png"))
    return written


def _axes(title: str, x_title: str, y_title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return path


def _scores(axis: str, curves: list[ScoreCurve]) -> Figure:
    figure, axes = _axes(f"Importance: {axis_title(axis)}", "components, best first", "score, of best")
    for place, curve in enumerate(curves):
        best = float(curve.scores.max()) or 1.0
        # viridis ends in a yellow that vanishes on white, so only its darker part is used
        shade = colormaps["viridis"](0.85 * place / max(len(curves) - 1, 1))
        axes.plot(
            np.arange(1, len(curve.scores) + 1), curve.scores / best, color=shade, label=curve.name, lw=1.4
        )
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    if 1 < len(curves) <= 12:
        axes.legend(frameon=False, fontsize="small")
    return figure


def _expert_tokens(ranking: Ranking) -> Figure:
    figure, axes = _axes("Tokens seen by each expert", "experts, busiest first", "layer")
    widest = max(len(seen) for seen in ranking.expert_tokens.values())
    table = np.full((len(ranking.expert_tokens), widest), np.nan)
    for row, seen in zip(table, ranking.expert_tokens.values(), strict=True):
        row[: len(seen)] = -np.sort(-seen) / max(seen.mean(), 1e-12)
    image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
    low = np.argwhere(table < NEGLECTED)
    axes.scatter(low[:, 1], low[:, 0], marker="x", color="white", s=18)
    axes.set_yticks(range(len(table)), [str(layer) for layer in ranking.expert_tokens])
    figure.colorbar(image, ax=axes, label="tokens, of fair share (cross: neglected)", extend="max")
    return figure


def _depth(ranking: Ranking, scores: np.ndarray) -> Figure:
    figure, axes = _axes("Importance: layers", "layer", "score")
    axes.bar(np.arange(len(scores)), scores, color="#4a6a8a")
    if len(ranking.layer_types) == len(scores):
        axes.set_xticks(range(len(scores)), list(ranking.layer_types), fontsize="small")
    return figure
