"""The architecture as a test: a file imports from lower floors only, and shadows no library."""

import ast
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

FLOORS = [
    {"errors", "option_types", "tables", "card_edits", "losses", "loss_watch", "draws", "resize", "image_ops"}
    | {"mixing", "speed", "versions", "export/family", "export/half", "export/graph"},
    {"cli/options", "config", "param_groups", "shipped", "hardware", "attention", "policies", "decode", "paths"}
    | {"export/image_steps", "export/fuse"}
    | {"export/trt_backends", "export/trt_graph", "export/trt_watch", "export/triton"},
    {"finetuning_args", "lora", "doctor", "augment", "pixels", "pictures", "artefacts", "public", "backends"}
    | {"export/preprocess", "export/int8_fused"},
    {"training_args", "checkpoints", "data", "metrics", "modeling", "images", "export/check", "export/quantize"},
    {"stream_source", "json_files", "balance", "objective"},
    {"stream", "export/folder"},
    {"recipe", "trainer", "inference", "report", "run_json", "evaluation_split"},
    {"linear_probe", "hub", "predict", "validate", "export/onnx", "export/tensorrt", "calibration"},
    {"export/stages", "hub_files", "finetuning"},
    {"push"},
    {"train", "export/engine_stages"},
    {"sweep"},
    {"cli/train", "cli/sweep", "cli/validate", "cli/predict", "cli/push", "cli/listings", "commands"},
    {"engine_commands"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
PACKAGE = ROOT / "hfvit"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")

# Which heavy libraries a file must do without, and why.
FORBIDDEN = {
    "errors": {"torch", "transformers", "timm", "datasets"},  # `hfvit --help` imports these five files
    "option_types": {"torch", "transformers", "timm", "datasets"},
    "config": {"torch", "transformers", "timm", "datasets"},
    "shipped": {"torch", "transformers", "timm", "datasets"},
    "commands": {"torch", "timm", "datasets", "onnx", "onnxruntime"},  # `optimum-cli --help` imports it
    "engine_commands": {"torch", "timm", "datasets", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"},
    "export/folder": {"torch", "transformers", "timm", "datasets", "onnx", "onnxruntime"},
    "report": {"torch", "transformers", "timm", "datasets"},  # they read run.json, never live objects
    "hub": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "hub_files": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "push": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "losses": {"transformers", "timm", "datasets"},  # mathematics knows no framework
    "loss_watch": {"transformers", "timm", "datasets"},
    "draws": {"torch", "transformers", "timm", "datasets"},
    "resize": {"transformers", "timm", "datasets"},
    "image_ops": {"transformers", "timm", "datasets"},
    "policies": {"transformers", "timm", "datasets"},
    "augment": {"transformers", "timm", "datasets"},
    "param_groups": {"transformers", "datasets"},
}


def key(path) -> str:
    """`export/onnx` for hfvit/export/onnx.py."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute, since train.py also runs as a script"
            found.add(node.module)
    return found


def test_every_file_has_a_floor():
    assert {key(path) for path in FILES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=key)
def test_imports_point_down(path):
    for name in imports(path):
        if name.startswith("hfvit."):
            module = name.removeprefix("hfvit.").replace(".", "/")
            assert FLOOR_OF[module] < FLOOR_OF[key(path)], (
                f"{key(path)} (floor {FLOOR_OF[key(path)]}) imports {module}"
            )


@pytest.mark.parametrize("module", FORBIDDEN)
def test_light_files_stay_light(module):
    roots = {name.split(".")[0] for name in imports(ROOT / "hfvit" / f"{module}.py")}
    assert not roots & FORBIDDEN[module]


def test_no_file_shadows_a_library():
    """`accelerate launch hfvit/train.py` puts hfvit/ first on sys.path."""
    libraries = set(sys.stdlib_module_names) | set(packages_distributions())
    libraries |= {"evaluate", "datasets", "timm", "torch", "transformers", "accelerate", "optimum"}
    assert not {path.stem for path in FILES if path.parent == PACKAGE} & (libraries - {"hfvit"})
