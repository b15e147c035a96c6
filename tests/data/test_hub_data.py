"""Data sets of a loopback Hub, with any names of splits."""

import datasets
import pytest
from helpers.images import colored_split
from helpers.layouts import class_counts
from helpers.loopback_hub import LoopbackHub
from helpers.splits import load_splits, stream_splits

from hfvit.data.evaluation_stream import EvaluationStream
from hfvit.errors import DataError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "home")
        for key, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False}.items():
            monkeypatch.setattr(datasets.config, key, value)
        yield hub


def create(hub: LoopbackHub, tmp_path, splits: dict[str, int]) -> str:
    """A data set whose card names its splits; of each split so many rows."""
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    files = {}
    for seed, (name, rows) in enumerate(splits.items()):
        card += [f"  - split: {name}", f"    path: data/{seed}.parquet"]
        colored_split(rows, seed).to_parquet(tmp_path / "rows.parquet")
        files[f"data/{seed}.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    hub.create("user/colors", "dataset", {"README.md": "\n".join([*card, "---"]).encode(), **files})
    return "user/colors"


def test_load_splits_of_a_hub_data_set_takes_usual_and_named_splits(hub, tmp_path):
    name = create(hub, tmp_path, {"train": 30, "dev": 6, "test_night": 9})
    splits = load_splits(name, test_split="test_night")
    assert class_counts(splits) == {
        role: dict.fromkeys(["red", "green", "blue"], rows // 3)
        for role, rows in (("train", 30), ("validation", 6), ("test", 9))
    }
    assert "test" not in load_splits(name).sources


def test_load_splits_of_a_hub_data_set_without_train_names_its_splits(hub, tmp_path):
    name = create(hub, tmp_path, {"fold_1": 30, "fold_2": 9})
    with pytest.raises(DataError, match=r"^train_split: .*fold_1, fold_2"):
        load_splits(name)
    splits = load_splits(name, train_split="fold_1", test_split="fold_2")
    assert {role: len(splits[role]) for role in splits.sources} == {"train": 27, "validation": 3, "test": 9}


def test_streamed_evaluation_of_a_hub_data_set_reads_the_needed_shards_only(hub, tmp_path):
    files = {"README.md": b""}
    for name in ("train-0", *(f"validation-{shard}" for shard in range(4))):
        colored_split(9, 1).to_parquet(tmp_path / "rows.parquet")
        files[f"data/{name}.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    hub.create("user/shards", "dataset", files)
    splits = stream_splits("user/shards", max_eval_samples=2)
    config = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    stream = EvaluationStream(splits.validation, "validation", None, splits.labels, config, 4, limit=2)
    del hub.requests[:]
    (batch,) = stream
    assert batch["labels"].tolist() == [colored_split(9, 1)[0]["label"]] * 2
    paths = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    read = {path.split("/")[-1].split(".")[0] for path in paths}
    assert read == {"validation-1", "validation-3"}
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".arrow", ".incomplete")]
