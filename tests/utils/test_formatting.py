"""Tables, and numbers in messages."""

import pytest

from hfvit.utils.formatting import aligned, counted


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 copies"), (1, "1 copy"), (1.0, "1 copy"), (1.81818, "1.818 copies"), (2000, "2,000 copies")],
)
def test_counted_uses_the_plural_except_for_one(number, text):
    assert counted(number, "copy", "copies") == text


@pytest.mark.parametrize(("name", "spaces"), [("water", 3), ("水体", 4), ("cafe\u0301", 4), ("forêt", 3)])
def test_aligned_counts_the_columns_of_a_terminal(name, spaces):
    assert aligned([("class", "images"), (name, "3"), ("meadow", "4")])[1] == f"{name}{' ' * spaces}3"
