"""Images for INT8 calibration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, Features
from PIL import Image

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.export_record import CalibrationData
from hfvit.data.decode import decode
from hfvit.data.factory import load_splits
from hfvit.data.folders import LeftOut, find_files, select_images
from hfvit.data.splits import at_most, check_image_column, find_image_column, load_split, undecoded
from hfvit.data.tables import UNDECODED
from hfvit.errors import DataError
from hfvit.evaluation.split import read_recipe, redacted_name
from hfvit.recipe.arguments import DataArguments
from hfvit.utils.files import expand_user


@dataclass
class CalibrationPictures:
    """Undecoded `examples` (`image`, and `row` but for a stream) of split `source`."""

    examples: Sequence[dict]
    source: str
    record: CalibrationData

    def __len__(self) -> int:
        return len(self.examples)

    def images(self) -> Iterator[Image.Image]:
        """RGB pictures one at a time; `DataError` for a bad one."""
        for place, example in enumerate(self.examples):
            yield decode(example["image"], self.source, example.get("row", place))


def calibration_pictures(
    checkpoint: str | Path,
    *,
    dataset_name: str | None = None,
    split: str | None = None,
    max_samples: int = 128,
    seed: int = 42,
    otherwise: str = "",
) -> CalibrationPictures:
    """`max_samples` pictures drawn with `seed` from a data set, or from what the checkpoint's recipe trained on.

    Without `dataset_name` and `split` these are the recipe's training rows without those that were held out; of a
    stream, the first ones. Raises `DataError` when there are none; `otherwise` is what its message offers beside a
    data set, such as ", or take --dtype fp16".
    """
    if dataset_name is None:
        path = find_artifact(checkpoint).beside(RECIPE_FILE)
        if path is None:
            raise DataError(
                f"--calibration_dataset: static INT8 needs pictures to calibrate with, and {checkpoint} has no"
                f" {RECIPE_FILE} that names any; give it{otherwise}."
            )
        data, recipe_seed = read_recipe(path)
    else:
        data = DataArguments(dataset_name=dataset_name)
    if dataset_name is None and split is None:
        split = data.train_split
        splits = load_splits(replace(data, test_split=None, test_fraction=data.held_out_for_test), recipe_seed)
        train = splits.train
        is_part = splits.sources["validation"] == split
        what = f"split '{split}'" + (" without the rows held out" if is_part else "")
        examples = list(train.take(max_samples)) if data.streaming else at_most(train, max_samples, seed)
    else:
        split = split or "train"
        what = f"split '{split}'"
        loaded = _images_without_classes(data.dataset_name) or load_split(data, split)
        column = data.image_column or find_image_column(loaded.features)
        check_image_column(loaded, split, column)
        examples = at_most(undecoded(loaded, column), max_samples, seed)
    record = CalibrationData(dataset=redacted_name(data.dataset_name), split=what, images=len(examples), seed=seed)
    return CalibrationPictures(examples, split, record)


def _images_without_classes(folder: str) -> Dataset | None:
    """The images of a folder with nothing but images, which need no labels here; None for any other data set."""
    root = expand_user(folder)
    if not root.is_dir():
        return None
    files, subfolders = find_files(root, LeftOut())
    images = select_images(files, LeftOut())
    if not images or subfolders or any(len(file.parts) > 1 for file in images):
        return None
    rows = {"image": [{"bytes": None, "path": file.path} for file in images]}
    return Dataset.from_dict(rows, Features({"image": UNDECODED}))
