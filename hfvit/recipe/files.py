"""Find shipped recipes and read YAML files."""

import os
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from hfvit.errors import RecipeError, nearest, one_line
from hfvit.utils.files import expand_user, shipped
from hfvit.utils.yaml_files import load_yaml

MAX_BYTES = 2**20


def read_yaml(path: Path) -> Any:
    """Read a YAML file; raises `RecipeError`, without the file's name, on failure."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"must have at most {MAX_BYTES:,} bytes, got {path.stat().st_size:,}.")
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two for invalid numbers and dates
        raise RecipeError(f"not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply.") from None


def shipped_recipes() -> dict[str, Path]:
    """Return the paths of shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def is_recipe_name(name: str) -> bool:
    """Return whether `name` is that of a YAML file or of a shipped recipe."""
    return name.lower().endswith((".yaml", ".yml")) or name in shipped_recipes()


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file or shipped recipe."""
    recipes = shipped_recipes()
    path = expand_user(name)
    if os.path.isfile(path):
        return path
    if name in recipes:
        return recipes[name]
    if name and os.path.isdir(path):
        raise RecipeError(f"RECIPE: must be a file, got the folder {path}.")
    known = nearest(path.stem, recipes) or f" Shipped recipes: {', '.join(recipes)}."
    raise RecipeError(f"RECIPE: must be a file, a folder or a shipped recipe, got '{name}'.{known}")


def read_head(path: Path) -> dict[str, str]:
    """Read the comment at the top of a recipe.

    Returns:
        Entries such as `Time` and `Accuracy`, joined to one line each; the empty key has the first line, which
        describes the recipe.
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
