"""Names as text in Markdown and HTML: whatever they hold, a parser finds the same structure and the name itself."""

import pytest
from helpers.hostile_text import HOSTILE, MARKUP
from helpers.html import Elements
from hypothesis import assume, example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hfvit.errors import printable
from hfvit.utils.markup import html_environment, markdown, markdown_code, markdown_environment, web_address

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PIECES = st.sampled_from([*HOSTILE, *MARKUP, *"\\`*_{}[]()<>#+-.!|~&$:=@\n\t 1a"])
NAMES = st.text() | st.lists(PIECES, max_size=8).map("".join)
# Each place of a name: begin of a paragraph, inside one, heading, cell of a table, item of a list.
PLACES = "# {0}\n\n{0}\n\nbefore {0} after\n{0}\n\n| a | b |\n|---|---|\n| {0} | {0} |\n\n- {0}\n\n1. x {0}\n"


def structure(text: str) -> list[tuple]:
    """The kinds of all tokens, and of those inside paragraphs; neighboring texts count as one."""
    found = []
    for token in PARSER.parse(text):
        inner = [child.type for child in token.children or () if child.type not in ("text", "text_special")]
        found.append((token.type, token.tag, inner))
    return found


def texts(text: str) -> list[str]:
    return ["".join(child.content for child in token.children) for token in PARSER.parse(text) if token.children]


def every(names):
    """Run a property on each of `names`, too."""

    def decorate(test):
        for name in names:
            test = example(name)(test)
        return test

    return decorate


@every([*HOSTILE, *MARKUP])
@given(NAMES)
def test_markdown_keeps_structure_and_text(name):
    shown = printable(name).strip()
    assume(shown)
    document = PLACES.format(markdown(name))
    assert structure(document) == structure(PLACES.format("x"))
    assert texts(document) == [found.replace("§", shown) for found in texts(PLACES.format("§"))]
    assert len(document.split("\n")) == len(PLACES.split("\n"))


@every([*HOSTILE, *MARKUP])
@given(NAMES)
def test_markdown_code_is_one_span_with_the_name(name):
    assume(printable(name).strip())
    for place in ("a {} b\n", "| a |\n|---|\n| {} |\n"):
        document = place.format(markdown_code(name, in_table=place.startswith("|")))
        assert structure(document) == structure(place.format("`x`"))
        spans = [
            child for token in PARSER.parse(document) for child in token.children or () if child.type == "code_inline"
        ]
        # A code span loses one space on each side where both sides have one.
        assert [span.content.strip() for span in spans] == [printable(name).strip()]


@pytest.mark.parametrize(
    "name", ["cat", "uoft-cs/cifar10", "vit_base_patch16_224", "2.14.1+cu130", "95.00 %", "a (b)"]
)
def test_ordinary_names_stand_as_they_are(name):
    assert markdown(name) == name


@every([*HOSTILE, *MARKUP])
@given(NAMES)
def test_web_address_leaves_no_target(name):
    document = f"[x]({web_address('https://a.example/' + name)})\n"
    assert structure(document) == structure("[x](https://a.example/x)\n")


@every([*HOSTILE, *MARKUP])
@given(name=NAMES)
def test_html_keeps_structure_and_text(name):
    template = html_environment(".").from_string('<p title="{{ name }}">{{ name }}</p>')
    parsed = Elements(template.render(name=name))
    assert parsed.found == [("p", ["title"]), "/p"]
    assert parsed.text == 2 * printable(name)


def test_markdown_templates_escape_all_but_what_a_filter_says():
    template = markdown_environment(".").from_string("{{ a }} {{ a | code }} {{ a | safe }} {{ 1.5 }}")
    assert template.render(a="*a*") == r"\*a\* `*a*` *a* 1.5"
