"""What a notebook shows of predictions and of a run."""

import base64
import io
import re

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.records import make_record
from PIL import Image

from hfvit.errors import ModelError
from hfvit.inference.classifier import load_classifier
from hfvit.inference.predictions import MAX_SHOWN, SIDE


def images_of(html: str) -> list[Image.Image]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_classifier_returns_a_list_that_shows_its_images(stock):
    rng = np.random.default_rng(0)
    images = [colored_image(row % 3, rng, size=200) for row in range(MAX_SHOWN + 2)]
    classifier = load_classifier(stock, device="cpu")
    predictions = classifier(image for image in images)
    assert isinstance(predictions, list)
    assert predictions == classifier.predict(images)
    html = predictions._repr_html_()
    shown = images_of(html)
    assert [image.size for image in shown] == [(SIDE, SIDE)] * MAX_SHOWN
    expected = images[0].copy()
    expected.thumbnail((SIDE, SIDE))
    assert np.array_equal(np.asarray(shown[0]), np.asarray(expected))
    assert "2 more" in html
    assert set(classifier(images[0])) == set(LABELS)


def test_names_of_classes_are_escaped(stock):
    classifier = load_classifier(stock, device="cpu")
    classifier.labels = ["<script>", "b", "c"]
    html = classifier([colored_image(0, np.random.default_rng(0))])._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_record_shows_scores_and_figures(tmp_path):
    record = make_record()
    assert not images_of(record._repr_html_())
    record.save(tmp_path)
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "plots" / "confusion_matrix.png")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "plots" / "confusion_matrix_dark.png")
    html = record._repr_html_()
    assert f"{record.metrics['test'].accuracy:.2%}" in html
    assert [image.size for image in images_of(html)] == [(40, 30)]
    assert record.plot("confusion").getpixel((0, 0)) == (255, 0, 0)
    assert record.plot("confusion", dark=True).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ModelError, match=r"^plot:"):
        record.plot("no such plot")
