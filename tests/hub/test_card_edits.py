"""Text and metadata that users add to a model card are kept when it is rendered again."""

import hashlib
import json

import pytest
import yaml
from helpers.records import VERSION_0_1, make_record
from huggingface_hub import ModelCard

from hfvit.hub.model_card import END, START, keep_user_parts, remove_generated_text, render_card, user_parts

FIRST = "---\nlibrary_name: timm\ntags:\n- a\n---\n\n# x\n\n## Results\n\n90 %\n\n## Limits\n\nMany.\n"
NEXT = "---\nlibrary_name: timm\ntags:\n- b\n---\n\n# x\n\n## Results\n\n91 %\n\n## Limits\n\nFew.\n"
STORY = "## Story\n\nLong.\n\n```bash\n## no heading\n```"


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def generated(card: str) -> str:
    return card[card.index(START) : card.index(END)]


def around(card: str) -> tuple[str, str]:
    parts = user_parts(card)
    return parts.before.strip(), parts.after.strip()


def test_unedited_card_is_replaced():
    first = keep_user_parts(FIRST, [])
    assert around(first) == ("", "")
    assert keep_user_parts(NEXT, [first]) == keep_user_parts(NEXT, [])
    assert keep_user_parts(NEXT, ["", first]) == keep_user_parts(NEXT, [])


def test_user_text_and_metadata_are_kept_repeatedly():
    card = keep_user_parts(FIRST, []).replace("library_name: timm", "library_name: timm\nlicense: mit")
    card = card.replace(START, f"Read this first.\n\n{START}") + f"\n{STORY}\n"
    for _ in range(3):
        card = keep_user_parts(NEXT, [card])
        assert metadata(card) == {"library_name": "timm", "tags": ["b"], "license": "mit"}
        assert around(card) == ("Read this first.", STORY)
        assert "91 %" in generated(card)
        assert "90 %" not in card


def test_changes_of_generated_parts_are_replaced():
    card = keep_user_parts(FIRST, []).replace("Many.", "Mine.").replace("- a", "- a\n- mine")
    again = keep_user_parts(NEXT, [card])
    assert again == keep_user_parts(NEXT, [])


def test_metadata_of_an_earlier_run_is_removed():
    before = FIRST.replace("tags:", "base_model: a/b\ndatasets: c/d\ntags:")
    assert metadata(keep_user_parts(NEXT, [keep_user_parts(before, [])])) == metadata(NEXT)


def test_date_in_metadata_is_kept():
    card = keep_user_parts(FIRST, []).replace("library_name: timm", "library_name: timm\nreleased: 2026-01-02")
    again = keep_user_parts(NEXT, [card])
    assert "released: 2026-01-02" in again
    assert keep_user_parts(NEXT, [again]) == again


def test_sections_of_two_cards_are_merged():
    plain = keep_user_parts(FIRST, [])
    there = plain + "\nFrom the Hub.\n\n## Thanks\n\nTo my cat.\n\n## Story\n\nOld.\n"
    here = plain.replace("library_name: timm", "library_name: timm\nlicense: mit") + f"\nFrom here.\n\n{STORY}\n"
    card = keep_user_parts(NEXT, [there, here])
    for _ in range(2):  # what was pushed is then the Hub's
        assert around(card)[1] == f"From the Hub.\n\nFrom here.\n\n## Thanks\n\nTo my cat.\n\n{STORY}"
        assert metadata(card)["license"] == "mit"
        card = keep_user_parts(NEXT, [card, here])


def test_two_sections_with_the_same_title_are_kept():
    card = keep_user_parts(NEXT, [keep_user_parts(FIRST, []) + "\n## Note\n\none\n\n## Other\n\n## Note\n\ntwo\n"])
    assert "one" in card
    assert "two" in card


@pytest.mark.parametrize("damage", [(START, ""), (END, ""), (START, END), (START + "\n", "\n")])
def test_card_with_a_missing_mark_loses_no_text(damage):
    card = keep_user_parts(FIRST, []).replace(*damage) + f"\n{STORY}\n"
    again = keep_user_parts(NEXT, [card])
    assert STORY in around(again)[1]
    assert "91 %" in generated(again)
    assert again.count(START) == again.count(END) == 1
    assert keep_user_parts(NEXT, [again]) == again


def test_body_of_another_programs_card_is_kept_below_the_generated_text():
    foreign = "---\nlicense: mit\ntags: [z]\n---\n\n# other\n\n## Results\n\n12 %\n"
    card = keep_user_parts(NEXT, [foreign])
    assert metadata(card) == {"library_name": "timm", "tags": ["b"], "license": "mit"}
    assert around(card) == ("", "# other\n\n## Results\n\n12 %")
    assert keep_user_parts(NEXT, [card]) == card
    assert around(keep_user_parts(NEXT, ["---\nlicense: mit\n---\n"])) == ("", "")


def test_invalid_metadata_and_crlf_lose_no_text():
    assert around(keep_user_parts(NEXT, ["---\n: [\n---\n\ntext"])) == ("", "text")
    card = keep_user_parts(FIRST, []).replace("- a", "- [") + f"\n{STORY}\n"
    assert around(keep_user_parts(NEXT, [card])) == ("", STORY)
    assert around(keep_user_parts(NEXT, [card.replace("\n", "\r\n")])) == ("", STORY)


def test_remove_generated_text_keeps_what_users_wrote():
    card = keep_user_parts(FIRST, [])
    assert remove_generated_text(card) == ""
    assert remove_generated_text(FIRST) == FIRST
    edited = card.replace("library_name: timm", "library_name: timm\nlicense: mit") + f"\n{STORY}\n"
    assert remove_generated_text(edited) == f"---\nlicense: mit\nlibrary_name: timm\n---\n\n{STORY}\n"


def test_class_named_like_the_end_mark_is_escaped():
    record = make_record(3)
    record.metrics["test"].per_class[0].label = END
    card = render_card(record, "x")
    assert card.count(END) == 1
    assert render_card(record, "x", earlier=[card]) == card


@pytest.fixture
def old() -> str:
    """The model card that hfvit 0.1 wrote for its run.json."""
    return (VERSION_0_1 / "README.md").read_text()


def test_unedited_version_0_1_card_is_replaced(old):
    assert "what is changed by hand stays" in old
    parts = user_parts(old)
    assert (parts.metadata, parts.before, parts.after) == ({}, "", "")
    assert keep_user_parts(NEXT, [old]) == keep_user_parts(NEXT, [])


def test_edits_of_a_version_0_1_card_are_kept(old):
    edited = old.replace("library_name: timm", "library_name: timm\nlicense: mit\nmine: 1")
    edited = edited.replace("The figures hold for images", "I say the figures hold for images")
    edited = edited.replace("## Training", f"{STORY}\n\n## Training")
    card = keep_user_parts(NEXT, [edited])
    assert metadata(card) == {"library_name": "timm", "tags": ["b"], "license": "mit", "mine": 1}
    after = around(card)[1]
    assert after.startswith(STORY)
    assert "## Limits\n\nI say the figures hold" in after
    assert after.count("\n## ") == 2  # `## no heading` is one
    assert keep_user_parts(NEXT, [card]) == card


def test_license_of_another_base_model_in_a_version_0_1_card_is_removed(old):
    digest = hashlib.sha256(json.dumps("apache-2.0").encode()).hexdigest()[:12]
    licensed = old.replace("library_name: timm", "library_name: timm\nlicense: apache-2.0")
    licensed = licensed.replace('{"metadata:', f'{{"metadata:license": "{digest}", "metadata:', 1)
    assert "license" not in metadata(keep_user_parts(NEXT, [licensed]))


@pytest.mark.parametrize("hashes", ["{", "{}", '{"a": [}'])
def test_version_0_1_card_with_damaged_hashes_loses_no_text(old, hashes):
    start = old.index(' {"metadata:')
    damaged = old[:start] + f" {hashes} -->\n"
    assert "The figures hold for images" in around(keep_user_parts(NEXT, [damaged]))[1]


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}),
        ("other", {"license": "other"}),
        ("[markup](x)", {}),
        (None, {}),
    ],
)
def test_license_that_the_hub_does_not_know_is_named(license, expected):
    record = make_record()
    record.model.base_license = license
    card = render_card(record, "x")
    assert {key: value for key, value in metadata(card).items() if key.startswith("license")} == expected
    linked = card.replace("---\n\n", "license_link: LICENSE\n---\n\n", 1)
    kept = metadata(render_card(record, "x", earlier=[linked])).get("license_link")
    assert kept == (None if license == "apache-2.0" else "LICENSE")
    record.model.base_license = "mit"
    again = metadata(render_card(record, "x", earlier=[linked]))
    assert {key: value for key, value in again.items() if key.startswith("license")} == {"license": "mit"}


def test_rendered_card_is_valid_with_its_marks():
    card = ModelCard(render_card(make_record(), "x", earlier=[f"---\nlicense: mit\n---\n{STORY}\n"]))
    assert card.data.license == "mit"
    assert card.data.library_name == "timm"
    assert card.text.index(START) < card.text.index("## Results") < card.text.index(END) < card.text.index("## Story")
