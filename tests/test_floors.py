"""The architecture as a test: a file imports from lower floors only, and shadows no library."""

import ast
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

FLOORS = [
    {"card_edits", "draws", "dynamic_size", "effects", "errors", "frozen_parts", "fusion", "image_ops"}
    | {"interrupts", "live_bytes", "loss_watch", "losses", "mixing", "option_types", "resize", "run_folder"}
    | {"speed", "tables", "versions", "whole", "export/family", "export/graph", "export/half"},
    {"attention", "columns", "config", "decode", "engine_batches", "first_batch", "hardware", "input_size"}
    | {"model_config", "param_groups", "patch_size", "paths", "policies", "processes", "progressive", "shipped"}
    | {"token_merging", "web_runtime", "yaml_files", "export/fuse", "export/image_steps", "export/text_inputs"}
    | {"export/triton", "export/trt_backends", "export/trt_graph", "export/trt_watch"},
    {"artefacts", "augment", "doctor", "engine_runtime", "eval_results", "example_file", "execution_providers"}
    | {"finetuning_args", "folder_lock", "lora", "model_args", "pictures", "pixels", "plots", "progress", "public"}
    | {"texts", "export/int8_fused", "export/preprocess"},
    {"backends", "checkpoints", "data", "engine_backend", "images", "metrics", "micro_batches", "modeling"}
    | {"picture_plots", "training_args", "cli/options", "export/check", "export/quantize"},
    {"balance", "building", "examples", "fitting", "image_text", "json_files", "objective", "stream_source"}
    | {"temperature", "text_head"},
    {"run_file", "run_temperature", "saving", "stream", "export/folder"},
    {"engines", "export_table", "nan_policy", "static_page"},
    {"averaging", "evaluation_split", "inference", "recipe", "report", "run_json"},
    {"attention_view", "calibration", "estimate", "hub", "predict", "trainer", "validate", "verify"}
    | {"export/onnx", "export/tensorrt"},
    {"demo_app", "gate_record", "hub_files", "linear_probe", "report_page"},
    {"finetuning", "push", "export/stages"},
    {"train", "export/engine_stages"},
    {"commands", "sweep"},
    {"engine_commands", "cli/demo", "cli/listings", "cli/predict", "cli/push", "cli/report", "cli/sweep"}
    | {"cli/train", "cli/validate", "cli/verify"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
PACKAGE = ROOT / "hfvit"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")

# Which heavy libraries a file must do without, and why.
FORBIDDEN = {
    "errors": {"torch", "transformers", "timm", "datasets"},  # `hfvit --help` imports these files
    "option_types": {"torch", "transformers", "timm", "datasets"},
    "config": {"torch", "transformers", "timm", "datasets"},
    "model_args": {"torch", "transformers", "timm", "datasets"},
    "finetuning_args": {"torch", "transformers", "timm", "datasets"},
    "shipped": {"torch", "transformers", "timm", "datasets"},
    "yaml_files": {"torch", "transformers", "timm", "datasets"},
    "processes": {"torch", "transformers", "timm", "datasets"},
    "commands": {"torch", "timm", "datasets", "onnx", "onnxruntime"},  # `optimum-cli --help` imports it
    "engine_commands": {"torch", "timm", "datasets", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"},
    "export/folder": {"torch", "transformers", "timm", "datasets", "onnx", "onnxruntime"},
    "report": {"torch", "transformers", "timm", "datasets"},  # they read run.json, never live objects
    "report_page": {"torch", "transformers", "timm", "datasets"},
    "plots": {"torch", "transformers", "timm", "datasets"},
    "picture_plots": {"torch", "transformers", "timm", "datasets"},
    "temperature": {"torch", "transformers", "timm", "datasets"},
    "eval_results": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "hub": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "hub_files": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "push": {"torch", "transformers", "timm", "datasets", "matplotlib"},
    "fusion": {"transformers", "timm", "datasets"},
    "losses": {"transformers", "timm", "datasets"},  # mathematics knows no framework
    "live_bytes": {"transformers", "timm", "datasets"},
    "loss_watch": {"transformers", "timm", "datasets"},
    "whole": {"torch", "transformers", "timm", "datasets"},
    "progress": {"torch", "transformers", "timm", "datasets"},
    "draws": {"torch", "transformers", "timm", "datasets"},
    "resize": {"transformers", "timm", "datasets"},
    "image_ops": {"transformers", "timm", "datasets"},
    "policies": {"transformers", "timm", "datasets"},
    "augment": {"transformers", "timm", "datasets"},
    "param_groups": {"transformers", "datasets"},
}


def test_readme_says_what_each_file_is_for():
    table = (ROOT / "README.md").read_text().partition("## Develop")[2]
    files = [path.name for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert [name for name in files if f"`{name}`" not in table] == []


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
