"""CSV files, read back by the csv module and by pandas."""

import csv

import pandas
import pytest

from hfvit.utils.csv_files import write_csv


def test_cells_are_read_back(tmp_path):
    rows = [("a,b.png", 'say "cat"', -0.25), ("犬/1.png", "x", 1)]
    write_csv(tmp_path / "x.csv", ("file", "class", "value"), rows)
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["file", "class", "value"], *([str(cell) for cell in row] for row in rows)]
    assert pandas.read_csv(tmp_path / "x.csv")["value"].tolist() == [-0.25, 1]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1"])
def test_formulas_are_quoted(text, tmp_path):
    write_csv(tmp_path / "x.csv", ("name",), [(text,)])
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[1][0].startswith("'")


def test_failed_write_leaves_no_file(tmp_path):
    def rows():
        yield ("a",)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_csv(tmp_path / "x.csv", ("name",), rows())
    assert list(tmp_path.iterdir()) == []
