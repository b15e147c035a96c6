"""`hfvit validate`: metrics against an independent count, exit codes, saved records."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.images import LABELS, colored_split
from helpers.loopback_hub import LoopbackHub
from helpers.loopback_store import Blob
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import BRIGHTEST, expected_logits, write_configs, write_graph
from helpers.recipes import write_micro_recipe
from helpers.records import artifact_result, exported_file, make_gate
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, recall_score

import hfvit
from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.export_record import ExportRecord
from hfvit.cli import main as hfvit_command
from hfvit.errors import DataError, ModelError
from hfvit.evaluation.compare import Comparison, check_recordable, compare, record
from hfvit.evaluation.split import evaluation_split
from hfvit.export.onnx import export_onnx
from hfvit.metrics.paired import PairedCounts
from hfvit.pipeline import main as train

NOISY = np.array([[8, 8, 0], [0, 8, 0], [0, -8, 8]], dtype=np.float32)  # takes about half of the red for green
PERMUTED = BRIGHTEST[:, [1, 2, 0]]  # a damaged head
TEST_ROWS = colored_split(31, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """A run of the micro recipe with an export in a subfolder."""
    folder = tmp_path_factory.mktemp("run")
    train([str(write_micro_recipe(folder, colors, "use_cpu: true"))])
    export = write_configs(folder / "out" / "onnx")
    write_graph(export / "model.onnx")
    write_graph(export / "model_quantized.onnx", PERMUTED)
    for file in ("model.onnx", "model_quantized.onnx"):
        ExportRecord(source="out", files=ExportRecord.load(export).files).enter(export, file, exported_file())
    return folder / "out"


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def graphs(tmp_path):
    """A folder with three graphs: a correct one, one with a small error, one with a large error."""
    for name, weights in (("model", BRIGHTEST), ("noisy", NOISY), ("permuted", PERMUTED)):
        write_graph(tmp_path / "graphs" / f"{name}.onnx", weights)
    return write_configs(tmp_path / "graphs")


def counted(weights) -> np.ndarray:
    return np.stack([expected_logits(image, weights) for image in TEST_ROWS["img"]])


def command(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        hfvit_command([str(word) for word in words])
    return stop.value.code


def test_compare_equals_an_independent_count(graphs, colors):
    split = evaluation_split(graphs, dataset_name=str(colors), split="test")
    files = [graphs / name for name in ("noisy.onnx", "permuted.onnx")]
    comparison = compare(graphs, files, split, batch_size=4, max_accuracy_drop=100, threads=1, show_progress=False)
    labels, reference = np.array(TEST_ROWS["label"]), counted(BRIGHTEST)
    for row, weights in zip(comparison.rows, (BRIGHTEST, NOISY, PERMUTED), strict=True):
        logits = counted(weights)
        predicted = logits.argmax(axis=1)
        hits = int((predicted == labels).sum())
        interval = binomtest(hits, 31).proportion_ci(0.95, method="wilson")
        assert row.accuracy == hits / 31
        assert row.accuracy_interval == pytest.approx([interval.low, interval.high])
        assert row.change_points == pytest.approx(100 * (hits - (reference.argmax(axis=1) == labels).sum()) / 31)
        assert row.agreement == (predicted == reference.argmax(axis=1)).mean()
        right = predicted == labels
        lost, gained = int((~right).sum()), 0  # the reference is always right
        assert (row.lost, row.gained) == ((None, None) if row is comparison.rows[0] else (lost, gained))
        if row is not comparison.rows[0]:
            assert row.p_value == pytest.approx(binomtest(lost, lost).pvalue)
            assert row.change_interval[0] <= row.change_points <= row.change_interval[1]
        assert row.max_logit_difference == pytest.approx(np.abs(logits - reference).max(), abs=1e-4)
        assert row.threads == 1
        assert 0 < row.latency_ms_p50 <= row.latency_ms_p95
        assert row.images_per_second > 0
    assert comparison.rows[0].accuracy == 1.0
    assert 0.4 < comparison.rows[1].accuracy < 1.0
    assert comparison.rows[0].megabytes == (graphs / "model.onnx").stat().st_size / 1e6
    assert comparison.passed
    assert len(comparison.table().splitlines()) == 8


@pytest.mark.parametrize(("flips", "refused"), [(0, False), (3, False), (5, False), (9, True)])
def test_loss_within_chance_is_a_warning_with_the_number_of_images(flips, refused, tmp_path, colors):
    """Flip images of one artifact only: five of 31 may be chance, nine are not (McNemar, p = 0.06 and 0.004)."""
    write_configs(tmp_path)
    split = evaluation_split(write_graph(tmp_path / "model.onnx").parent, dataset_name=str(colors), split="test")
    reference = hfvit.load_classifier(tmp_path)
    flipping = hfvit.load_classifier(tmp_path)
    seen = iter(range(31))

    def run(prepared, own=flipping.run):
        logits = own(prepared)
        return np.stack([np.roll(row, 1) if next(seen, 31) < flips else row + 0.1 for row in logits])

    flipping.run = run
    comparison = compare(reference, [flipping], split, batch_size=31, show_progress=False)
    row = comparison.rows[1]
    assert (row.lost, row.gained) == (flips, 0)
    assert comparison.passed is not refused
    assert row.verdict.startswith("REFUSED" if refused else "passed, too few")
    if refused:
        assert len(comparison.failures) == 1
        return
    assert comparison.failures == []
    needed = PairedCounts(31 - flips, flips, 0, 0).images_needed(0.005)
    assert row.images_needed == needed
    if flips == 5:  # the interval decides, and the test with six of them
        assert (needed, row.change_interval[1] < -0.5) == (31, True)
        needed = 38
    assert_names(comparison.warnings[0], 31, f"{row.change_points:+.2f}", f"{needed:,}")
    assert comparison.warnings[0] in comparison.table()


@pytest.fixture
def mixed_colors(tmp_path):
    """A table of pictures with any of the three channels bright, and lists of these."""
    rng = np.random.default_rng(5)
    pictures = []
    for row in range(32):
        pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., [index for index in range(3) if row >> index & 1]] += 160
        pictures.append(Image.fromarray(pixels))
    lists = [[LABELS[index] for index in range(3) if row >> index & 1] for row in range(32)]
    table = datasets.Dataset.from_dict({"image": pictures, "labels": lists}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "mixed" / "test.parquet")
    return tmp_path / "mixed", pictures, np.array([[name in some for name in LABELS] for some in lists])


def with_thresholds(folder, thresholds):
    config = json.loads((folder / "config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": thresholds}
    (folder / "config.json").write_text(json.dumps(config))


def test_figures_of_several_labels_are_those_of_an_independent_count(graphs, mixed_colors, tmp_path):
    folder, pictures, targets = mixed_colors
    thresholds = [0.5, 0.99, 0.001]  # no green and always blue for logits of half the size
    with_thresholds(graphs, thresholds)
    smaller = BRIGHTEST * np.float32([1, 0.5, 0.5])
    other = write_graph(tmp_path / "other" / "other.onnx", smaller[:, [1, 2, 0]]).parent
    with_thresholds(write_configs(other, [LABELS[1], LABELS[2], LABELS[0]]), [0.99, 0.001, 0.5])
    split = evaluation_split(graphs, dataset_name=str(folder), split="test")
    assert np.array_equal(split.labels, targets)
    files = [graphs / "noisy.onnx", graphs / "permuted.onnx", other]
    comparison = compare(graphs, files, split, batch_size=5, min_agreement=0.9, show_progress=False)
    probabilities = [
        1 / (1 + np.exp(-np.stack([expected_logits(picture, weights) for picture in pictures])))
        for weights in (BRIGHTEST, NOISY, PERMUTED, smaller)
    ]
    answers = [share >= thresholds for share in probabilities]
    for row, share, answer in zip(comparison.rows, probabilities, answers, strict=True):
        assert row.accuracy is None
        assert row.map == pytest.approx(average_precision_score(targets, share), abs=1e-6)
        assert row.micro_f1 == row.score.value == pytest.approx(f1_score(targets, answer, average="micro"))
        assert row.agreement == (answer == answers[0]).all(axis=1).mean()
        assert row.change_points == pytest.approx(100 * (row.micro_f1 - comparison.rows[0].micro_f1))
        assert row.micro_f1_interval[0] <= row.micro_f1 <= row.micro_f1_interval[1]
    assert comparison.rows[0].micro_f1 == 1.0
    assert not comparison.passed
    assert len(comparison.failures) == 3
    for row in comparison.rows[1:]:
        assert row.change_interval[0] <= row.change_points <= row.change_interval[1] < 0
        assert row.p_value < 0.05
        assert row.images_needed == 32  # these are enough
    assert "micro F1" in comparison.table()
    metrics = compare(other, [], split, all_metrics=True, show_progress=False).metrics
    assert [(each.label, each.threshold) for each in metrics.per_class] == [*zip(LABELS, thresholds, strict=True)]


def test_loss_of_several_labels_within_chance_is_a_warning_with_the_number_of_images(graphs, mixed_colors):
    with_thresholds(graphs, [0.5, 0.5, 0.5])
    split = evaluation_split(graphs, dataset_name=str(mixed_colors[0]), split="test")
    reference, flipping = hfvit.load_classifier(graphs), hfvit.load_classifier(graphs)
    seen = iter(range(32))

    def run(prepared, own=flipping.run):
        return np.stack([-row if next(seen, 32) == 5 else row for row in own(prepared)])

    flipping.run = run
    comparison = compare(reference, [flipping], split, batch_size=32, show_progress=False)
    (warning,) = comparison.warnings
    row = comparison.rows[1]
    half = (row.change_interval[1] - row.change_interval[0]) / 2
    assert row.images_needed == np.ceil(32 * (half / (-row.change_points - 0.5)) ** 2)
    assert_names(warning, 32, f"{row.images_needed:,}")


def test_agreement_of_several_labels_is_of_finite_logits(graphs, mixed_colors):
    with_thresholds(graphs, [0.5, 0.5, 0.5])
    split = evaluation_split(graphs, dataset_name=str(mixed_colors[0]), split="test")
    broken = write_graph(graphs / "broken.onnx", BRIGHTEST * np.float32(np.nan))
    row = compare(graphs, [broken], split, show_progress=False).rows[1]
    assert (row.agreement, row.not_finite) == (0.0, 32)


def test_split_of_another_kind_of_labels_is_refused(graphs, mixed_colors):
    with pytest.raises(DataError, match=r"^label_column: "):
        evaluation_split(graphs, dataset_name=str(mixed_colors[0]), split="test")


def test_classes_in_another_order_are_matched_by_name(graphs, colors, tmp_path):
    other = tmp_path / "other"
    write_graph(other / "model.onnx", PERMUTED)
    write_configs(other, [LABELS[1], LABELS[2], LABELS[0]])
    split = evaluation_split(graphs, dataset_name=str(colors), split="test")
    comparison = compare(graphs, [other], split, min_agreement=1.0, show_progress=False)
    assert comparison.passed
    assert comparison.rows[1].images_needed is None
    assert comparison.rows[1].accuracy == comparison.rows[1].agreement == 1.0
    assert comparison.rows[1].max_logit_difference < 1e-5
    write_configs(other, ["red", "green", "violet"])
    with pytest.raises(ModelError) as caught:
        compare(graphs, [other], split, show_progress=False)
    assert_names(caught.value, other, "blue, violet")


def test_failures_name_each_exceeded_limit(graphs, colors, tmp_path):
    split = evaluation_split(graphs, dataset_name=str(colors), split="test")
    broken = write_graph(graphs / "broken.onnx", BRIGHTEST * np.float32(np.nan))
    loaded = hfvit.load_classifier(graphs / "noisy.onnx")
    others = [loaded, graphs / "permuted.onnx", broken, graphs / "model.onnx"]
    comparison = compare(graphs, others, split, max_accuracy_drop=50, min_agreement=0.999, show_progress=False)
    noisy, permuted, nan = comparison.failures
    assert_names(noisy, "noisy.onnx", f"{comparison.rows[1].agreement:.2%}", "99.90%")
    assert_names(permuted, "permuted.onnx", "0.00%", "100.00", "100.00%", 50)
    assert_names(nan, "broken.onnx", "NaN", 31, "0.00%")
    assert not comparison.passed
    assert_names(comparison.table(), "noisy.onnx", "permuted.onnx", "broken.onnx", 50, "99.90%")


def test_graph_with_preprocessing_is_compared_with_one_without(graphs, colors):
    write_graph(graphs / "raw.onnx", pixels=True)
    split = evaluation_split(graphs, dataset_name=str(colors), split="test", max_samples=9)
    comparison = compare(graphs, [graphs / "raw.onnx"], split, batch_size=2, show_progress=False)
    row = comparison.rows[1]
    assert row.agreement == 1.0
    assert row.max_logit_difference < 1e-4
    assert [row.includes_preprocessing for row in comparison.rows] == [False, True]
    lines = comparison.table().splitlines()
    assert ["raw.onnx *" in line for line in lines[1:3]] == [False, True]
    assert lines[6].split()[0] == "*"


def test_device_applies_to_artifacts_that_compare_loads(graphs, colors):
    """A classifier on another device than ONNX Runtime supports can be the reference."""
    split = evaluation_split(graphs, dataset_name=str(colors), split="test", max_samples=3)
    loaded = hfvit.load_classifier(graphs, device="cpu")
    for device, others in (("npu", [loaded]), ("cpu", [graphs])):
        comparison = compare(loaded, others, split, batch_size=1, device=device, show_progress=False)
        assert [row.device for row in comparison.rows] == ["cpu", "cpu"]
    with pytest.raises(ModelError, match=r"^device: .*'npu'"):
        compare(loaded, [graphs], split, device="npu", show_progress=False)


@pytest.mark.parametrize(
    ("file", "text", "datum"),
    [
        ("run.json", "{", "line 1 column 2"),
        ("run.json", '{"loss": NaN}', "NaN"),
        ("run.json", "[1]", "JSON"),
        ("onnx/export.json", '{"files": ', "line 1 column 11"),
        ("onnx/export.json", '{"files": [1]}', "files"),
        ("onnx/export.json", '{"files": {"model.onnx": 1}}', "files.model.onnx"),
    ],
)
def test_unwritable_record_is_an_error_before_the_comparison(out, capsys, file, text, datum):
    (out / file).write_text(text)
    assert command("validate", out, out / "onnx") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_names(printed.err, out / file, datum)
    assert printed.err.count("\n") == 1


@pytest.fixture
def read_only(out):
    """A run that this user may read, not write: root, who may everything, becomes another user meanwhile."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(out, folder, dirs_exist_ok=True)
    folder.chmod(0o555)
    (folder / "onnx").chmod(0o777)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_read_only_folder_is_an_error_before_the_comparison(read_only):
    message = rf"{read_only}/run\.json .*{os.strerror(errno.EACCES)}"
    with pytest.raises(ModelError, match=message):
        check_recordable([read_only])
    with pytest.raises(ModelError, match=message):
        record(Comparison(make_gate(artifact_result())), [read_only])
    check_recordable([read_only / "onnx"])  # this one may be written


def test_metrics_of_the_reference_equal_scikit_learns(graphs, colors):
    split = evaluation_split(graphs, dataset_name=str(colors), split="test")
    others = [graphs / "model.onnx"]
    comparison = compare(graphs / "noisy.onnx", others, split, batch_size=4, all_metrics=True, show_progress=False)
    labels, predicted = np.array(TEST_ROWS["label"]), counted(NOISY).argmax(axis=1)
    metrics = comparison.metrics
    assert metrics.accuracy == comparison.rows[0].accuracy == (predicted == labels).mean()
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert np.array_equal(metrics.confusion_matrix.dense(), confusion_matrix(labels, predicted))
    assert f"{recall_score(labels, predicted, average='macro'):.4f}" in comparison.table()  # balanced accuracy
    assert [each.label for each in metrics.per_class] == LABELS
    lines = comparison.class_table().splitlines()
    assert len(lines) == 1 + len(LABELS)
    recall = recall_score(labels, predicted, average=None)
    assert [line.split()[3] for line in lines[1:]] == [f"{value:.4f}" for value in recall]


def test_metrics_without_finite_logits_or_request_are_none(graphs, colors):
    split = evaluation_split(graphs, dataset_name=str(colors), split="test")
    write_graph(graphs / "model.onnx", BRIGHTEST * np.nan)
    for all_metrics in (True, False):
        comparison = compare(graphs / "model.onnx", [], split, all_metrics=all_metrics, show_progress=False)
        assert not comparison.passed
        assert comparison.metrics is None
        assert comparison.class_table() == ""


def test_validate_writes_metrics_and_plots_of_the_reference(out, tmp_path, capsys):
    target, plots = tmp_path / "gate.json", tmp_path / "new" / "plots"
    code = command("validate", out, "--split", "test", "--per_class", "--plots", plots, "--output", target)
    assert code == 0
    assert {path.stem for path in plots.iterdir()} == {
        name + suffix for name in ("confusion_matrix", "per_class_recall", "reliability") for suffix in ("", "_dark")
    }
    metrics = json.loads(target.read_text())["metrics"]
    expected = json.loads((out / "run.json").read_text())["metrics"]["test"]
    assert metrics.keys() == expected.keys()
    for key in ("accuracy", "macro_f1", "images", "per_class", "confusion_matrix"):
        assert metrics[key] == expected[key]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    printed = capsys.readouterr().out
    assert_names(printed, f"{expected['macro_f1']:.4f}", *LABELS, plots)


def test_validate_uses_held_out_images_and_saves_the_result(out, tmp_path, capsys):
    """The reference has the accuracy that the run reported; the damaged export fails."""
    run_json = json.loads((out / "run.json").read_text())
    target = tmp_path / "gate.json"
    paths = [out, out / "onnx", out / "onnx" / "model_quantized.onnx"]
    code = command("validate", *paths, "--threads", 1, "--max_accuracy_drop", 20, "--output", target)
    printed = capsys.readouterr()
    assert code == 4
    assert printed.err.count("hfvit: error:") == 1
    assert "Traceback" not in printed.err
    assert_names(printed.err, paths[2], "100.00%", 20)
    assert_names(printed.out, "train", 0.2, 13)

    saved = json.loads(target.read_text())
    assert [row["artifact"] for row in saved["artifacts"]] == [str(path) for path in paths]
    assert saved["artifacts"][0]["accuracy"] == run_json["metrics"]["validation"]["accuracy"]
    assert saved["data"]["images"] == run_json["metrics"]["validation"]["images"] == 13
    held = json.loads((out / "run.json").read_text())
    assert {key: value for key, value in held.items() if key != "gate"} == run_json
    assert [row["artifact"] for row in held["gate"]["artifacts"]] == [
        "out", "onnx/model.onnx", "onnx/model_quantized.onnx",
    ]  # fmt: skip
    assert held["gate"]["passed"] is False
    files = ExportRecord.load(out / "onnx").files
    assert [files[name].gate.passed for name in ("model.onnx", "model_quantized.onnx")] == [True, False]
    assert files["model.onnx"].bytes == 1
    assert files["model_quantized.onnx"].gate.reference.accuracy == saved["artifacts"][0]["accuracy"]
    assert str(tmp_path) not in (out / "onnx" / "export.json").read_text()
    assert str(out) not in json.dumps(held["gate"])


def test_exported_graph_agrees_with_the_checkpoint(out):
    model = hfvit.load_classifier(out, device="cpu").backend.model
    export_onnx(model, out / "onnx" / "model.onnx")
    shutil.copy(out / "config.json", out / "onnx")  # and with it the preprocessing of the checkpoint
    (out / "onnx" / "preprocessor_config.json").unlink()
    row = compare(out, [out / "onnx"], evaluation_split(out, split="test"), device="cpu", show_progress=False).rows[1]
    assert row.agreement == 1.0
    assert row.change_points == 0.0
    assert 0.0 < row.max_logit_difference < 1e-4


def test_validate_accepts_another_split(out, capsys):
    assert command("validate", out, out / "onnx", "--split", "test", "--max_samples", 20, "--threads", 1) == 0
    printed = capsys.readouterr()
    assert_names(printed.out, "'test'", 20, 31, 42)
    assert not printed.err


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["{out}/no"], None, ["{out}/no"]),
        (["{out}", "{out}/onnx/modle.onnx"], None, ["{out}/onnx/modle.onnx"]),
        (["{out}", "--split", "tset"], "split", ["'tset'", "train, test", "'test'"]),
        (["{out}", "--output", "{out}/nowhere/gate.json"], "output", ["{out}/nowhere"]),
        (["{out}", "--plots", "{out}/run.json"], "plots", ["{out}/run.json"]),
        (["{out}", "--min_agreement", "99"], "min_agreement", ["99"]),
        (["{out}", "--min_agreement", "nan"], "min_agreement", ["nan"]),
        (["{out}", "--max_accuracy_drop", "nan"], "max_accuracy_drop", ["nan"]),
        (["{out}", "--max_accuracy_drop", "-0.5"], "max_accuracy_drop", ["-0.5"]),
        (["{out}", "--max_accuracy_drop", "0.5"], "max_accuracy_drop", ["0.5"]),
        (["{out}", "--min_agreement", "0.99"], "min_agreement", ["0.99"]),
        (["{out}", "--seed", "-1"], "seed", ["-1"]),
        (["{out}", "--batch_size", "0"], "batch_size", ["0"]),
    ],
)
def test_validate_with_an_invalid_value_names_the_option(out, capsys, words, option, data):
    assert command("validate", *(word.format(out=out) for word in words)) == 2
    printed = capsys.readouterr()
    assert option_of(printed.err) == option
    assert_names(printed.err, *(item.format(out=out) for item in data))
    assert "Traceback" not in printed.err
    assert "gate" not in json.loads((out / "run.json").read_text())


def test_compare_gives_threads_to_the_artifacts_that_take_them(tmp_path, monkeypatch):
    files = [write_graph(write_configs(tmp_path) / "model.onnx"), tmp_path / "model.pte"]
    files[1].write_bytes(b"")
    found = {}

    def load(path, device=None, threads=None):
        found[path.name] = threads
        if path == files[-1]:
            raise ModelError("stop")

    monkeypatch.setattr("hfvit.evaluation.compare.load_classifier", load)
    with pytest.raises(ModelError, match=r"^stop$"):
        compare(files[0], files[1:], None, threads=2)
    assert found == {"model.onnx": 2, "model.pte": None}
    with pytest.raises(ModelError, match=r"^threads:"):
        compare(files[1], [], None, threads=2)


def test_validate_takes_one_other_artifact(tmp_path):
    folder = write_configs(tmp_path / "reference")
    write_graph(folder / "model.onnx")
    with pytest.raises(ModelError) as caught:
        hfvit.validate(folder, str(tmp_path / "other.onnx"))
    assert_names(caught.value, tmp_path / "other.onnx")


def test_validate_of_a_hub_id_reads_its_revision(out, colors, tmp_path, monkeypatch, capsys):
    """The main branch has other classes, which the data set lacks."""
    files = {name: (out / name).read_bytes() for name in ("config.json", "model.safetensors")}
    content = json.loads(files["config.json"])
    other = json.dumps({**content, "label_names": ["one", "two", "three"]}).encode()
    images = ["--dataset_name", colors, "--split", "test"]
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        repository = hub.create("user/vit", files=files)
        first = repository.commits[repository.resolve("main")]
        repository.refs["v1"] = repository.resolve("main")
        repository.commit({**first, "config.json": Blob(other)}, "other classes")
        assert command("validate", "user/vit", *images) == 2
        words = ["--revision", "v1", "--bf16", "--max_accuracy_drop", 100]
        assert command("validate", "user/vit", out / "onnx" / "model.onnx", *images, *words) == 0
    printed = capsys.readouterr().out
    logits = hfvit.load_classifier(out, device="cpu").logits(TEST_ROWS["img"])
    accuracy = (logits.argmax(axis=1) == np.array(TEST_ROWS["label"])).mean()
    assert_names(printed, "user/vit@v1", "user/vit@v1 bf16", f"{accuracy:.2%}")
    gate = ExportRecord.load(out / "onnx").files["model.onnx"].gate
    assert (gate.reference.artifact, gate.reference.accuracy) == ("user/vit@v1", accuracy)
    assert command("validate", out, "--revision", "v1") == 2
    assert option_of(capsys.readouterr().err) == "revision"


def test_validation_of_an_export_alone_is_no_agreement_with_pytorch(out):
    assert command("validate", out / "onnx" / "model_quantized.onnx") == 0
    rows = {row.name: row for row in export_rows(out / "onnx")}
    row = rows["model_quantized.onnx"]
    assert row.score == f"{ExportRecord.load(out / 'onnx').files[row.name].gate.accuracy:.2%}"
    assert (row.agreement, row.difference) == ("", "")
    command("validate", out, out / "onnx" / "model_quantized.onnx")
    rows = {row.name: row for row in export_rows(out / "onnx")}
    gate = ExportRecord.load(out / "onnx").files[row.name].gate
    assert rows[row.name].agreement == f"{gate.agreement:.2%}"
    assert rows[row.name].difference == f"{gate.max_logit_difference:.2g}"
