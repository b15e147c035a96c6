"""Import order of packages, names of modules, declared dependencies."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from helpers.commands import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = ROOT / "hfvit"
BASE = ("errors", "utils")
CORE = (*BASE, "recipe", "artifacts", "metrics", "transforms", "data", "models")
SERVED = (*CORE, "trt", "inference", "evaluation", "export")
TOP = (*SERVED, "training", "finetuning", "hub", "report", "demo", "serve")
OPERATIONS = ("pipeline", "multirun", "lr_finder", "sweep", "verify", "estimate", "doctor")
# Package or module of hfvit/ -> those that it may import. The two wings, training and inference, stay apart.
ALLOWED = {
    "utils": ("errors",), "errors": (), "recipe": BASE, "artifacts": (*BASE, "recipe"), "metrics": CORE[:4],
    "transforms": CORE[:5], "data": CORE[:6], "models": CORE[:7],
    "training": CORE, "finetuning": (*CORE, "training"),
    "trt": CORE, "inference": (*CORE, "trt"), "evaluation": (*CORE, "trt", "inference"), "export": SERVED[:-1],
    "hub": SERVED, "report": (*SERVED, "hub"), "demo": SERVED, "serve": SERVED,
    "image_text": CORE, "pipeline": TOP, "multirun": (*TOP, "pipeline"),
    "lr_finder": (*TOP, "pipeline"),
    "sweep": (*TOP, "pipeline"), "verify": TOP, "estimate": TOP, "doctor": TOP,
    "cli": (*TOP, *OPERATIONS), "__main__": (*TOP, *OPERATIONS, "cli"), "train": (*TOP, *OPERATIONS, "cli"),
}  # fmt: skip
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
HEAVY = {"torch", "transformers", "timm", "datasets"}
# What starts without them: `hfvit --help` and `optimum-cli --help`, and what reads records alone.
LIGHT = (
    "hfvit", "hfvit.cli", "hfvit.cli.export_onnx", "hfvit.cli.export_openvino", "hfvit.cli.export_tensorrt",
    "hfvit.errors", "hfvit.recipe.arguments", "hfvit.recipe.files", "hfvit.utils.files", "hfvit.artifacts.constants",
    "hfvit.training.distributed",
)  # fmt: skip


def package_of(path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path, of_the_module_alone: bool = False):
    """Yield the full names that `path` imports, inside functions too unless `of_the_module_alone`."""
    tree = ast.parse(path.read_text())
    for node in tree.body if of_the_module_alone else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "train.py also runs as a script: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_imports_only_packages_before_its_own(path):
    own = package_of(path)
    packages = {name.split(".")[1] for name in imported(path) if name.startswith("hfvit.")} - {own, "__version__"}
    assert packages <= set(ALLOWED[own])


def test_import_order_has_no_cycle():
    done: set[str] = set()
    while rest := set(ALLOWED) - done:
        ready = {package for package in rest if set(ALLOWED[package]) <= done}
        assert ready, rest
        done |= ready


def test_files_import_no_cycle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    left = {
        name: {n for full in imported(path) for n in (full, full.rpartition(".")[0]) if n in modules} - {name}
        for name, path in modules.items()
    }
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, sorted(left)
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_imports_no_private_name_of_another(path):
    private = [n for n in imported(path) if n.startswith("hfvit.") and n.rpartition(".")[2].startswith("_")]
    assert [name for name in private if not name.endswith("__")] == []


def test_first_lines_of_docstrings_are_short():
    """At most 80 characters, and a blank line before further ones."""
    folders = ("hfvit", "optimum", "examples", "scripts", "tests/helpers")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first, *others = (ast.get_docstring(node) or "").splitlines() or [""]
                assert len(first) <= 80, (path, first)
                assert not others or not others[0], (path, first)


def test_only_hfvit_and_cli_have_code_in_init():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent not in (PACKAGE, PACKAGE / "cli"):
            assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body), path


@pytest.mark.parametrize("is_lazy", [False, True])
def test_imported_libraries_are_declared(is_lazy):
    """Those that a module imports when it is loaded in `dependencies`, those inside functions there or in an extra.

    Read from pyproject.toml: the metadata of an editable installation may be older.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    lines = [*project["dependencies"], *(extras if is_lazy else ())]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    declared |= {"httpx", "httpx2"}  # the one that huggingface_hub depends on
    distributions = packages_distributions()
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "optimum").rglob("*.py")]
    modules = {name.split(".")[0] for path in files for name in imported(path, of_the_module_alone=not is_lazy)}
    undeclared = {
        module
        for module in modules - set(sys.stdlib_module_names) - {"hfvit"}
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & declared
    }
    assert not undeclared


def test_no_module_has_the_name_of_a_library():
    """`accelerate launch hfvit/train.py` inserts hfvit/ at the start of sys.path."""
    names = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    libraries = set(sys.stdlib_module_names) | set(packages_distributions())
    libraries |= {"tensorrt", "tensorrt_rtx", "datasets", "evaluate", "timm", "torch", "transformers", "accelerate"}
    assert not names & (libraries - {"hfvit"})


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_no_heavy_library(module):
    code = f"import sys, {module}; print(*set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = (
        HEAVY - {"transformers"} if module.startswith("hfvit.cli.export") else HEAVY
    )  # optimum's own base imports it
    assert not heavy & set(loaded.split())


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        names = list(imported(path))
        assert not [name for name in names if name.split(".")[0].startswith(("test_", "conftest"))], path
