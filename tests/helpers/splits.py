"""Splits of a data set, by the keys of a recipe."""

from hfvit.data.factory import load_splits as load
from hfvit.data.stream_splits import stream_splits as stream
from hfvit.recipe.arguments import DataArguments


def load_splits(dataset_name, seed=42, **arguments):
    """Load the splits of `DataArguments(dataset_name, **arguments)`."""
    return load(DataArguments(dataset_name, **arguments), seed)


def stream_splits(dataset_name, validation_split="validation", check_length=lambda images: None, **arguments):
    """Load the splits of a data set with a streamed training split."""
    data = DataArguments(dataset_name, validation_split=validation_split, streaming=True, **arguments)
    return stream(data, check_length=check_length)
