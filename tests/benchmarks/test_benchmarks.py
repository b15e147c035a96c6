"""The benchmark scripts run with --quick; measurements are not asserted."""

import json
import sys

import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.messages import assert_names

CONTENDERS = dict.fromkeys(("input_pipeline", "train_step", "startup"), ("hfvit", "timm"))
CONTENDERS["input_pipeline"] += ("v2 PIL", "v2 decode_jpeg", "v2 with_format")
CONTENDERS["train_step"] += ("freed memory kept", "glibc's defaults", "compiled")
CONTENDERS["predict"] = ("pipeline", "hfvit", "hfvit bf16")
CONTENDERS["attention_scaling"] = ("Swin-T, windows", "ViT-S/16, full", "ViT-S/8, full")
CONTENDERS["inference"] = ("eager fp32", "torch.compile", "ONNX Runtime", "int8 static", "hfvit int8")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    return common


@pytest.mark.parametrize("name", [*CONTENDERS, "engines", "serving"])
def test_help_describes_options(name):
    result = run_command(sys.executable, f"benchmarks/{name}.py", "--help")
    assert result.returncode == 0, result.stderr
    for word in ("--quick", "--rounds", "--json"):
        assert word in result.stdout


def test_metrics_contenders_compute_the_same(common):
    import metrics

    logits, labels = metrics.generate(300, 7, 2.0)
    names = [str(index) for index in range(7)]
    found, expected = (contender(logits, labels, names) for contender in (metrics.hfvit_metric, metrics.scikit_learn))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
    assert metrics.evaluate_arrow(logits, labels, names)["accuracy"] == expected["accuracy"]


def test_import_milliseconds_are_by_top_level_package(common):
    import startup

    found = startup.import_milliseconds("import numpy, json")
    assert found["numpy"] >= 1
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_interleaved_rounds_start_with_different_contenders(common):
    order = []
    results = common.interleaved(
        {name: {"name": name} for name in "abc"}, 3, lambda job: order.append(job["name"]) or {}
    )
    assert "".join(order) == "abcbcacab"
    assert {name: len(rounds) for name, rounds in results.items()} == {"a": 3, "b": 3, "c": 3}


def test_medians_and_spread(common):
    rounds = [{"seconds": value, "what": "x"} for value in (3.0, 1.0, 2.0)]
    assert common.medians(rounds) == {"seconds": 2.0, "what": "x"}
    assert common.spread([3.0, 1.0, 2.0]) == 1.0


def test_table_is_markdown(common):
    lines = common.table(
        [{"what": "a", "n": 1234.5}, {"what": "b", "n": None}], {"what": "", "n": ",.0f"}
    ).splitlines()
    assert lines == ["| what |     n |", "| ---- | ----: |", "| a    | 1,234 |", "| b    |     - |"]


def test_inference_rows_are_relative_to_eager_and_to_the_float_graph(common):
    import inference

    results = {name: [{"1 p50": 8.0, "1 p95": 9.0, "16 p50": 80.0, "16 p95": 90.0}] for name in inference.CONTENDERS}
    results["hfvit int8"] = [
        {"1 p50": value, "1 p95": 5.0, "16 p50": 20.0, "16 p95": 21.0} for value in (1.0, 2.0, 4.0)
    ]
    sizes = dict.fromkeys(inference.GRAPHS, 100) | {"hfvit int8": 26}
    rows = inference.rows_of(results, {"hfvit int8": {"accuracy": 0.9}}, sizes)
    assert [(row["contender"], row["batch"]) for row in rows] == [
        (n, b) for b in (1, 16) for n in inference.CONTENDERS
    ]
    ours, at_16 = (row for row in rows if row["contender"] == "hfvit int8")
    assert ours == {
        "contender": "hfvit int8", "batch": 1, "p50 ms": 2.0, "p95 ms": 5.0, "images/s": 500.0, "spread": 1.5,
        "x eager": 4.0, "MB": 26e-6, "size": 0.26, "accuracy": 0.9,
    }  # fmt: skip
    assert at_16["x eager"] == 4.0
    assert rows[0]["MB"] is None


def test_inference_needs_both_model_and_data_set(common, capsys):
    import inference

    with pytest.raises(SystemExit, match=r"--model\b.*--dataset_name\b"):
        inference.main(["--model", "somewhere"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without a GPU")
def test_engines_without_a_gpu_exits(common):
    import engines

    with pytest.raises(SystemExit, match=r"\bGPU\b.*`hfvit doctor`") as stop:
        engines.main(["--quick"])
    assert "\n" not in stop.value.code  # a message: the exit code is 1


def test_engine_rows_are_relative_to_eager_fp32(common):
    import engines

    results = {
        name: [
            {f"{batch} {p}": 10.0 * batch for batch in engines.BATCHES for p in ("p50", "p95")} | {"difference": 0.5}
        ]
        for name in engines.CONTENDERS
    }
    results["engine fp16"][0]["8 p50"] = 20.0
    rows = engines.rows_of(results, {"engine fp16": 50_000_000})
    assert [(row["contender"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 8, 64) for name in engines.CONTENDERS
    ]
    (fast,) = [row for row in rows if row["contender"] == "engine fp16" and row["batch"] == 8]
    assert (fast["x eager fp32"], fast["x eager fp16"], fast["images/s"], fast["MB"]) == (4.0, 4.0, 400.0, 50.0)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_quick_run_measures_engines(tmp_path):
    result = run_command(sys.executable, "benchmarks/engines.py", "--quick", "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["contender"] for row in rows} >= {"eager fp32", "eager fp16", "torch.compile fp16", "engine int8"}
    assert min(row["p50 ms"] for row in rows) > 0


def test_attention_scaling_fits_the_exponent_in_pixels(common, tmp_path):
    import attention_scaling

    costs = {112: 5.0, 224: 40.0, 448: 640.0, 672: 3240.0}  # quadratic in the pixels from 224 on
    rows = [{"model": "x", "pixels": size, "ms": cost, "MB": size**2 / 1e4} for size, cost in costs.items()]
    assert attention_scaling.exponents(rows) == ["x: time grows with pixels^2.00, memory with pixels^1.00"]
    attention_scaling.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CONTENDERS)
def test_a_quick_run_measures_hfvit_and_its_peers(name, tmp_path):
    words = (f"benchmarks/{name}.py", "--quick", "--json", tmp_path / "rows.json")
    result = run_command(sys.executable, *words, timeout=1000)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["quick"] is True
    assert written["versions"]["torch"]
    assert written["hardware"]["cores"] > 0
    text = json.dumps(written["rows"])
    for contender in CONTENDERS[name]:
        assert contender in text
    figures = [value for row in written["rows"] for key, value in row.items() if key in ("images/s", "seconds", "ms")]
    assert figures
    assert min(figures) > 0


def test_quick_soak_has_fewer_kills(common):
    import soak

    assert (soak.parse_options([]).kills, soak.parse_options(["--quick"]).kills) == (15, 2)


@pytest.mark.slow
def test_quick_soak_survives_all_kills(tmp_path):
    result = run_command(sys.executable, "benchmarks/soak.py", "--quick", "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["outcome"] for row in written["rows"]] == ["survived"] * 2
    assert_names(result.stdout, 2, 0)


@pytest.mark.slow
def test_quick_trials_lose_nothing(tmp_path):
    trials = ("damage", "pickle", "resume", "machine", "memory")
    words = ("--quick", "--trials", *trials, "--json", tmp_path / "rows.json")
    result = run_command(sys.executable, "benchmarks/soak.py", *words)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["lost"] == 0
    assert {row["trial"] for row in written["rows"]} == set(trials)
