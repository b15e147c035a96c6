"""Exceptions of libraries as hfvit's own."""

from pickle import UnpicklingError

import pytest

from hfvit.errors import DataError, HFViTError, ModelError, wrap_library_errors


def raise_in_block(error: Exception, **options) -> None:
    with wrap_library_errors(ModelError, "model_name_or_path: x cannot be loaded", **options):
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("hidden_size"), "'hidden_size'"),
        (ValueError("two\n  lines"), "two lines"),
        (AssertionError(), "AssertionError"),
        (UnpicklingError("Weights only load failed"), "take a checkpoint in safetensors"),
    ],
)
def test_wrap_library_errors_raises_one_line(error, message):
    with pytest.raises(ModelError, match=r"^model_name_or_path: x cannot be loaded: ") as raised:
        raise_in_block(error)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_wrap_library_errors_limits_the_library_message():
    with pytest.raises(ModelError, match=r"cannot be loaded: a{30}$"):
        raise_in_block(ValueError("a" * 1000), limit=30)


@pytest.mark.parametrize("error", [DataError("d"), HFViTError("h"), MemoryError(), KeyboardInterrupt()])
def test_wrap_library_errors_passes(error):
    with pytest.raises(type(error)) as raised:
        raise_in_block(error)
    assert raised.value is error
