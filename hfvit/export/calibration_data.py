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
class CalibrationImages:
    """Hold undecoded calibration images.

    Args:
        examples: mappings with the key `image`, and `row` for map-style datasets.
        source: split name, for messages.
        record: the data set and number of images, for export.json.
    """

    examples: Sequence[dict]
    source: str
    record: CalibrationData

    def __len__(self) -> int:
        return len(self.examples)

    def images(self) -> Iterator[Image.Image]:
        """Decode RGB images one at a time; raises `DataError` for an undecodable one."""
        for index, example in enumerate(self.examples):
            yield decode(example["image"], self.source, example.get("row", index))


def calibration_images(
    checkpoint: str | Path,
    *,
    dataset_name: str | None = None,
    split: str | None = None,
    max_samples: int = 128,
    seed: int = 42,
    alternative: str = "",
) -> CalibrationImages:
    """Sample calibration images from a data set or a recipe's training data.

    Args:
        checkpoint: folder with the recipe.
        dataset_name: data set to read instead of the recipe's.
        split: split to read; the recipe's training rows without held-out rows when neither is given, else "train".
        max_samples: number of images; the first ones of a streamed data set.
        seed: seed of the sample.
        alternative: other option for the error message, such as ", or pass --dtype fp16".

    Raises:
        DataError: there is no data set, split or image column.
    """
    if dataset_name is None:
        path = find_artifact(checkpoint).beside(RECIPE_FILE)
        if path is None:
            raise DataError(
                f"--calibration_dataset: required for static INT8, as {checkpoint} has no {RECIPE_FILE}. Pass"
                f" it{alternative}."
            )
        data, recipe_seed = read_recipe(path)
    else:
        data = DataArguments(dataset_name=dataset_name)
    if dataset_name is None and split is None:
        split = data.train_split
        splits = load_splits(replace(data, test_split=None, test_fraction=data.held_out_for_test), recipe_seed)
        train = splits.train
        has_held_out = splits.sources.get("validation") == split
        description = f"split '{split}'" + (" without the rows held out" if has_held_out else "")
        examples = list(train.take(max_samples)) if data.streaming else at_most(train, max_samples, seed)
    else:
        split = split or "train"
        description = f"split '{split}'"
        loaded = _unlabeled_images(data.dataset_name)
        if loaded is not None and split != "train":
            raise DataError(
                f"--calibration_split: no split '{split}' in {data.dataset_name}, a folder of images without"
                " subfolders. Omit it."
            )
        loaded = loaded or load_split(data, split)
        column = data.image_column or find_image_column(loaded.features)
        check_image_column(loaded, split, column)
        examples = at_most(undecoded(loaded, column), max_samples, seed)
    dataset_name = redacted_name(data.dataset_name)
    record = CalibrationData(dataset=dataset_name, split=description, images=len(examples), seed=seed)
    return CalibrationImages(examples, split, record)


def _unlabeled_images(folder: str) -> Dataset | None:
    """Load the images of a folder without subfolders, None for any other data set."""
    root = expand_user(folder)
    if not root.is_dir():
        return None
    files, subfolders = find_files(root, LeftOut())
    images = select_images(files, LeftOut())
    if not images or subfolders or any(len(file.parts) > 1 for file in images):
        return None
    rows = {"image": [{"bytes": None, "path": file.path} for file in images]}
    return Dataset.from_dict(rows, Features({"image": UNDECODED}))
