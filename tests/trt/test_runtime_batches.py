"""Batch slices, profile limits and the CUDA graph cache, without an engine."""

import re

import numpy as np
import pytest

from hfvit.errors import ModelError
from hfvit.trt.runtime import BatchSlice, CudaGraphCache, batch_slices, profile_limits


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
def test_batch_slices_fit_the_profile(count, limits, expected):
    assert list(batch_slices(count, *limits)) == [BatchSlice(*item) for item in expected]


def test_batch_slices_cover_each_image_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, more, count = rng.integers(1, 9), rng.integers(0, 9), int(rng.integers(0, 60))
        found = list(batch_slices(count, int(low), int(low + more)))
        assert [row for item in found for row in range(item.start, item.stop)] == list(range(count))
        assert all(low <= item.size <= low + more and 0 < item.rows <= item.size for item in found)


def test_profile_limits_read_the_profile_of_dynamic_batches_only():
    shapes = [(2, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16)]
    assert profile_limits((-1, 3, 16, 16), lambda: shapes) == (2, 8)
    assert profile_limits((4, 3, 16, 16), lambda: pytest.fail("asked")) == (4, 4)
    for shape in ((3, 16, 16), (-1, 3, -1, 16), (1, 3, 16, 16, 16)):
        with pytest.raises(ModelError, match=re.escape(str(list(shape)))):
            profile_limits(shape, lambda: shapes)


def test_cuda_graph_cache_captures_repeated_sizes_and_keeps_the_latest():
    captured = []
    graphs = CudaGraphCache(lambda size: captured.append(size) or f"graph {size} number {len(captured)}", max_graphs=2)
    assert [graphs.graph(size) for size in (8, 3)] == [None, None]
    assert [graphs.graph(8) for _ in range(3)] == ["graph 8 number 1"] * 3
    assert graphs.graph(3) == "graph 3 number 2"
    assert graphs.graph(8) == "graph 8 number 1"
    assert [graphs.graph(5) for _ in range(2)] == [None, "graph 5 number 3"]
    assert list(graphs.graphs) == [8, 5]  # 3 was used longest ago
    assert [graphs.graph(3) for _ in range(2)] == [None, "graph 3 number 4"]
    assert captured == [8, 3, 5, 3]


def test_cuda_graph_cache_does_not_retry_a_failed_capture():
    tried = []
    graphs = CudaGraphCache(tried.append)
    assert [graphs.graph(size) for size in (8, 8, 8, 4, 4)] == [None] * 5
    assert tried == [8]
