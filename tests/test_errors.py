"""Conversion of library exceptions, and messages of commands."""

import errno
import os
import pickle
from pickle import UnpicklingError

import pytest
from helpers.messages import assert_names
from torch.utils.data import DataLoader, Dataset

from hfvit.errors import DataError, HFViTError, InterruptedRunError, ModelError, StorageError, run, wrap_library_errors


def raise_in_block(error: Exception, **options) -> None:
    with wrap_library_errors(ModelError, "model_name_or_path: x cannot be loaded", **options):
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("hidden_size"), "'hidden_size'"),
        (ValueError("two\n  lines"), "two lines"),
        (AssertionError(), "AssertionError"),
        (UnpicklingError("Weights only load failed"), "safetensors"),
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


@pytest.mark.parametrize("error", [InterruptedRunError("Received SIGINT."), StorageError("Disk full.", "Free it.")])
def test_unfinished_errors_are_pickled_as_they_are(error):
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), vars(copied)) == (type(error), str(error), vars(error))


MESSAGE = "Row 3 (DataError: x.png): not a readable image, hfvit.errors.DataError: no less."


class Unreadable(Dataset):
    """Raise `MESSAGE` for each row."""

    def __len__(self):
        return 2

    def __getitem__(self, row):
        try:
            raise DataError("DataError: the cause")
        except DataError as error:
            raise DataError(MESSAGE) from error


@pytest.mark.parametrize("workers", [0, 1])
def test_run_prints_the_full_message_of_a_worker(workers, capsys):
    assert run(lambda: list(DataLoader(Unreadable(), num_workers=workers))) == DataError.exit_code
    assert capsys.readouterr().err == f"hfvit: error: {MESSAGE}\n"


def test_run_prints_nothing_for_an_empty_message(capsys):
    assert run(lambda: raise_in_block(DataError())) == DataError.exit_code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENAMETOOLONG])
def test_run_names_a_file_that_cannot_be_used_in_one_line(number, capsys):
    def command():
        raise OSError(number, os.strerror(number), "some/plots")

    assert run(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_names(error, "some/plots")


def test_run_raises_other_operating_system_errors():
    with pytest.raises(FileNotFoundError):
        run(lambda: os.stat("no/such/file"))
