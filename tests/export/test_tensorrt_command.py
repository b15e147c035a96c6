"""`optimum-cli export tensorrt`: output folders, engine.json, Triton's layout, errors."""

import argparse
import hashlib
import json

import pytest
from helpers.commands import ROOT, run_command
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import write_micro_recipe
from transformers import AutoImageProcessor

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.engine_record import BuildOptions
from hfvit.cli.export_onnx import export_onnx_command
from hfvit.cli.export_tensorrt import add_arguments, export_tensorrt_command, size_in_bytes
from hfvit.errors import ModelError, run
from hfvit.export.tensorrt_pipeline import EngineExport, graph_options
from hfvit.pipeline import main as train
from hfvit.trt.api import EngineOptions, load_backend
from hfvit.trt.compatibility import read_engine

RTX = load_backend("tensorrt_rtx")
pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(isinstance(RTX, str), reason=f"tensorrt_rtx cannot be imported: {RTX}"),
]
FOLDER = {"model.engine", "engine.json", "config.json", "preprocessor_config.json"}


@pytest.fixture
def given(tmp_path):
    """Write an ONNX file with its configuration."""
    folder = write_configs(tmp_path / "onnx")
    return write_graph(folder / "model.onnx")


def parsed(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def export(*words) -> int:
    """Run the command in this process and return its exit code."""
    return run(lambda: export_tensorrt_command(parsed(*words)))


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_record(folder) -> dict:
    return json.loads((folder / "engine.json").read_text())


def test_export_of_checkpoint_writes_a_complete_engine_folder(stock, tmp_path, capsys):
    out = tmp_path / "engine"
    words = ["--dtype", "fp16", "--min_batch", 2, "--opt_batch", 4, "--max_batch", 8, "--workspace", "64MiB"]
    assert export("--model", stock, out, *words, "--compute_capability", "8.6", "8.9") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert names(out) == FOLDER
    assert {path.name for path in out.iterdir()} == FOLDER  # no hidden folder left either
    known = read_record(out)
    engine = (out / "model.engine").read_bytes()
    assert known["sha256"] == hashlib.sha256(engine).hexdigest()
    assert known["bytes"] == len(engine)
    assert known["dtype"] == "fp16"
    assert known["backend"] == {"name": "tensorrt_rtx", "version": RTX.version, "cuda": RTX.cuda}
    assert known["compute_capabilities"] == ["8.6", "8.9"]
    assert [known["profile"][key][0] for key in ("min", "opt", "max")] == [2, 4, 8]
    assert known["options"]["workspace"] == 64 * 2**20
    assert known["labels"] == LABELS
    assert known["source"] == stock.name
    assert len(known["weights_sha256"]) == 64
    assert known["onnx"]["name"] == "model_fp16.onnx"
    assert len(known["onnx"]["sha256"]) == 64
    assert known["onnx"]["parity"]["max_abs_difference"] < 0.02
    assert known["preprocessing"] == json.loads((out / "preprocessor_config.json").read_text())
    assert str(tmp_path) not in (out / "engine.json").read_text()
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 16
    rows = {line.split("  ")[0]: line for line in captured.out.splitlines()}
    assert_names(rows["batch"], 2, 8, 4)
    assert_names(captured.out, "8.6, 8.9")
    assert_names(rows["precision"], "fp16")
    assert_names(rows["input"], "pixel_values", "3, 16, 16", "float")
    with pytest.raises(ModelError, match=r"^--model: .*\bmodel\.engine\b"):
        export_tensorrt_command(parsed("--model", out, tmp_path / "again"))


def test_export_quantized_uses_the_recipe_for_calibration_and_gate(colors, tmp_path, capsys):
    recipe, checkpoint = write_micro_recipe(tmp_path, colors), tmp_path / "out"
    assert run(lambda: train([str(recipe), "--num_train_epochs", "6"])) == 0
    capsys.readouterr()
    out = checkpoint / "tensorrt"
    assert export("--model", checkpoint, out, "--dtype", "fp8", "--max_accuracy_drop", 20) == 0
    captured = capsys.readouterr().out
    assert_names(captured, "model_fp8_tensorrt.onnx")
    assert names(out) == FOLDER
    known = read_record(out)
    assert (known["dtype"], known["compute_capabilities"]) == ("fp8", ["8.9", "12.0"])
    assert known["network"]["layers"]["QUANTIZE"] > 0
    assert known["onnx"]["quantization"]["runtime"] == "tensorrt"
    assert known["onnx"]["quantization"]["weights"].startswith("fp8")
    assert known["onnx"]["calibration"]["split"].startswith("split 'train'")
    assert known["onnx"]["gate"]["passed"]
    assert str(tmp_path) not in (out / "engine.json").read_text()
    before = (out / "engine.json").read_text()
    options = parsed("--model", checkpoint, out, "--dtype", "int8")
    options.max_accuracy_drop = -101.0  # unreachable, and rejected by the command line
    assert run(lambda: export_tensorrt_command(options)) == 4
    assert_names(capsys.readouterr().err, "model_int8_tensorrt.onnx", -101)
    assert (out / "engine.json").read_text() == before
    assert names(out) == FOLDER


def test_export_of_onnx_file_replaces_an_older_engine(given, tmp_path, capsys):
    out = tmp_path / "engine"
    assert export("--model", given, out) == 0
    first = read_record(out)
    assert first["onnx"]["sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    assert (first["dtype"], first["source"]) == ("fp32", "model.onnx")
    assert export("--model", given.parent, out, "--max_batch", 8) == 0
    assert read_record(out)["profile"]["max"][0] == 8
    assert names(out) == FOLDER


@pytest.mark.parametrize("exists", [False, True])
def test_build_after_a_kill_before_the_engine_is_renamed_completes_the_folder(given, tmp_path, monkeypatch, exists):
    out = tmp_path / "engine"
    if exists:
        assert export("--model", given, out) == 0

    def commit(finished, path):
        raise InterruptedError  # no HFViTError, as a kill

    with monkeypatch.context() as patch:
        patch.setattr("hfvit.export.tensorrt_pipeline.commit_file", commit)
        with pytest.raises(InterruptedError):
            export_tensorrt_command(parsed("--model", given, out, "--max_batch", 8))
    with pytest.raises(ModelError):  # the older engine is not taken for the new one
        read_engine(find_artifact(out))
    assert export("--model", given, out, "--max_batch", 8) == 0
    assert names(out) == FOLDER
    assert read_record(out)["sha256"] == hashlib.sha256((out / "model.engine").read_bytes()).hexdigest()


def test_engine_of_onnx_file_records_no_calibration(given, tmp_path):
    words = ["--dtype", "int8", "--calibration_dataset", "digits", "--calibration_samples", 9]
    export = EngineExport(graph_options(parsed("--model", given, tmp_path / "engine", *words)), RTX, EngineOptions())
    built = BuildOptions(hardware_compatibility="none", version_compatible=False)
    export.add_calibration(built)
    assert built == BuildOptions(hardware_compatibility="none", version_compatible=False)


def test_engine_of_checkpoint_records_given_calibration_options(stock, tmp_path):
    words = ["--dtype", "int8", "--calibration_dataset", tmp_path, "--calibration_split", "test"]
    export = EngineExport(graph_options(parsed("--model", stock, tmp_path / "engine", *words)), RTX, EngineOptions())
    built = BuildOptions(hardware_compatibility="none", version_compatible=False)
    export.add_calibration(built)
    assert (built.calibration_dataset, built.calibration_split) == (tmp_path.name, "test")
    assert built.calibration_samples is None


def test_export_with_failed_build_keeps_the_old_engine(given, tmp_path, capsys):
    out = tmp_path / "engine"
    assert export("--model", given, out) == 0
    before = {name: (out / name).read_bytes() for name in FOLDER}
    write_graph(given, batch=4)
    assert export("--model", given, out) == 2
    error = capsys.readouterr().err
    assert option_of(error) == "min_batch, opt_batch, max_batch"
    assert_names(error, 4)
    assert {name: (out / name).read_bytes() for name in FOLDER} == before
    assert names(out) == FOLDER


def test_export_with_triton_writes_a_model_repository(given, tmp_path, capsys):
    """Build with TensorRT for RTX: the command requires full TensorRT, the layout is the same."""
    out = tmp_path / "repository" / "colors"
    options = graph_options(parsed("--model", given, out, "--triton", "colors"))
    EngineExport(options, RTX, EngineOptions(1, 8, 32)).run()
    assert names(out) == {"1/model.plan", "config.pbtxt", "labels.txt", *FOLDER - {"model.engine"}}
    assert (out / "labels.txt").read_text().splitlines() == LABELS
    assert read_record(out)["file"] == "1/model.plan"
    assert read_record(out)["sha256"] == hashlib.sha256((out / "1" / "model.plan").read_bytes()).hexdigest()
    assert (
        (out / "config.pbtxt").read_text()
        == """\
name: "colors"
platform: "tensorrt_plan"
max_batch_size: 32
input [
  {
    name: "pixel_values"
    data_type: TYPE_FP32
    dims: [ 3, 16, 16 ]
  }
]
output [
  {
    name: "logits"
    data_type: TYPE_FP32
    dims: [ 3 ]
    label_filename: "labels.txt"
  }
]
dynamic_batching {
  preferred_batch_size: [ 8, 32 ]
  max_queue_delay_microseconds: 1000
}
instance_group [
  {
    count: 1
    kind: KIND_GPU
  }
]
"""
    )


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["--model", "{tmp}/nowhere", "{tmp}/out"], None, ["{tmp}/nowhere"]),
        (["--model", "{stock}", "{tmp}/out", "--dtype", "fp8", "--compute_capability", "8.6"], "dtype",
         ["fp8", "8.9", "8.6", "int8"]),
        (["--model", "{stock}", "{tmp}/out", "--dtype", "bf16", "--compute_capability", "7.5"], "dtype",
         ["bf16", "8.0", "7.5"]),
        (["--model", "{stock}", "{tmp}/out", "--compute_capability", "9.0"], "compute_capability", ["9.0", "8.6"]),
        (["--model", "{stock}", "{tmp}/out", "--triton", "vit"], "triton", ["--backend tensorrt"]),
        (["--model", "{stock}", "{tmp}/out", "--triton", "a/b"], "triton", ["'a/b'"]),
        (["--model", "{stock}", "{tmp}/out", "--triton", "vit", "--min_batch", "2"], "triton", ["--min_batch", "2"]),
        (["--model", "{stock}", "{tmp}/out", "--dtype", "int8"], "calibration_dataset", ["{stock}", "--dtype fp16"]),
        (["--model", "{stock}", "{stock}"], "output", ["{stock}", "config.json"]),
        (["--model", "{given}", "{tmp}/out", "--dtype", "fp16"], "dtype", ["fp16", "{given}", "fp32"]),
        (["--model", "{stock}", "{tmp}/out", "--timing_cache", "{tmp}/cache"], "timing_cache", []),
        (["--model", "{stock}", "{tmp}/out", "--min_agreement", "0.9"], "min_agreement", ["0.9", "{stock}"]),
        (["--model", "{stock}", "{tmp}/out", "--calibration_split", "test"], "calibration_split",
         ["test", "--dtype int8"]),
        (["--model", "{given}", "{tmp}/out", "--gate_samples", "9"], "gate_samples", ["9"]),
        (["--model", "{given}", "{tmp}/out", "--opset", "20"], "opset", ["20"]),
        (["--model", "{given}", "{tmp}/out", "--atol", "0"], "atol", ["0.0"]),
        (["--model", "{given}", "{tmp}/out", "--no_gate"], "no_gate", ["ONNX"]),
        (["--model", "{given}", "{tmp}/out", "--device", "cpu"], "device", ["cpu", "ONNX"]),
        (["--model", "{given}", "{tmp}/out", "--dtype", "int8", "--calibration_samples", "9"], "calibration_samples",
         ["9"]),
    ],
)  # fmt: skip
def test_export_tensorrt_with_a_wrong_value_names_option_and_data(words, option, data, stock, given, tmp_path, capsys):
    places = {"tmp": tmp_path, "stock": stock, "given": given}
    before = names(stock)
    assert export(*(word.format(**places) for word in words)) == 2
    error = capsys.readouterr().err
    assert option_of(error) == option
    assert_names(error, *(item.format(**places) for item in data))
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    assert names(stock) == before
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


def test_export_of_onnx_runtime_graph_raises(stock, tmp_path, capsys):
    from hfvit.cli.export_onnx import add_arguments as onnx_arguments

    parser = argparse.ArgumentParser()
    onnx_arguments(parser)
    words = ["--model", str(stock), "--optimize", "--quantize", "int8-dynamic", str(tmp_path / "onnx")]
    assert run(lambda: export_onnx_command(parser.parse_args(words))) == 0
    for name in ("model_optimized.onnx", "model_quantized.onnx"):
        assert export("--model", tmp_path / "onnx" / name, tmp_path / "out") == 2
        assert_names(capsys.readouterr().err, tmp_path / "onnx" / name, "ONNX Runtime")
        assert not names(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("512 mib", 2**29), ("2GB", 2 * 10**9), ("1.5KiB", 1536), ("4096", 4096)]
)
def test_size_option_parses_units(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["1 quart", "", "GiB", "-1GiB", "0"])
def test_size_option_of_invalid_text_raises(text):
    with pytest.raises(argparse.ArgumentTypeError, match="512MiB"):
        size_in_bytes(text)


def test_export_with_output_after_compute_capability_explains_the_order(capsys):
    with pytest.raises(SystemExit):
        parsed("--model", "m", "--compute_capability", "8.6", "engine")
    error = capsys.readouterr().err
    assert option_of(error) == "compute_capability"
    assert_names(error.partition(" error: ")[2], "'engine'", "OUTPUT")


@pytest.mark.integration
def test_optimum_cli_runs_export_tensorrt(given, tmp_path):
    words = ["optimum-cli", "export", "tensorrt", "--model", given, tmp_path / "engine"]
    result = run_command(*words, new_process=True, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert names(tmp_path / "engine") == FOLDER
