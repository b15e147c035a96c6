"""Output folder of a checkpoint that is made from others without training."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import STAGING
from hfvit.errors import DataError
from hfvit.utils.files import check_writable, commit_file, expand_user, removing_empty_folders, wrap_write_errors


@contextmanager
def empty_folder(output_dir: str | Path) -> Iterator[Path]:
    """Create the output folder; an error in the block leaves no new and empty one.

    Raises `DataError` if it has files.
    """
    folder = expand_user(output_dir)
    with removing_empty_folders(folder):
        check_writable(folder, "--output_dir")
        if any(path.name != STAGING for path in folder.iterdir()):
            raise DataError(f"--output_dir: must be empty, got {output_dir}.")
        yield folder


def save_checkpoint(model: PreTrainedModel, folder: Path, source: str | Path, copied: Sequence[str]) -> None:
    """Save a model and files of its source atomically, in a staging directory.

    Args:
        model: model to save.
        folder: output folder.
        source: checkpoint folder or Hub id.
        copied: names of files to copy from the source, if they exist.
    """
    staging = folder / STAGING
    with wrap_write_errors(f"--output_dir: {folder}"):
        try:
            model.save_pretrained(staging)
            for name in copied:
                if file := find_artifact(source).beside(name):
                    shutil.copyfile(file, staging / name)
            for file in sorted(staging.iterdir()):
                commit_file(file, folder / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
