"""Find shipped recipes and read YAML files."""

import os
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from hfvit.errors import RecipeError, nearest, one_line
from hfvit.utils.files import expand_user, shipped

MAX_BYTES = 2**20


class _PlainLoader(yaml.SafeLoader):
    """safe_load runs no code, but takes the last of two equal keys, and aliases, whose values multiply in any text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The values in a file; `RecipeError`, without the file's name, for what cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"cannot be read: it has {path.stat().st_size:,} bytes, and no recipe is so long.")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter of numbers and days that are none
        raise RecipeError(f"not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: it is nested without end.") from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that come with hfvit."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a shipped recipe."""
    recipes = shipped_recipes()
    path = expand_user(name)
    if os.path.isfile(path):
        return path
    if name in recipes:
        return recipes[name]
    if os.path.isdir(path):
        raise RecipeError(f"RECIPE: must be a file, got the folder {path}. Name the recipe file in it.")
    known = nearest(path.stem, recipes) or f" Shipped recipes: {', '.join(recipes)}."
    raise RecipeError(f"RECIPE: no file, no folder and no shipped recipe, got '{name}'.{known}")


def read_head(path: Path) -> dict[str, str]:
    """Read the comment at the top of a recipe.

    Returns:
        Its entries, such as `Time` and `Accuracy`, each with its text on one line, and under the empty key its first
        line, which describes the recipe.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#") for line in takewhile(lambda line: line.startswith("#"), lines)]
    entries = {"": comment[0].strip()}
    key = ""
    for line in comment[1:]:
        found = re.fullmatch(r" ([A-Z][\w ]*): (.*)", line)
        if found:
            key = found[1]
            entries[key] = found[2].strip()
        elif key and line.startswith("   "):
            entries[key] += f" {line.strip()}"
        else:
            key = ""
    return entries
