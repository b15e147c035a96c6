"""The scripts of `benchmarks/gpu`: their imports, their helpers, and a dry run on a CPU."""

import ast
import hashlib
import importlib
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
from helpers.commands import ROOT, run_command
from PIL import Image
from safetensors.torch import save_file

from hfvit.data.local import open_local
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.loader import load_recipe

GPU = ROOT / "benchmarks" / "gpu"
SCRIPTS = sorted(GPU.glob("*.py"))
CLASSES = 10


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Import a script by name, with its results in `tmp_path / "out"` and its runs in `tmp_path / "work"`."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("KIT_WORK", str(tmp_path / "work"))
    for key in ("KIT_DINO", "KIT_VIT_B"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(GPU))

    def load_script(name: str):
        for script in SCRIPTS:
            monkeypatch.delitem(sys.modules, script.stem, raising=False)
        return importlib.import_module(name)

    return load_script


def imported_names(script: Path) -> set[tuple[str, str]]:
    """(module, name) of all imports from hfvit, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hfvit":
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def results_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def write_cifar10(folder: Path, rows: dict[str, int]) -> None:
    """Write noise in the layout of CIFAR-10 on the Hub: parquet files, columns `img` and `label`."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {index}" for index in range(CLASSES)])}
    )
    for split, count in rows.items():
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        labels = [row % CLASSES for row in range(count)]
        table = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        table.to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")


def write_dinov2(folder: Path) -> Path:
    """Write a DINOv2-S with random weights in the layout of a timm repository."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    folder.mkdir()
    pretrained = {key: value for key, value in model.pretrained_cfg.items() if key not in ("url", "hf_hub_id")}
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy_kit(root: Path) -> Path:
    """Copy the scripts as they travel to a machine without a network, with a data set beside them."""
    kit = root / ".gpu1" / "kit"
    shutil.copytree(GPU, kit, ignore=shutil.ignore_patterns("__pycache__"))
    write_cifar10(root / ".gpu1" / "cifar10", {"train": 700, "test": 200})
    return kit


def run_day(kit: Path, work: Path, *steps: str, **environment: str):
    """Run `day.sh` from its copy as a dry run."""
    settings = {
        "KIT_TINY": "1",
        "KIT_PYTHON": sys.executable,
        "KIT_SITE": str(work / "site"),
        "KIT_SOURCE": str(ROOT),
        "KIT_DATA": str(work / "data"),
        "KIT_WORK": str(work / "work"),
        "OUT": str(work / "out"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return run_command("bash", kit / "day.sh", *steps, timeout=1000, **settings | environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_import_measures_nothing(script, load, tmp_path):
    load(script.stem)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_imports_names_that_exist(script):
    for module, name in imported_names(script):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_attempt_failure_is_recorded(load, tmp_path):
    kit = load("kit")

    def work():
        raise ValueError("too small")

    kit.attempt("facts", "a measurement", work)
    (row,) = results_of(tmp_path / "out")
    assert (row["step"], row["name"], row["error"]) == ("facts", "a measurement", "ValueError: too small")
    assert "test_gpu.py" in row["where"]


def test_utilization_of_loop_uses_counts_of_hfvit(load):
    amp = load("amp")
    case = amp.case(amp.VIT_S, batch_size=4)
    reference = amp.Reference()
    amp.utilization(amp.Row("S", "hfvit", case), {"images/s": 10.0, "flops": 3e9, "peak flops": 1e12}, reference)
    figures = {"images/s": 20.0, "flops": None, "peak flops": None}
    found = amp.utilization(amp.Row("S", "loop", case), figures, reference)
    assert found["tflops"] == pytest.approx(0.06)
    assert found["mfu_measured"] == pytest.approx(0.06)


def test_records_words_select_runs_and_limits(load, tmp_path):
    records = load("records")
    known = records.attempts(tmp_path, None)
    assert records.chosen(known, []) == known
    found = records.chosen(known, ["vit_base:60", "dinov2_small_224"])
    assert {name: attempt.seconds for name, attempt in found.items()} == {"vit_base": 60.0, "dinov2_small_224": 900}
    assert (known["vit_base"].aim, records.attempts(None, tmp_path)["vit_base"].aim) == (None, 0.986)
    with pytest.raises(SystemExit, match=r"\bvit_huge\b"):
        records.chosen(known, ["vit_huge"])


@pytest.mark.parametrize("tiny", ["0", "1"])
def test_recipes_of_real_and_records_parse(tiny, load, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_TINY", tiny)
    records = load("records")
    real = importlib.import_module("real")
    runs = list(real.runs(tmp_path).values())
    for vit_b in (None, tmp_path):
        attempts = records.attempts(tmp_path, vit_b).values()
        runs += [(*attempt.words, *records.DATA_OPTIONS) for attempt in attempts]
    for words in runs:
        recipe = load_recipe([str(word) for word in words])
        sizes = recipe.finetuning.progressive_image_size or []
        assert recipe.training.bf16
        assert max(sizes, default=0) < recipe.model.image_size, words


def test_dinov2_at_224_px_is_trained_and_evaluated_at_that_size_only(load, tmp_path):
    records = load("records")
    words = records.attempts(tmp_path, None)["dinov2_small_224"].words
    recipe = load_recipe([str(word) for word in words])
    assert (recipe.model.image_size, recipe.finetuning.progressive_image_size) == (224, None)
    assert (recipe.training.num_train_epochs, recipe.training.global_batch_size) == (4, 128)
    assert (recipe.training.eval_tta, recipe.training.eval_strategy.value) == (None, "epoch")


def test_records_known_run_without_weights_is_skipped_if_chosen(load, tmp_path):
    records = load("records")
    records.main(0.0, ["dinov2_small_224", "vit_base:600"])
    rows = results_of(tmp_path / "out")
    assert [row["name"] for row in rows] == ["dinov2_small_224", "vit_base"]
    assert "KIT_DINO" in rows[0]["skipped"]
    records.main(0.0, ["vit_base"])
    assert [row["name"] for row in results_of(tmp_path / "out")[2:]] == ["vit_base"]


def test_records_failed_run_does_not_stop_the_next_and_exits_with_1(load, tmp_path, monkeypatch):
    records = load("records")
    unusable = {name: records.Attempt(("no_such_recipe",), 60) for name in ("first", "second")}
    monkeypatch.setattr(records, "attempts", lambda *_: unusable)
    with pytest.raises(SystemExit) as stop:
        records.main(1000.0, [])
    assert stop.value.code not in (0, None)
    rows = results_of(tmp_path / "out")
    assert [(row["name"], row["error"].partition(":")[0]) for row in rows] == [
        ("first", "RecipeError"), ("second", "RecipeError"),
    ]  # fmt: skip


def write_checkpoint(folder: Path, step: int, history: list[dict] | None = None) -> None:
    """Write the files of a checkpoint that `records.results` reads."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": step, "max_steps": 90, "log_history": history or []}
    files = {"trainer_state.json": json.dumps(state), "rng_state.pth": ""}
    for name, content in files.items():
        (checkpoint / name).write_text(content)
    manifest = {"files": {name: {"bytes": len(content)} for name, content in files.items()}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


def test_records_count_calls_that_trained(load, monkeypatch):
    records = load("records")
    records.FOLDER.mkdir(parents=True)
    attempt = records.attempts(None, None)["vit_tiny_cifar10"]
    steps = iter([10, None, 30])

    def train(name, attempt, seconds):
        step = next(steps)
        if step is None:
            return records.STOPPED_OUTSIDE
        write_checkpoint(records.FOLDER / name, step)
        return records.STOPPED_IN_TRAINING

    monkeypatch.setattr(records, "train", train)
    found = []
    for _ in range(3):
        assert records.measure("vit", attempt, 60.0)
        values = json.loads((records.FOLDER / "vit.json").read_text())
        found.append((values["code"], values["calls"], values["steps_before"], values["steps"]))
    assert found == [
        ("cut off", 1, 0, 10), ("cut off outside training", 1, 10, 10), ("cut off", 2, 10, 30),
    ]  # fmt: skip


def test_records_finished_run_is_not_trained_again(load):
    records = load("records")
    folder = records.FOLDER / "vit"
    folder.mkdir(parents=True)
    run = {"training": {"steps": 90}, "history": [], "metrics": {"test": {"accuracy": 0.97}}}
    (folder / "run.json").write_text(json.dumps(run))
    before = {"seconds": 100.0, "calls": 2, "finished": True}
    (records.FOLDER / "vit.json").write_text(json.dumps(before))
    assert records.measure("vit", records.attempts(None, None)["vit_tiny_cifar10"], 60.0)
    values = json.loads((records.FOLDER / "vit.json").read_text())
    assert (values["seconds"], values["calls"], values["reached"]) == (100.0, 2, True)


def test_prepared_files_have_a_fingerprint_of_their_contents(load, tmp_path):
    prep = load("prep")
    write_cifar10(tmp_path / "one", {"train": 20})
    write_cifar10(tmp_path / "other", {"train": 21})
    target = tmp_path / "prepared" / "data" / "train-00000-of-00001.parquet"
    fingerprints = []
    for source in ("one", "one", "other"):
        prep.rename_image_column(next((tmp_path / source).rglob("*.parquet")), target)
        prep.set_times(tmp_path / "prepared")
        split = open_local(DataArguments(dataset_name=str(tmp_path / "prepared"))).load("train")
        fingerprints.append(split._fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_records_of_an_unfinished_run_are_those_of_its_checkpoint(load, tmp_path):
    records = load("records")
    assert records.results(tmp_path, 256)["images"] == 0
    history = [
        {"step": 10, "loss": 2.0, "images_per_second": 100.0, "peak_memory_gib": 3.5},
        {"step": 20, "loss": 1.0, "images_per_second": 200.0, "peak_memory_gib": 4.5},
        {"step": 20, "eval_accuracy": 0.75},
    ]
    write_checkpoint(tmp_path, 30, history)
    found = records.results(tmp_path, 256)
    assert (found["finished"], found["steps"], found["of_steps"], found["images"]) == (False, 30, 90, 7680)
    assert (found["ips_median"], found["peak_gib"], found["validation"], found["test"]) == (150.0, 4.5, 0.75, None)


def test_junit_summary_counts_failures_and_skips(load, tmp_path):
    xml = tmp_path / "tests.xml"
    xml.write_text(
        """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">
        <testcase classname="tests.a" name="passes"/>
        <testcase classname="tests.a" name="fails"><failure message="assert 1 == 2"/></testcase>
        <testcase classname="tests.a" name="waits"><skipped message="needs a GPU"/></testcase>
        </testsuite></testsuites>"""
    )
    assert load("junit").summarize(xml) == {
        "tests": 3, "failures": 1, "errors": 0, "skipped": 1, "seconds": 2.5,
        "failed": {"tests.a::fails": "assert 1 == 2"}, "skipped_tests": ["tests.a::waits: needs a GPU"],
    }  # fmt: skip


def write_wheel(folder: Path) -> Path:
    """Write a wheel with the module `tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "VALUE = 1\n")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return wheel


def test_join_wheel_waits_for_all_parts_and_installs(load, tmp_path):
    wheel = write_wheel(tmp_path)
    content = wheel.read_bytes()
    description = tmp_path / "whole.json"
    checksum = hashlib.sha256(content).hexdigest()
    description.write_text(json.dumps({"name": wheel.name, "parts": 2, "sha256": checksum}))
    folder = tmp_path / "ort"
    folder.mkdir()
    join_wheel = load("join_wheel")
    (folder / "part-01").write_bytes(content[:100])
    join_wheel.main(description, folder)
    assert not (folder / "done").exists()
    (folder / "part-02").write_bytes(content[100:])
    join_wheel.main(description, folder)
    assert (folder / "done").exists()
    assert (folder / "site" / "tiny.py").read_text() == "VALUE = 1\n"


def test_join_wheel_wrong_checksum_exits(load, tmp_path):
    description = tmp_path / "whole.json"
    description.write_text(json.dumps({"name": "tiny-1.0-py3-none-any.whl", "parts": 1, "sha256": "0"}))
    (tmp_path / "part-01").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        load("join_wheel").main(description, tmp_path)
    assert stop.value.code not in (0, None)


def test_unknown_step_fails(tmp_path):
    result = run_day(copy_kit(tmp_path), tmp_path, "unknown")
    assert result.returncode == 1
    (row,) = results_of(tmp_path / "out")
    assert (row["step"], row["name"], row["code"]) == ("day", "unknown", 2)


@pytest.mark.slow
@pytest.mark.integration
def test_dry_run_records_facts_and_prepares_data(tmp_path):
    result = run_day(copy_kit(tmp_path), tmp_path, "facts", "prep")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = results_of(tmp_path / "out")
    assert not [row for row in rows if "error" in row]
    assert {row["name"]: row["code"] for row in rows if row["step"] == "day"} == {"facts": 0, "prep": 0}
    facts = {key: value for row in rows if row["step"] == "facts" for key, value in row.items()}
    assert facts["versions"]["torch"]
    assert facts["unmet_requirements"] == []
    assert min(facts["tflops"].values()) > 0
    sizes = {
        file.relative_to(tmp_path / "data").as_posix(): (table.num_rows, table.column_names)
        for file in (tmp_path / "data").rglob("*.parquet")
        for table in [pq.read_table(file)]
    }
    columns = ["image", "label"]
    suffix = "00000-of-00001.parquet"
    assert sizes == {
        f"small/data/train-{suffix}": (512, columns), f"small/data/validation-{suffix}": (64, columns),
        f"cifar10/data/train-{suffix}": (512, columns), f"cifar10/data/test-{suffix}": (128, columns),
        f"large/data/train-{suffix}": (48, columns), f"large/data/validation-{suffix}": (40, columns),
    }  # fmt: skip
    small = datasets.load_dataset(str(tmp_path / "data" / "small"), split="train", cache_dir=tmp_path / "cache")
    assert small[0]["image"].size == (32, 32)
    assert small.features["label"].names[3] == "class 3"
    assert (tmp_path / "out" / "logs.tar.gz").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.integration
def test_dry_run_sets_up_a_carried_source_and_wheel_and_runs_tests(tmp_path):
    kit = copy_kit(tmp_path)
    write_wheel(kit.parent / "whl")
    with tarfile.open(kit.parent / "hfvit.tar.gz", "w:gz") as archive:
        for name in ("hfvit", "benchmarks", "pyproject.toml", "tests/conftest.py", "tests/helpers", "tests/utils"):
            archive.add(ROOT / name, name, filter=lambda info: None if "__pycache__" in info.name else info)
    source = tmp_path / "source"
    settings = {"KIT_SOURCE": str(source), "KIT_TESTS": "tests/utils/test_counter_rng.py", "KIT_JOBS": "0"}
    result = run_day(kit, tmp_path, "setup", "tests", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "tiny.py").read_text() == "VALUE = 1\n"
    assert (source / "hfvit" / "train.py").exists()
    (found,) = [row for row in results_of(tmp_path / "out") if row["step"] == "tests"]
    assert found["tests"] > 0
    assert found["failures"] == found["errors"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.integration
@pytest.mark.parametrize("step", ["amp", "survive", "real", "records", "latency", "syncs"])
def test_dry_run_of_step_records_no_error(step, tmp_path):
    kit = copy_kit(tmp_path)
    environment = {"KIT_DINO": str(write_dinov2(tmp_path / "dinov2s"))} if step in ("real", "records") else {}
    result = run_day(kit, tmp_path, "prep", step, SECONDS_STEP=f"{step}:900", AMP_ROWS="S recipe", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = results_of(tmp_path / "out")
    assert not [row for row in rows if row.get("error")]
    names = [row.get("name") for row in rows if row["step"] == step]
    assert names
    assert not environment or any("dinov2" in name for name in names)
