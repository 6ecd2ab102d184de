"""Recipes: what a run is. The schema, how a recipe is loaded, and the recipes themselves as YAML.

This room knows nothing of data, models or clusters; every other room may import it.
"""

from configs.duration import Duration, WallTime
from configs.errors import LonghaulError, did_you_mean
from configs.header import Header, read_header
from configs.load import apply_overrides, dump, find_recipe, list_recipes, load_recipe, parse_recipe
from configs.schema import Recipe

__all__ = [
    "Duration",
    "Header",
    "LonghaulError",
    "Recipe",
    "WallTime",
    "apply_overrides",
    "did_you_mean",
    "dump",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "read_header",
]
