"""What a run did, for people: one self-contained HTML page, ranking plots and terminal tables."""

from pathlib import Path


def write_report(run_dir: Path, *, report_json: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of a run and return its path; see `elastic_megatron.report.page.write_report`."""
    # imported on use: the command line registers `report.cli` without paying for numpy
    from elastic_megatron.report import page

    return page.write_report(run_dir, report_json=report_json, out=out)
