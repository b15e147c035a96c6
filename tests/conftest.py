"""Shared fixtures. Offline, CPU; real pictures are generated on the spot."""

import gc
import os

# Before any HuggingFace library is imported: a test that reaches for the Hub must fail at once, not hang.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Micro models gain nothing from more threads, and lose much when two test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LABELS = ["red", "green", "blue"]
MICRO = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURE = "vit_tiny_patch16_224"
# Half a minute and more, or few tests that take seconds each: they go first, or a worker ends alone with one of them.
LONGEST = {
    f"test_{name}.py"
    for name in (
        "backbones", "clients", "demo_app", "export", "export_command", "finetuning_processes", "hub_round_trip",
        "image_text", "kill_and_resume", "processes", "push", "quantize", "readme", "tensorrt_command", "train",
    )
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if "slow" in item.keywords and not os.environ.get("RUN_SLOW"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; set RUN_SLOW=1"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # or each collection, and a Trainer starts one, looks through all that libraries hold: half a second


@pytest.fixture(autouse=True)
def _own_cache_and_no_sleep(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "hf_datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    # datasets 5.2 sleeps five seconds at the end of each pass through several Parquet files of a stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def coloured_image(label: int, rng: np.random.Generator, size: int = 16) -> Image.Image:
    """A noisy square whose brightest channel is its class."""
    pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[..., label] += 90
    return Image.fromarray(pixels)


def coloured_split(rows: int, seed: int) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    labels = [row % len(LABELS) for row in range(rows)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    return datasets.Dataset.from_dict(
        {"img": [coloured_image(label, rng) for label in labels], "label": labels}, features=features
    )


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """A data set folder as on the Hub: parquet, columns `img` and `label`, splits train (65) and test (31)."""
    folder = tmp_path_factory.mktemp("colours")
    for split, rows, seed in (("train", 65, 1), ("test", 31, 2)):
        coloured_split(rows, seed).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """A data set folder to be streamed; see shards.py."""
    from shards import ROWS, write_shards

    folder = tmp_path_factory.mktemp("sharded")
    write_shards(folder, coloured_split(sum(ROWS), 1))
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A stock ViT without a recipe."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("stock")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: index for index, label in enumerate(LABELS)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


MICRO_RECIPE = """\
# A micro ViT on generated colours, for tests.
architecture: vit_tiny_patch16_224
model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
image_size: 16
validation_fraction: 0.2
crop_pct: 1.0
global_batch_size: 8
num_train_epochs: 2
learning_rate: 3.0e-3
max_grad_norm: 1.0
logging_steps: 1
seed: 3
disable_tqdm: true
"""


@pytest.fixture
def recipe(tmp_path, colours) -> Path:
    """A recipe that trains in a second; its output_dir is `out` beside it."""
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO_RECIPE + f"dataset_name: {colours}\noutput_dir: {tmp_path / 'out'}\n")
    return path


def run_command(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command as a user would, from `cwd`, with this interpreter's scripts first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as free:
        free.bind((address, 0))
        return free.getsockname()[1]
