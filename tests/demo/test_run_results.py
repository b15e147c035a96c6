"""What a demo shows of a run."""

from pathlib import Path

import numpy as np
import pytest
from helpers.images import LABELS
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from helpers.records import make_record

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.run_record import write_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages, OutOfDistribution
from hfvit.cli.demo import one_of_each_folder
from hfvit.demo.run_results import RunResults, read_results, write_class_examples


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run"
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    return folder


def test_results_are_those_of_the_run(checkpoint):
    record = make_record(3)
    record.finished = "2026-01-02T03:04:05+00:00"
    record.out_of_distribution = OutOfDistribution(
        score="energy", threshold=-2.0, kept=0.95, fitted_on="validation", images=100
    )
    record.save(checkpoint)
    results = read_results(find_artifact(checkpoint))
    assert results.score == record.result.score
    assert "2,000 test images, 2026-01-02" in results.score_note
    assert results.is_unlike(np.array([[0.0, 0.0, 0.0]]), multi_label=False)
    assert not results.is_unlike(np.array([[9.0, 0.0, 0.0]]), multi_label=False)


def test_results_without_a_readable_run_are_unknown(checkpoint):
    assert read_results(find_artifact(checkpoint)) == RunResults()
    (checkpoint / "run.json").write_text("{")
    results = read_results(find_artifact(checkpoint))
    assert results == RunResults()
    assert results.score_text == results.score_note == ""
    assert not results.is_unlike(np.zeros((1, 3)), multi_label=False)


def test_class_examples_are_in_folders_of_their_class(checkpoint, tmp_path):
    record = make_record(3)
    labels = [*record.data.labels[:2], "../outside", "a" * 300, "null\0"]
    record.data.labels = labels
    shown = [ExampleImage(row=row, true=name, predicted=name, confidence=1.0) for row, name in enumerate(labels)]
    record.examples = ExampleImages(split="test", mistakes=[], explanations=shown)
    record.save(checkpoint)
    write_examples(checkpoint, {"explanations": np.zeros((5, 8, 8, 3), np.uint8)})
    (tmp_path / "shown").mkdir()
    written = write_class_examples(find_artifact(checkpoint), tmp_path / "shown")
    assert [Path(name).parent.name for name in written] == labels[:2]
    assert all(Path(name).is_relative_to(tmp_path / "shown") for name in written)


def test_first_images_of_all_folders_come_first():
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert one_of_each_folder(names) == ["cat/1.png", "dog/1.png", "cat/2.png", "dog/2.png"]
