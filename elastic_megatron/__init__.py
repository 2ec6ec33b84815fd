"""Star Elastic (arXiv 2605.07182) for Megatron-Core: many nested model sizes in one checkpoint."""

__version__ = "0.1.0"
