"""Packages of hfvit's extras."""

import json

import pytest

from hfvit.errors import ModelError
from hfvit.utils.optional import import_optional


def test_import_optional_returns_the_module():
    assert import_optional("json", "extra", "A file") is json


@pytest.mark.parametrize("name", ["no_such_package", "json.no_such_module"])
def test_import_optional_without_the_package_names_the_install_command(name):
    with pytest.raises(ModelError, match=r"^A file needs .*pip install \"hfvit\[extra\]\"$"):
        import_optional(name, "extra", "A file", ModelError)
