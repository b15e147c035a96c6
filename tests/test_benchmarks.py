"""The benchmarks run and say what they are; how fast anything was is never asserted."""

import json
import sys

import pytest
from conftest import ROOT, run_command

NAMES = ("input_pipeline", "train_step", "startup")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    return common


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches(name):
    result = run_command(sys.executable, f"benchmarks/{name}.py", "--help")
    assert result.returncode == 0, result.stderr
    for word in (f"python benchmarks/{name}.py --quick", "--rounds", "--json FILE", "hfvit", "timm"):
        assert word in result.stdout


def test_rounds_begin_with_another_contender_each(common):
    order = []
    results = common.interleaved(
        {name: {"name": name} for name in "abc"}, 3, lambda job: order.append(job["name"]) or {}
    )
    assert "".join(order) == "abcbcacab"
    assert {name: len(rounds) for name, rounds in results.items()} == {"a": 3, "b": 3, "c": 3}


def test_figures_are_medians_and_their_spread_is_told(common):
    rounds = [{"seconds": value, "what": "x"} for value in (3.0, 1.0, 2.0)]
    assert common.medians(rounds) == {"seconds": 2.0, "what": "x"}
    assert common.spread([3.0, 1.0, 2.0]) == 1.0


def test_a_table_is_markdown(common):
    lines = common.table(
        [{"what": "a", "n": 1234.5}, {"what": "b", "n": None}], {"what": "", "n": ",.0f"}
    ).splitlines()
    assert lines == ["| what |     n |", "| ---- | ----: |", "| a    | 1,234 |", "| b    |     - |"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_measures_hfvit_and_its_peers(name, tmp_path):
    result = run_command(sys.executable, f"benchmarks/{name}.py", "--quick", "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["quick"] is True
    assert written["versions"]["torch"]
    assert written["hardware"]["cores"] > 0
    text = json.dumps(written["rows"])
    for contender in ("hfvit", "timm"):
        assert contender in text
    figures = [value for row in written["rows"] for key, value in row.items() if key in ("images/s", "seconds")]
    assert figures
    assert min(figures) > 0
