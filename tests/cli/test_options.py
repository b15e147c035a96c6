"""What an option takes, and how argparse tells of the rest."""

import argparse

import pytest
from helpers.messages import assert_names, option_of

from hfvit.cli import options as option_types

TAKEN = {
    "above_0": {"1": 1, "250": 250},
    "from_0": {"0": 0, "7": 7},
    "share": {"0": 0.0, "0.99": 0.99, "1": 1.0},
    "points": {"0": 0.0, "0.5": 0.5, "100": 100.0},
    "not_negative": {"0": 0.0, "1e-3": 1e-3, "250": 250.0},
}
REFUSED = {
    "above_0": ("0", "-1", "1.5", "many", "", "²"),
    "from_0": ("-1", "1.5", "many"),
    "share": ("-0.1", "1.01", "99", "nan", "inf", "most"),
    "points": ("-0.5", "101", "nan", "inf", "few"),
    "not_negative": ("-1e-9", "nan", "inf", "little"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_values_are_taken_or_told_in_words(name, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=getattr(option_types, name))
    for text, value in TAKEN[name].items():
        found = parser.parse_args([f"--value={text}"]).value
        assert (found, type(found)) == (value, type(value))
    for text in REFUSED[name]:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--value={text}"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert option_of(error) == "value"
        assert_names(error, text)
