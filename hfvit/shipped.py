"""Files that travel with the package: recipes, accelerate configurations, the model card's template."""

from pathlib import Path

from hfvit.errors import RecipeError, nearest

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Path of a shipped file or folder: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


def shipped_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that come with hfvit."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a shipped recipe."""
    recipes = shipped_recipes()
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in recipes:
        return recipes[name]
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name the recipe file in it.")
    known = f"hfvit ships {', '.join(recipes)}.{nearest(path.stem, recipes)}"
    raise RecipeError(f"No recipe '{name}': there is no such file, and {known}")


def summary(path: Path) -> str:
    """First line of a recipe's head comment: what the recipe is for."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()
