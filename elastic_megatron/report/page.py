"""The report page: sections in reading order, style and script inlined, nothing fetched from anywhere."""

from importlib.resources import files
from pathlib import Path

from elastic_megatron.files.writing import write_text
from elastic_megatron.report import closing, curves, family
from elastic_megatron.report.importance import importance
from elastic_megatron.report.markup import Palette, escape
from elastic_megatron.report.quantized import record
from elastic_megatron.report.quantized_page import quantized
from elastic_megatron.report.read import RunData, read_run
from elastic_megatron.report.router import router

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path, *, report_json: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of a run and return its path (default: ``run_dir/report.html``).

    ``report_json`` replaces the ``report.json`` of the run folder; without it and ``out``, what a quantised run
    measured is also written there, under ``quantized``. Raises `UserError` as `read_run` does.
    """
    run = read_run(run_dir, report_json)
    if run.quantized is not None and report_json is None and out is None:
        record(run_dir, run.quantized)
    page = render(run)
    path = out or run_dir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render(run: RunData) -> str:
    """The page as text. A section whose data is missing is left out, and so is its link."""
    palette = Palette(tuple(run.names))
    sections = {
        "family": ("Family", family.family(run, palette)),
        "widths": ("Widths", family.widths(run, palette)),
        "pareto": ("Quality", curves.pareto(run, palette)),
        "quantized": ("Quantisation", quantized(run, palette)),
        "training": ("Training", curves.training(run, palette)),
        "router": ("Router", router(run, palette)),
        "importance": ("Importance", importance(run, palette)),
        "samples": ("Texts", closing.samples(run, palette)),
        "time": ("Time", closing.time(run, palette)),
        "made": ("Made with", closing.made(run)),
    }
    present = {key: pair for key, pair in sections.items() if pair[1]}
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, (title, _) in present.items())
    here = files("elastic_megatron.report")
    style = (here / "style.css").read_text(encoding="utf-8")
    script = (here / "page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(run.title)}: run report</title><style>{style}</style></head><body>"
        f"{family.header(run, palette)}"
        f'<nav aria-label="Sections">{links}</nav>'
        f"<main>{''.join(body or '' for _, body in present.values())}</main>"
        f'<div id="tip" role="status" hidden></div><script>{script}</script></body></html>\n'
    )
