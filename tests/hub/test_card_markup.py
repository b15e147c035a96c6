"""Hostile names in the card, the report and the static page: the structure is that of ordinary names."""

import copy
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.hostile_text import HOSTILE, MARKUP
from helpers.html import Elements
from helpers.records import make_record
from jinja2 import StrictUndefined
from markdown_it import MarkdownIt

import hfvit.demo
from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.extension_record import ExtensionRecord
from hfvit.artifacts.gate import EvaluationData
from hfvit.artifacts.run_sections import Soup, SoupMember
from hfvit.artifacts.soup_record import SoupRecord
from hfvit.errors import printable
from hfvit.hub.derived_card import render_derived_card
from hfvit.hub.model_card import END, START, render_card
from hfvit.report.page import write_page
from hfvit.utils.markup import html_environment, markdown_environment

NAMES = [*HOSTILE, *MARKUP]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def named(name: str):
    """A record where `name` stands for all that a data set, a recipe or another run.json can choose."""
    record = make_record(3, dataset_name=f"./{name}")
    record.data.is_local = True
    record.model.is_local = True
    record.model.architecture = name
    record.command = f"hfvit train {shlex.quote(name)}"
    record.hardware.processor = name
    record.versions |= {"python": name}
    record.recipe |= {"teacher": name, "finetuning": "lora", "lora_rank": name}
    record.training.precision = name
    record.data.dataset_commit = name
    record.data.labels = [name] * 3
    record.data.splits = {role: copy.copy(split) for role, split in record.data.splits.items()}
    record.data.splits["test"].source = name
    record.metrics = copy.deepcopy(record.metrics)
    for metrics in record.metrics.values():
        for row in metrics.per_class:
            row.label = name
    return record


def exports(name: str) -> dict[str, list[ExportRow]]:
    return {"onnx": [ExportRow(name, f"onnx/{name}", "1 MB", name, "", "")]}


def outline(text: str) -> list[tuple]:
    """Kinds of all tokens, and the raw HTML, which a name must not add to."""
    found = []
    for token in PARSER.parse(text):
        kinds = [
            child.type for child in token.children or () if child.type not in ("text", "text_special", "softbreak")
        ]
        found.append((token.type, token.tag, kinds, token.content if token.type == "html_block" else ""))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_card_has_the_structure_of_ordinary_names(name):
    card = render_card(named(name), "m", exports=exports(name))
    expected = render_card(named("x"), "m", exports=exports("x"))
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    expected_front, expected_body = expected.removeprefix("---\n").split("\n---\n", 1)
    assert outline(body) == outline(expected_body)
    assert body.count(START) == body.count(END) == 1
    assert render_card(named(name), "m", exports=exports(name), earlier=[card]) == card
    card.encode()
    metadata, plain = yaml.safe_load(front), yaml.safe_load(expected_front)
    assert metadata.keys() == plain.keys()
    [result], [ordinary] = metadata["model-index"][0]["results"], plain["model-index"][0]["results"]
    assert result["metrics"] == ordinary["metrics"]
    assert result["dataset"]["split"] == printable(name)


def derived_cards(name: str) -> list[str]:
    """Cards of a soup and of an extended checkpoint where `name` stands for all that others can choose."""
    data = EvaluationData(dataset=name, dataset_config_name=name, split=name, images=9, fingerprint=name)
    soup = Soup(kind="greedy", metric=name, members=[SoupMember(name=name, score=0.5, is_used=True)], score=0.5)
    shares = {"old_accuracy_before": 0.9, "old_accuracy": 0.9, "new_accuracy": 0.9}
    records = (
        SoupRecord(hfvit_version=name, soup=soup, data=data),
        ExtensionRecord(hfvit_version=name, new_classes=[name], images=[3], old_images=7, **shares),
    )
    config = {"architecture": name, "pretrained_cfg": {"license": f"{name}!"}}
    return [render_derived_card(record, config, [name] * 2, "u/m", exports(name)["onnx"]) for record in records]


@pytest.mark.parametrize("name", NAMES)
def test_derived_card_has_the_structure_of_ordinary_names(name):
    for card, expected in zip(derived_cards(name), derived_cards("x y"), strict=True):
        front, body = card.removeprefix("---\n").split("\n---\n", 1)
        plain_front, plain_body = expected.removeprefix("---\n").split("\n---\n", 1)
        assert outline(body) == outline(plain_body)
        assert body.count(START) == body.count(END) == 1
        assert yaml.safe_load(front) == yaml.safe_load(plain_front)


@pytest.mark.parametrize("name", NAMES)
def test_card_shows_the_names_themselves(name):
    card = render_card(named(name), "m")
    cells = [
        "".join(child.content for child in token.children)
        for token in PARSER.parse(card)
        if token.type == "inline" and token.children
    ]
    assert cells.count(printable(name).strip()) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_report_page_has_the_elements_of_ordinary_names(name, tmp_path):
    pages = []
    ordinary = "x" * min(3, len(printable(name)))  # a figure rotates names of three characters and more
    for text in (name, ordinary):
        page = Elements(write_page(named(text), tmp_path, exports(text)).read_text(encoding="utf-8"))
        pages.append(page)
    assert pages[0].found == pages[1].found
    assert printable(name) in pages[0].text


@pytest.mark.parametrize("name", NAMES)
def test_static_page_has_the_elements_of_ordinary_names(name):
    folder = Path(hfvit.demo.__file__).parent / "web"
    html = html_environment(folder, undefined=StrictUndefined).get_template("index.html")
    space = markdown_environment(folder, undefined=StrictUndefined).get_template("space.md")

    def values(text):
        facts = [{"name": text, "value": text, "note": text}]
        page = {"title": text, "labels": [text], "multi_label": False, "metadata": facts}
        return {**page, "examples": [], "hosts": "", "input": "1 x 1", "is_calibrated": True}

    assert Elements(html.render(values(name))).found == Elements(html.render(values("x"))).found
    front, body = space.render(values(name)).removeprefix("---\n").split("\n---\n", 1)
    expected = space.render(values("x")).removeprefix("---\n").split("\n---\n", 1)[1]
    assert outline(body) == outline(expected)
    assert yaml.safe_load(front)["title"] == printable(name)


@pytest.mark.parametrize("classes", [1, 3])
def test_lines_for_transformers_js_compute_the_scores_of_the_model(classes):
    """Its pipeline applies a softmax, which is 1 for a single class."""
    record = make_record(3)
    record.data.labels = record.data.labels[:classes]
    card = render_card(record, "m", exports=exports("model.onnx"))
    lines = next(token.content for token in PARSER.parse(card) if token.info == "js")
    assert ("sigmoid()" in lines) == (classes == 1)
    assert ("new ImageClassificationPipeline" in lines) == (classes > 1)
