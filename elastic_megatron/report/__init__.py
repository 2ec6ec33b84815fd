"""What a run did, for people: one self-contained HTML page, ranking plots and terminal tables."""

from elastic_megatron.report.page import write_report

__all__ = ["write_report"]
