"""How batches go through an engine, without one."""

import re

import numpy as np
import pytest

from hfvit.errors import ModelError
from hfvit.trt.runtime import Piece, Recurring, pieces, profile_limits


@pytest.mark.parametrize(
    ("count", "limits", "expected"),
    [
        (0, (1, 8), []),
        (1, (1, 8), [(0, 1, 1)]),
        (8, (1, 8), [(0, 8, 8)]),
        (17, (1, 8), [(0, 8, 8), (8, 16, 8), (16, 17, 1)]),
        (1, (4, 8), [(0, 1, 4)]),
        (10, (4, 8), [(0, 8, 8), (8, 10, 4)]),
        (5, (4, 4), [(0, 4, 4), (4, 5, 4)]),
    ],
)
def test_any_number_of_images_goes_in_batches_of_the_profile(count, limits, expected):
    assert list(pieces(count, *limits)) == [Piece(*piece) for piece in expected]


def test_no_image_is_lost_or_run_twice():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, more, count = rng.integers(1, 9), rng.integers(0, 9), int(rng.integers(0, 60))
        found = list(pieces(count, int(low), int(low + more)))
        assert [row for piece in found for row in range(piece.start, piece.stop)] == list(range(count))
        assert all(low <= piece.size <= low + more and 0 < piece.rows <= piece.size for piece in found)


def test_a_profile_is_asked_only_for_a_free_batch():
    shapes = [(2, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16)]
    assert profile_limits((-1, 3, 16, 16), lambda: shapes) == (2, 8)
    assert profile_limits((4, 3, 16, 16), lambda: pytest.fail("asked")) == (4, 4)
    for shape in ((3, 16, 16), (-1, 3, -1, 16), (1, 3, 16, 16, 16)):
        with pytest.raises(ModelError, match=re.escape(str(list(shape)))):
            profile_limits(shape, lambda: shapes)


def test_graphs_are_made_for_sizes_that_come_again_and_the_latest_are_kept():
    made = []
    graphs = Recurring(lambda size: made.append(size) or f"graph {size} number {len(made)}", most=2)
    assert [graphs.graph(size) for size in (8, 3)] == [None, None]
    assert [graphs.graph(8) for _ in range(3)] == ["graph 8 number 1"] * 3
    assert graphs.graph(3) == "graph 3 number 2"
    assert graphs.graph(8) == "graph 8 number 1"
    assert [graphs.graph(5) for _ in range(2)] == [None, "graph 5 number 3"]
    assert list(graphs.graphs) == [8, 5]  # 3 was used longest ago
    assert [graphs.graph(3) for _ in range(2)] == [None, "graph 3 number 4"]
    assert made == [8, 3, 5, 3]


def test_a_graph_that_cannot_be_made_is_not_tried_again():
    tried = []
    graphs = Recurring(tried.append)
    assert [graphs.graph(size) for size in (8, 8, 8, 4, 4)] == [None] * 5
    assert tried == [8]
