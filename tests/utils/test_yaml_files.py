"""YAML without repeated keys and aliases."""

import time

import pytest
import yaml

from hfvit.utils.yaml_files import load_yaml


def test_load_yaml_of_many_keys_takes_little_time():
    values = {f"key {number}": number for number in range(20_000)}
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    start = time.process_time()
    plain = yaml.safe_load(text)
    middle = time.process_time()
    assert load_yaml(text) == plain == values
    assert time.process_time() - middle < 1 + 2 * (middle - start)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x: {a: 1, a: 2}", "a: &x 1\nb: *x"])
def test_load_yaml_of_repeated_keys_and_aliases_raises(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
