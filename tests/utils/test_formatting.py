"""Numbers in messages."""

import pytest

from hfvit.utils.formatting import counted


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 copies"), (1, "1 copy"), (1.0, "1 copy"), (1.81818, "1.818 copies"), (2000, "2,000 copies")],
)
def test_counted_uses_the_plural_except_for_one(number, text):
    assert counted(number, "copy", "copies") == text
