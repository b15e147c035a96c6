"""`hfvit report` on the folder of a real run, without its model and data."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy
import pytest
import yaml
from helpers.browser import Visit, chromium
from helpers.commands import run_command
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names
from helpers.recipes import write_micro_recipe
from helpers.records import VERSION_0_1, exported_file, parity
from huggingface_hub import ModelCard

import hfvit
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main as hfvit_command
from hfvit.errors import run
from hfvit.pipeline import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """A short run, which makes mistakes."""
    folder = tmp_path_factory.mktemp("report")
    recipe = write_micro_recipe(folder, colors, "max_steps: 3")
    assert run(lambda: main([str(recipe), "--plots", "true"])) == 0
    return folder / "out"


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the run without the model."""
    copy = shutil.copytree(trained, tmp_path / "out")
    (copy / "model.safetensors").unlink()
    return copy


def report(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["report", *(str(word) for word in words)])
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


class Page(HTMLParser):
    """Parser that collects URLs and alt texts and checks that tags are closed in order."""

    EMPTY = ("meta", "img", "source", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.alts, self.open, self.texts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[key] for key in ("src", "srcset", "href", "data", "poster") if values.get(key)]
        self.alts += [values["alt"]] if tag == "img" else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_run_without_plots_gets_them_from_the_report(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(lambda: main([str(recipe), "--max_steps", "1", "--plots", "true"])) == 0
    assert run(lambda: main([str(recipe), "--max_steps", "1", "--overwrite_output_dir"])) == 0
    assert not list((out / "plots").glob("*.png"))
    assert "plots/" not in (out / "README.md").read_text()
    assert report(capsys, out)[0] == 0
    assert (out / "plots" / "reliability.png").exists()
    assert "plots/reliability.png" in (out / "README.md").read_text()


def test_report_writes_plots_card_and_page_from_run_json(out, capsys):
    plots = {path.name: path.read_bytes() for path in (out / "plots").iterdir()}
    assert "mistakes.png" in plots
    assert "explanations_dark.png" in plots
    card = (out / "README.md").read_text()
    for path in (out / "plots").iterdir():
        if not path.name.startswith("training_images"):  # those are of the training's first moments
            path.unlink()
    (out / "README.md").unlink()
    code, printed, err = report(capsys, out)
    assert (code, err) == (0, "")
    assert {path.name: path.read_bytes() for path in (out / "plots").iterdir()} == plots
    assert (out / "README.md").read_text() == card
    assert_names(printed, f"{json.loads((out / 'run.json').read_text())['metrics']['test']['accuracy']:.2%}")
    assert not (out / "report.html").exists()


def test_page_is_self_contained(out, capsys):
    (out / "onnx").mkdir()
    described = exported_file(bytes=86_283_204, parity=parity(2.9e-06))
    ExportRecord(files={"model.onnx": described}).save(out / "onnx")
    (out / "onnx" / "model.onnx").write_bytes(b"")
    facts = json.loads((out / "run.json").read_text())
    facts["metrics"]["test"]["per_class"][0]["label"] = "<script>alert(1)</script>"
    (out / "run.json").write_text(json.dumps(facts))
    code, printed, _ = report(capsys, out, "--html")
    assert code == 0
    assert_names(printed, out / "report.html")
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.open
    allowed = ("data:image/png;base64,", "data:image/webp;base64,", "#", "mistakes.csv")
    assert all(address.startswith(allowed) for address in page.addresses)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert text.count("<svg ") == 4
    assert all(page.alts)
    assert len(text) < 2_000_000
    assert "@media print" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert str(out.parent) not in text
    words = " ".join(page.texts)
    for figure in (
        f"{facts['metrics']['test']['accuracy']:.2%}", f"{facts['metrics']['validation']['loss']:.4f}", "86.3 MB",
        "2.9e-06", "onnx/model.onnx", facts["versions"]["torch"], facts["examples"]["mistakes"][0]["true"],
    ):  # fmt: skip
        assert figure in words
    assert "| `onnx/model.onnx` | 86.3 MB | 2.9e-06 |" in (out / "README.md").read_text()


def test_open_starts_a_browser_with_the_page(out, capsys, monkeypatch):
    # What webbrowser starts is the program that BROWSER names.
    monkeypatch.setattr("webbrowser.open", lambda address: address == (out / "report.html").resolve().as_uri())
    assert report(capsys, out, "--open")[2] == ""
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    code, printed, err = report(capsys, out, "--open")
    assert code == 0
    assert err.startswith("hfvit: ")
    assert_names(printed, out / "report.html")


def test_exports_older_than_the_run_are_left_out(out, capsys):
    (out / "onnx").mkdir()
    ExportRecord(files={"model.onnx": exported_file()}).save(out / "onnx")
    facts = json.loads((out / "run.json").read_text()) | {"finished": "2999-01-01T00:00:00+00:00"}
    (out / "run.json").write_text(json.dumps(facts))
    code, _, err = report(capsys, out)
    assert code == 0
    assert_names(err, out / "onnx")
    assert "model.onnx" not in (out / "README.md").read_text()


def test_report_of_an_old_record_has_no_temperature_and_images(out, capsys):
    facts = json.loads((out / "run.json").read_text())
    del facts["temperature"], facts["examples"]
    (out / "run.json").write_text(json.dumps(facts))
    code, printed, _ = report(capsys, out, "--html")
    assert code == 0
    assert "calibrated" not in printed
    assert not list((out / "plots").glob("mistakes*"))
    assert (out / "report.html").exists()
    assert "temperature" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "data"),
    [
        (None, ["{tmp}", "run.json"]),
        ("{", ["{tmp}/run.json", "line 1 column 2"]),
        ("[]", ["{tmp}/run.json", "JSON"]),
        ('{"hfvit_version": "0.0.1", "model": {}}', ["{tmp}/run.json", "model.architecture", "hfvit 0.0.1"]),
        ("{}", ["{tmp}/run.json", "model"]),
    ],
)
def test_report_without_a_valid_run_names_the_file_and_the_problem(tmp_path, capsys, content, data):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    code, out, err = report(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("hfvit: error: ")
    assert_names(err, *(item.format(tmp=tmp_path) for item in data))
    assert_names(report(capsys, tmp_path / "absent")[2], tmp_path / "absent", "output_dir")


def test_calibrated_predictions_use_the_temperature_of_the_run(trained, tmp_path):
    import numpy as np
    from scipy.special import softmax

    out = shutil.copytree(trained, tmp_path / "out")
    facts = json.loads((out / "run.json").read_text())
    facts["temperature"] = facts["temperature"] | {"value": 2.5, "reason": None}
    (out / "run.json").write_text(json.dumps(facts))
    image = colored_image(1, np.random.default_rng(0))
    plain, calibrated = hfvit.load_classifier(out), hfvit.load_classifier(out, calibrated=True)
    logits = plain.logits([image])
    assert (calibrated.logits([image]) == logits).all()
    for classifier, temperature in ((plain, 1.0), (calibrated, 2.5)):
        expected = dict(zip(plain.labels, softmax(logits[0] / temperature), strict=True))
        assert classifier.predict([image])[0] == pytest.approx(expected, abs=1e-6)


def test_report_of_a_missing_folder_does_not_import_torch():
    result = run_command("hfvit", "report", "no/such/folder", new_process=True)
    assert result.returncode == 2
    assert_names(result.stderr, "no/such/folder")
    assert "Traceback" not in result.stderr


def test_card_has_plots_of_both_themes(trained):
    text = (trained / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    for name in ("confusion_matrix", "per_class_recall", "reliability", "learning_curves"):
        assert f'srcset="plots/{name}_dark.png"' in text
        assert f'src="plots/{name}.png"' in text
    assert yaml.safe_load((trained / "recipe.yaml").read_text()).get("dataset_revision") is None


def test_page_links_to_the_files_of_a_folder(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    place = tmp_path / "my data" / "cat"
    place.mkdir(parents=True)
    colored_image(0, numpy.random.default_rng(0)).save(place / "a #1.png")
    record = RunRecord.load(out)
    record.data.dataset_name = str(tmp_path / "my data")
    record.data.is_local = True
    record.examples.mistakes[0].file = "cat/a #1.png"
    record.examples.mistakes[1].file = "cat/gone.png"
    record.save(out)
    page = Page(hfvit.write_report(out, html=True).page.read_text())
    assert "../my%20data/cat/a%20%231.png" in page.addresses
    assert not any("gone" in address for address in page.addresses)
    assert "cat/gone.png" in page.texts


def test_record_of_version_0_1_keeps_its_attention_maps():
    examples = RunRecord.load(VERSION_0_1).examples
    assert examples.explanation_method == "Attention rollout"
    assert len(examples.explanations) > 0


@pytest.mark.slow
def test_page_without_a_console_error_sorts_and_filters(trained):
    page = hfvit.write_report(trained, html=True).page
    with chromium() as browser:
        visit = Visit(browser, page.as_uri())
        visit.page.click("table.sortable thead button >> nth=0")
        rows = "rows => rows.filter(row => !row.hidden).map(row => row.cells[0].innerText)"
        assert visit.page.eval_on_selector_all("table.sortable tbody tr", rows) == sorted(LABELS)
        visit.page.fill("#filter", "RE")
        assert visit.page.eval_on_selector_all("table.sortable tbody tr", rows) == ["green", "red"]
        visit.close()
    assert (visit.elsewhere, visit.errors) == ([], [])


def test_page_isolates_class_names_and_scrolls_by_keyboard(trained):
    text = hfvit.write_report(trained, html=True).page.read_text()
    rows = re.findall(r'<th scope="row">(.*?)</th>', text)
    assert {f"<bdi>{name}</bdi>" for name in LABELS} <= set(rows)
    scrolled = re.findall(r'<pre\b[^>]*>|<div class="scroll"[^>]*>', text)
    assert len(scrolled) > 4
    assert all('tabindex="0"' in tag for tag in scrolled)


@pytest.mark.slow
def test_page_with_long_names_fits_a_phone_and_shows_the_numbers(out):
    facts = json.loads((out / "run.json").read_text())
    facts["metrics"]["test"]["per_class"][0]["label"] = "pneumonoultramicroscopicsilicovolcanoconiosis" * 4
    facts["recipe"]["a_key_that_is_longer_than_a_phone_is_wide"] = True
    (out / "run.json").write_text(json.dumps(facts))
    page = hfvit.write_report(out, html=True).page
    shown = "cells => cells.map(cell => cell.getBoundingClientRect().right <= innerWidth)"
    with chromium() as browser:
        phone = Visit(browser, page.as_uri(), viewport={"width": 360, "height": 800})
        phone.page.eval_on_selector_all("details", "parts => parts.forEach(part => (part.open = true))")
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
        phone.close()
        desk = Visit(browser, page.as_uri(), viewport={"width": 1280, "height": 800})
        assert all(desk.page.eval_on_selector_all("table.sortable td", shown))
        desk.close()
