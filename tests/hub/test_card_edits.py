"""Whatever a user changes in a card is still there after the next run wrote it."""

from hfvit.hub.model_card import keep_edits, read_card, recorded

FIRST = recorded("---\nlibrary_name: timm\ntags:\n- a\n---\n\n# x\n\n## Results\n\n90 %\n\n## Limits\n\nMany.\n")
NEXT = recorded("---\nlibrary_name: timm\ntags:\n- b\n---\n\n# x\n\n## Results\n\n91 %\n\n## Limits\n\nFew.\n")


def test_an_untouched_card_is_replaced():
    assert keep_edits(NEXT, FIRST) == NEXT
    assert keep_edits(NEXT, keep_edits(FIRST, FIRST)) == NEXT


def test_edits_additions_and_deletions_survive_again_and_again():
    edited = FIRST.replace("Many.", "Mine.").replace("library_name: timm", "library_name: timm\nlicense: mit")
    edited = edited.replace("## Results", "## Thanks\n\nTo all.\n\n```bash\n## no heading\n```\n\n## Results")
    for _ in range(2):
        edited = keep_edits(NEXT, edited)
        card = read_card(edited)
        assert card.metadata == {"library_name": "timm", "tags": ["b"], "license": "mit"}
        assert "91 %" in card.sections["Results"]
        assert "Mine." in card.sections["Limits"]
        assert "## no heading" in card.sections["Thanks"]
    without = edited[: edited.index("## Limits")] + edited[edited.index("<!--") :]
    assert "Limits" not in read_card(keep_edits(NEXT, without)).sections


def test_a_date_in_the_metadata_is_kept():
    edited = keep_edits(NEXT, FIRST.replace("library_name: timm", "library_name: timm\nreleased: 2026-01-02"))
    assert "released: 2026-01-02" in edited
    assert keep_edits(NEXT, edited) == edited


def test_a_changed_list_of_the_metadata_is_the_users():
    assert read_card(keep_edits(NEXT, FIRST.replace("- a", "- a\n- mine"))).metadata["tags"] == ["a", "mine"]


def test_of_a_card_without_a_record_only_what_is_new_is_kept():
    foreign = "---\nlicense: mit\ntags: [z]\n---\n\n# other\n\n## Results\n\n12 %\n\n## Story\n\nLong.\n"
    card = read_card(keep_edits(NEXT, foreign))
    assert card.metadata == {"library_name": "timm", "tags": ["b"], "license": "mit"}
    assert "91 %" in card.sections["Results"]
    assert "Long." in card.sections["Story"]


def test_broken_metadata_and_line_ends_of_windows_cost_nothing():
    assert keep_edits(NEXT, "---\n: [\n---\n\ntext") == NEXT
    assert keep_edits(NEXT, FIRST.replace("- a", "- [")) == NEXT
    assert keep_edits(NEXT, FIRST.replace("\n", "\r\n")) == NEXT
