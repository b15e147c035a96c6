"""The text and the page of an inspection."""

import os
from html.parser import HTMLParser

import pytest
import yaml
from helpers.layouts import write_images

import hfvit
from hfvit.data.inspect import open_data
from hfvit.data.inspection import LabelCheck
from hfvit.errors import DataError, is_unprintable
from hfvit.metrics.label_errors import WEAK_MODEL
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.loader import load_recipe
from hfvit.report.inspection import page

HOSTILE = ["<script>alert(1)<", "\x1b[2Jcat", "\u202egnp", "a&amp;b\"'>", "b\n99% fake"]


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def hostile(tmp_path):
    return write_images(tmp_path / "set", {f"{split}/{name.replace('/', '')}": 12 for name in HOSTILE for split in
                                           ("train", "val")})  # fmt: skip


def test_page_with_hostile_names_escapes_them_and_loads_nothing(hostile, tmp_path):
    page = tmp_path / "page.html"
    hfvit.inspect(hostile, html=page)
    parsed = Tags(page.read_text(encoding="utf-8"))
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(sources) == 8 * len(HOSTILE)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(not key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert any("<script>alert(1)<" in text for text in parsed.text)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in parsed.tags if tag == "th")
    scrolled = [of for tag, of in parsed.tags if tag == "pre" or of.get("class") == "scroll"]
    assert [of.get("tabindex") for of in scrolled] == ["0"] * 3
    assert any(text.count("\n") > 3 and "model_name_or_path: " in text for text in parsed.text)


def test_description_with_hostile_names_acts_on_no_terminal(hostile):
    text = str(hfvit.inspect(hostile))
    assert not any(is_unprintable(character) for character in text.replace("\n", ""))


def test_inspect_writes_a_recipe_that_loads(tmp_path):
    root = write_images(tmp_path / "set", {"cat": 60, "dog": 60})
    found = hfvit.inspect(root, recipe=tmp_path / "mine.yaml", from_scratch=True)
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == found.recipe
    recipe = load_recipe([str(tmp_path / "mine.yaml")])
    assert recipe.data.dataset_name == str(root)
    assert recipe.model.architecture
    assert found.command == f"hfvit train {tmp_path / 'mine.yaml'}"
    # The splits are those that the recipe makes.
    assert found.splits["validation"].images == 30
    assert "test" not in found.splits


@pytest.mark.parametrize(("agreement", "is_noted"), [(0.4, True), (0.9, False)])
def test_suspicious_labels_of_a_weak_model_are_noted(tmp_path, agreement, is_noted):
    root = write_images(tmp_path / "set", {"cat": 20, "dog": 20})
    found = hfvit.inspect(root)
    found.label_check = LabelCheck(source="by run", agreement=agreement, suspects=[])
    shown = page(found, open_data(DataArguments(dataset_name=str(root)), 42))
    assert (f"{WEAK_MODEL:.0%}" in str(found)) == is_noted
    assert (f"{100 * WEAK_MODEL:.0f} %" in shown) == is_noted


def test_inspect_replaces_its_own_recipe_but_no_edited_one(tmp_path):
    root = write_images(tmp_path / "set", {"cat": 20, "dog": 20})
    file = tmp_path / "mine.yaml"
    for _ in range(2):
        hfvit.inspect(root, recipe=file, from_scratch=True)
    edited = file.read_text() + "seed: 7\n"
    file.write_text(edited)
    with pytest.raises(DataError, match=r"^--recipe:"):
        hfvit.inspect(root, recipe=file, from_scratch=True)
    assert file.read_text() == edited


def test_inspect_passes_options_on_to_the_recipe_and_the_command(tmp_path):
    write_images(tmp_path, {"a": 20, "b": 20})
    rows = [f"{name}/{number}.png,{name}" for name in "ab" for number in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["where,species", *rows]))
    file = tmp_path / "mine.yaml"
    options = {"image_column": "where", "label_column": "species", "seed": 7, "test_split": None}
    hfvit.inspect(tmp_path / "list.csv", recipe=file, **options)
    assert {key: yaml.safe_load(file.read_text())[key] for key in options} == options
    assert load_recipe([str(file)]).data.label_column == "species"
    found = hfvit.inspect(tmp_path / "list.csv", **options)
    assert found.command.endswith("--image_column where --label_column species --test_split none --seed 7")
    assert found.splits["train"].classes.keys() == {"a", "b"}


def test_inspect_of_unusable_data_raises(tmp_path):
    with pytest.raises(DataError, match=r"^dataset_name:"):
        hfvit.inspect(write_images(tmp_path, {"": 3}))
    assert os.listdir(tmp_path)
