"""Recipes: typed YAML that describes a whole run. Loads without torch, so a login node can check one."""

from elastic_megatron.recipe.load import dump, json_schema, load
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.show import describe

__all__ = ["Recipe", "describe", "dump", "json_schema", "load"]
