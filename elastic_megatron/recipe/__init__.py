"""Recipes: typed YAML that describes a whole run. Loads without torch, so a login node can check one."""

from elastic_megatron.recipe.chain import Chain
from elastic_megatron.recipe.cluster import Cluster
from elastic_megatron.recipe.jobs import JobChain, PlannedJob, is_chain, load_jobs
from elastic_megatron.recipe.load import dump, json_schema, load
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.show import describe, describe_chain

__all__ = [
    "Chain",
    "Cluster",
    "JobChain",
    "PlannedJob",
    "Recipe",
    "describe",
    "describe_chain",
    "dump",
    "is_chain",
    "json_schema",
    "load",
    "load_jobs",
]
