"""Shared fixtures, offline and on the CPU, with generated images."""

import functools
import gc
import os

# Set before any Hugging Face library is imported, so that requests to the Hub fail at once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Small models are slower with more threads when two test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from helpers.commands import fork_server
from helpers.recipes import write_micro_recipe

# Libraries are imported where they are used, as the process that only distributes the tests needs none of them.

# Files that run first, so that no worker is left with a long one at the end.
LONGEST = (
    "cli/test_bad_input.py", "data/test_streamed_training.py", "demo/test_app.py", "examples/test_examples.py",
    "export/test_clients.py", "export/test_export_command.py", "export/test_onnx.py", "export/test_quantization.py",
    "export/test_tensorrt_command.py", "finetuning/test_distributed_methods.py", "hub/test_push.py",
    "hub/test_round_trip.py", "inference/test_predict_terminal.py", "models/test_backbones.py",
    "models/test_image_text.py", "test_api.py", "test_docs.py", "test_multilabel.py", "test_pipeline.py",
    "training/test_distributed.py", "training/test_kill_and_resume.py", "trt/test_builder.py",
)  # fmt: skip
TESTS = Path(__file__).parent


def pytest_collectstart():
    gc.disable()  # until all tests are imported, which leaves no garbage


def pytest_collection_modifyitems(items):
    import torch

    items.sort(key=lambda item: item.path.relative_to(TESTS).as_posix() not in LONGEST)
    for item in items:
        if item.get_closest_marker("slow") and not os.environ.get("RUN_SLOW"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; set RUN_SLOW=1"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # otherwise each garbage collection of a Trainer takes half a second
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    import datasets

    cache = tmp_path_factory.getbasetemp() / "hf_datasets_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        yield


@pytest.fixture(scope="session", autouse=True)
def _forks(_own_cache):
    server = fork_server()
    yield
    server.close()


@pytest.fixture(scope="session", autouse=True)
def _one_torchlib():
    """Parse the sources of torchlib's 500 operators once (onnxscript 0.7).

    Otherwise each export parses them.
    """
    from torch.onnx._internal._lazy_import import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> Path:
    """Write a Parquet data set with the splits train (65) and test (31).

    Its columns are `img` and `label`.
    """
    from helpers.images import colored_split

    folder = tmp_path_factory.mktemp("colors")
    for split, rows, seed in (("train", 65, 1), ("test", 31, 2)):
        colored_split(rows, seed).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """Write the data set of helpers/shards.py for streaming."""
    from helpers.images import colored_split
    from helpers.shards import ROWS, write_shards

    folder = tmp_path_factory.mktemp("sharded")
    write_shards(folder, colored_split(sum(ROWS), 1))
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Write a checkpoint of transformers' ViT, without a recipe."""
    from helpers.images import LABELS
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("stock")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: index for index, label in enumerate(LABELS)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, colors) -> Path:
    """Write a recipe that trains in a second, with output_dir `out` beside it."""
    return write_micro_recipe(tmp_path, colors)
