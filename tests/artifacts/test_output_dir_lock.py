"""Lock of the output folder: one run at a time, released when the process dies."""

import subprocess
import sys

import filelock
import pytest
from helpers.messages import assert_names

import hfvit.artifacts.output_dir
from hfvit.artifacts.output_dir import LOCK_FILE, lock_folder
from hfvit.errors import RecipeError
from hfvit.pipeline import main

HOLD = """
import sys, time
from hfvit.artifacts.output_dir import lock_folder
with lock_folder(sys.argv[1], "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(recipe):
    """A process that holds the lock of the recipe's output folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, recipe.parent / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(30)


def test_second_training_is_refused_until_the_first_process_dies(holder, recipe, monkeypatch):
    out = recipe.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(hfvit.artifacts.output_dir, "TIMEOUT", 0.1)
        with pytest.raises(RecipeError, match=r"^output_dir: ") as caught:
            main([str(recipe)])
        assert_names(caught.value, out)
        assert isinstance(caught.value.__context__, filelock.Timeout)
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    holder.kill()
    with lock_folder(out, "training"):  # at once, or when the system has ended the other
        assert (out / LOCK_FILE).exists()
    assert not list(out.iterdir())


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "out", "training"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "out").exists()


def test_lock_keeps_files_of_the_folder(tmp_path):
    mine = tmp_path / ".lock"
    mine.write_text("of another program")
    with lock_folder(tmp_path, "training"):
        pass
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "of another program"
    mine.unlink()
    with lock_folder(tmp_path, "training"):
        pass
    assert tmp_path.exists()
