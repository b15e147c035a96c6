"""Argument types: accepted values, and errors that name the option and the value."""

import argparse

import pytest
from helpers.messages import assert_names, option_of

from hfvit.cli import options as option_types

ACCEPTED = {
    "positive_int": {"1": 1, "250": 250},
    "non_negative_int": {"0": 0, "7": 7},
    "fraction": {"0": 0.0, "0.99": 0.99, "1": 1.0},
    "percentage_points": {"0": 0.0, "0.5": 0.5, "100": 100.0},
    "non_negative_float": {"0": 0.0, "1e-3": 1e-3, "250": 250.0},
}
REJECTED = {
    "positive_int": ("0", "-1", "1.5", "many", "", "²"),
    "non_negative_int": ("-1", "1.5", "many"),
    "fraction": ("-0.1", "1.01", "99", "nan", "inf", "most"),
    "percentage_points": ("-0.5", "101", "nan", "inf", "few"),
    "non_negative_float": ("-1e-9", "nan", "inf", "little"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_argument_type_parses_or_names_the_value(name, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=getattr(option_types, name))
    for text, value in ACCEPTED[name].items():
        found = parser.parse_args([f"--value={text}"]).value
        assert (found, type(found)) == (value, type(value))
    for text in REJECTED[name]:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--value={text}"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert option_of(error) == "value"
        assert_names(error, text)
