"""The public Python API, as a notebook uses it."""

import copy
import importlib
import inspect
import json
import logging
import pickle
import pkgutil
import pydoc
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.images import LABELS, colored_image
from PIL import ImageOps
from transformers import TrainerCallback, set_seed

import hfvit
from hfvit.errors import DataError, HubError, ModelError, RecipeError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """Train the micro recipe with `hfvit.train`; returns folder and record."""
    out = tmp_path_factory.mktemp("api") / "out"
    record = hfvit.train(
        {
            "architecture": "vit_tiny_patch16_224", "image_size": 16, "crop_pct": 1.0, "global_batch_size": 8,
            "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, "learning_rate": 3e-3,
            "disable_tqdm": True, "use_cpu": True,
        },
        dataset_name=colors,
        output_dir=out,
        num_train_epochs=4,
    )  # fmt: skip
    return out, record


def test_train_returns_the_saved_record(trained):
    out, record = trained
    assert isinstance(record, hfvit.RunRecord)
    assert record.to_json() == json.loads((out / "run.json").read_text())
    assert record.result.accuracy > 0.9
    assert record.training.epochs == 4


def test_train_of_a_shipped_recipe_takes_fields_as_python_values(tmp_path):
    record = hfvit.train(
        "quickstart", output_dir=tmp_path, max_steps=2, learning_rate=5e-4, crop_padding=0, crop_scale=(0.5, 1.0),
        eval_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert record.training.steps == 2
    assert record.recipe["learning_rate"] == 5e-4
    assert record.recipe["crop_scale"] == [0.5, 1.0]


def test_train_of_an_unknown_field_raises_recipe_error():
    with pytest.raises(RecipeError, match=r"^learning_rat: .*'learning_rate'"):
        hfvit.train("quickstart", learning_rat=1.0)


def test_train_uses_custom_transform_metric_loss_and_callback(trained, tmp_path, colors):
    out, _ = trained
    steps = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    record = hfvit.train(
        out / "recipe.yaml", output_dir=tmp_path / "own", max_steps=3, logging_steps=1,
        eval_strategy="steps", eval_steps=3,
        train_transforms=ImageOps.invert, callbacks=[Record()],
        compute_metrics=lambda prediction: {"images": len(prediction.label_ids)},
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: 0.0 * outputs.logits.sum() + 7.0,
    )  # fmt: skip
    assert steps == [1, 2, 3]
    assert record.training.steps == 3
    assert "train_transforms" in record.data.splits["train"].input
    assert "train_transforms" not in record.data.splits["validation"].input
    evaluation = next(entry for entry in record.history if "eval_accuracy" in entry)
    assert evaluation["eval_images"] == record.metrics["validation"].images
    assert [entry["loss"] for entry in record.history if "loss" in entry] == pytest.approx([7.0] * 3)


def test_classifier_accepts_one_image_or_many(trained, tmp_path):
    out, _ = trained
    image = colored_image(1, np.random.default_rng(0))
    file = tmp_path / "image.png"
    image.save(file)
    classifier = hfvit.load_classifier(out, device="cpu")
    expected = classifier.predict([image])[0]
    assert next(iter(expected)) == LABELS[1]
    for one in (image, np.asarray(image), str(file), file):
        assert classifier(one) == pytest.approx(expected, abs=1e-6)
        assert len(classifier.predict(one)) == 1
        assert hfvit.predict(classifier, one) == pytest.approx(expected, abs=1e-6)
    many = [image, np.asarray(image), file]
    for images in (many, tuple(many), iter(many), np.stack([np.asarray(image)] * 3)):
        found = classifier(images)
        assert len(found) == 3
        for prediction in found:
            assert prediction == pytest.approx(expected, abs=1e-6)
    assert list(hfvit.predict(out, image, top_k=1, device="cpu")) == [LABELS[1]]
    assert classifier([]) == []


def test_export_quantize_validate_and_report_a_run(trained, tmp_path):
    out, record = trained
    model = hfvit.HFViTForImageClassification.from_pretrained(out)
    (out / "onnx").mkdir()
    hfvit.export_onnx(model, out / "onnx" / "model.onnx")
    for name in ("config.json", "preprocessor_config.json"):
        if (out / name).exists():
            (out / "onnx" / name).write_text((out / name).read_text())
    comparison = hfvit.validate(out, device="cpu", max_samples=8, show_progress=False)
    assert comparison.passed
    assert out / "run.json" in comparison.saved
    assert hfvit.RunRecord.load(out).gate is not None
    report = hfvit.write_report(out, html=True)
    assert report.page.stat().st_size > 10_000
    assert report.record.finished == record.finished


def test_stock_trainer_trains_an_hfvit_model(tmp_path):
    from datasets import ClassLabel
    from helpers.images import colored_split
    from helpers.models import build_model
    from helpers.recipes import ARCHITECTURE, MICRO
    from transformers import AutoImageProcessor, Trainer, TrainingArguments

    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    model.save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    data = colored_split(40, 1)
    assert isinstance(data.features["label"], ClassLabel)

    def collate(rows):
        pixels = processor([row["img"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=30, learning_rate=3e-3, use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=collate, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2
    assert collate([data[0]])["pixel_values"].shape == (1, 3, 16, 16)


OPTIONAL = (
    "fastapi", "gradio", "mlflow", "multipart", "nncf", "openvino", "optuna", "peft", "pillow_heif",
    "prometheus_client",
    "ray", "tensorboard", "tensorrt", "tensorrt_rtx", "trackio", "uvicorn", "wandb",
)  # fmt: skip


def test_modules_import_without_optional_packages_and_keep_public_functions():
    code = (
        "import gc, importlib, pkgutil, sys\n"
        "gc.disable()\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))  # an import of them fails\n"
        "import hfvit\n"
        "for module in pkgutil.walk_packages(hfvit.__path__, 'hfvit.'):\n"
        "    if module.name != 'hfvit.train': importlib.import_module(module.name)\n"
        "assert all(callable(getattr(hfvit, name)) for name in ('train', 'validate', 'predict', 'push'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_every_public_name_resolves_and_is_declared_for_editors():
    declared = set()
    source = (ROOT / "hfvit" / "__init__.py").read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("# Public name")]
    for line in block.splitlines()[1:]:
        if line.strip():
            declared.add(line.rsplit(" as ", 1)[1])
    assert declared == set(dir(hfvit))
    for name in dir(hfvit):
        assert getattr(hfvit, name) is not None
    assert (ROOT / "hfvit" / "py.typed").exists()


def test_help_fits_on_one_screen():
    text = pydoc.plain(pydoc.render_doc(hfvit))
    assert len(text.splitlines()) < 90
    assert "load_classifier" in text


def test_public_functions_document_their_arguments():
    for name in dir(hfvit):
        value = getattr(hfvit, name)
        parameters = inspect.signature(value).parameters if inspect.isfunction(value) else {}
        if len(parameters) >= 3:
            assert "Args:" in inspect.getdoc(value), name


def test_modules_import_without_side_effects_on_the_public_names():
    importlib.import_module("hfvit.pipeline")
    assert inspect.isfunction(hfvit.train)
    assert {module.name for module in pkgutil.iter_modules(hfvit.__path__)} >= {"pipeline", "train"}


def test_training_leaves_the_state_of_the_process(trained, tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt

    out, _ = trained
    backend = matplotlib.get_backend()
    try:
        plt.switch_backend("svg")  # as of a notebook
        plt.rcParams["axes.grid"] = True
        plt.figure()
        settings = dict(matplotlib.rcParams)
        set_seed(1)
        expected = random.random(), np.random.random(), torch.rand(1).item()
        set_seed(1)
        level = logging.getLogger("hfvit").level
        hfvit.train(out / "recipe.yaml", output_dir=tmp_path / "again", max_steps=2, callbacks=None)
        hfvit.find_lr(out / "recipe.yaml", output_dir=tmp_path / "lr", steps=20)
        assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
        assert logging.getLogger("hfvit").level == level
        assert matplotlib.get_backend() == "svg"
        assert dict(matplotlib.rcParams) == settings
        assert len(plt.get_fignums()) == 1
    finally:
        plt.close("all")
        plt.rcParams["axes.grid"] = False
        plt.switch_backend(backend)


def test_plots_do_not_depend_on_the_settings_of_the_caller(trained):
    import matplotlib

    out, _ = trained
    hfvit.write_report(out)
    expected = (out / "plots" / "confusion_matrix.png").read_bytes()
    with matplotlib.rc_context({"axes.grid": True, "font.size": 20, "figure.dpi": 50, "lines.linewidth": 5}):
        hfvit.write_report(out)
    assert (out / "plots" / "confusion_matrix.png").read_bytes() == expected


WRONG_LIMITS = (
    {"max_accuracy_drop": "x"}, {"max_accuracy_drop": -1}, {"min_agreement": 99}, {"max_samples": 0},
    {"max_samples": -1}, {"max_samples": 2.5}, {"batch_size": "4"}, {"seed": "x"}, {"patch_size": "8"},
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_LIMITS, ids=str)
def test_wrong_options_of_validate_leave_the_record(trained, wrong):
    out, _ = trained
    before = (out / "run.json").read_bytes()
    with pytest.raises(ModelError, match=rf"^{next(iter(wrong))}:"):
        hfvit.validate(out, device="cpu", show_progress=False, **wrong)
    assert (out / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"callbacks": [3]}, TypeError), ({"callbacks": print}, TypeError), ({"train_transforms": 3}, TypeError),
        ({"compute_metrics": "x"}, TypeError), ({"dataset_name": 1j}, RecipeError),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_of_train_are_errors_before_the_data_is_read(trained, tmp_path, wrong, kind):
    out, _ = trained
    with pytest.raises(kind, match=rf"^{next(iter(wrong))}:"):
        hfvit.train(out / "recipe.yaml", output_dir=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_data_sets_in_memory_are_errors_that_name_the_trainer(colors):
    from helpers.images import colored_split

    data = colored_split(4, 0)
    for function, option in ((hfvit.train, "recipe"), (hfvit.find_lr, "recipe"), (hfvit.inspect, "dataset")):
        with pytest.raises(TypeError, match=rf"^{option}: .*save_to_disk"):
            function(data)
    with pytest.raises(RecipeError, match=r"^dataset_name: .*HFViTTrainer"):
        hfvit.train("quickstart", dataset_name=data)


def test_fields_take_arrays_as_the_recipe_does(trained, tmp_path):
    out, _ = trained
    record = hfvit.train(
        out / "recipe.yaml", output_dir=tmp_path, max_steps=np.int64(1), crop_scale=np.array([0.5, 1.0]),
        learning_rate=torch.tensor(1.23456e-3), plots=False,
    )  # fmt: skip
    assert record.recipe["crop_scale"] == [0.5, 1.0]
    assert record.recipe["learning_rate"] == pytest.approx(1.23456e-3, rel=1e-6)


def test_inspect_refuses_unknown_keys_and_folders_before_it_reads_images(colors, tmp_path):
    with pytest.raises(RecipeError, match=r"^label_colum: .*'label_column'"):
        hfvit.inspect(colors, label_colum="x")
    with pytest.raises(RecipeError, match=r"^validation_fraction:"):
        hfvit.inspect(colors, validation_fraction="0.1")
    with pytest.raises(DataError, match=r"^html:"):
        hfvit.inspect(colors, html=tmp_path)
    with pytest.raises(ModelError, match=r"^seed:"):
        hfvit.inspect(colors, seed="a")


def test_empty_names_are_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^RECIPE: .*''"):
        hfvit.train("", output_dir="out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*''"):
        hfvit.HFViTForImageClassification.from_pretrained("")
    with pytest.raises(HubError, match=r"^folder: .*''"):
        hfvit.push("", "user/name")


def test_results_have_short_representations(trained, colors, tmp_path):
    out, record = trained
    inspection = hfvit.inspect(colors)
    comparison = hfvit.validate(out, device="cpu", max_samples=8, show_progress=False)
    curve = hfvit.find_lr(out / "recipe.yaml", output_dir=tmp_path, steps=20)
    report = hfvit.write_report(out)
    results = (inspection, comparison, curve, report, record, record.data, record.result, record.training)
    for result in results:
        assert "\n" not in repr(result)
        assert len(repr(result)) < 700, type(result)
        assert type(result).__name__ in repr(result)
        assert copy.copy(result) == result == pickle.loads(pickle.dumps(result))
    assert str(comparison) == comparison.table()
    assert str(curve) == curve.describe()
    assert "Starting recipe:" in str(inspection)


def test_errors_are_an_attribute_of_the_package():
    code = "import hfvit; assert issubclass(hfvit.errors.RecipeError, hfvit.errors.HFViTError)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
