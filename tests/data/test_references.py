"""Cards, saved data sets and rows that name files outside their data set."""

import io
import json
import os
import shutil
import tarfile

import datasets
import pyarrow as pa
import pytest
import yaml
from helpers.layouts import image_bytes, write_images, write_shard
from helpers.loopback_hub import LoopbackHub
from helpers.messages import assert_names
from helpers.splits import load_splits, stream_splits
from huggingface_hub import DatasetCard

from hfvit.data.decode import decode
from hfvit.data.open_image import DEFAULT_LIMITS
from hfvit.data.references import check_cards, leads_outside
from hfvit.data.tables import as_images
from hfvit.errors import DataError

OUTSIDE = (
    "../private/**", "data/../../private", "/etc/*.png", "~/pictures/*", "https://host/a.parquet", "hf://datasets/a/b/c",
    "s3://bucket/key", "file:///etc/passwd", "zip://*.png::/private.zip", "data/a.zip::b", "file:/etc/passwd", "C:/a",
    "data\\..\\..\\private",
)  # fmt: skip
INSIDE = ("data/*.parquet", "**", "train-*-of-*.parquet", "a..b/c.csv", "...png")


def card(configs) -> str:
    return f"---\n{yaml.safe_dump({'configs': configs})}---\nText\n"


def rows_of(count: int = 20):
    return [{"image": image_bytes(n), "label": n % 2} for n in range(count)]


@pytest.mark.parametrize("path", OUTSIDE + INSIDE)
def test_leads_outside(path):
    assert leads_outside(path) == (path in OUTSIDE)


@pytest.mark.parametrize("where", ["string", "list", "split", "data_dir", "second"])
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_card_that_names_files_outside_is_refused(tmp_path, where, name):
    path = "../private/**"
    first = {"config_name": "default", "data_files": "data/*"}
    named = {
        "string": {"data_files": path},
        "list": {"data_files": ["a.csv", path]},
        "split": {"data_files": [{"split": "train", "path": [path]}]},
        "data_dir": {"data_dir": "../private"},
        "second": {"data_files": path},
    }[where]
    configs = [first, {"config_name": "b", **named}] if where == "second" else [{"config_name": "default", **named}]
    text = card(configs) if name.endswith(".md") else yaml.safe_dump({"configs": configs})
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"^dataset_name: ") as caught:
        check_cards(str(tmp_path), False)
    assert_names(caught.value, name, "../private", "allow_outside_paths")
    assert check_cards(str(tmp_path), True)


@pytest.mark.parametrize("load", [load_splits, stream_splits])
def test_card_of_a_folder_with_a_configuration_is_checked(tmp_path, load):
    for folder in ("set/data", "private"):
        for split in ("train", "validation"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows_of()).to_parquet(tmp_path / folder / f"{split}.parquet")
    files = [{"split": split, "path": f"../private/{split}.parquet"} for split in ("train", "validation")]
    (tmp_path / "set/README.md").write_text(card([{"config_name": "mine", "data_files": files}]))
    with pytest.raises(DataError, match=r"README.md refers to files outside"):
        load(str(tmp_path / "set"), dataset_config_name="mine")


def test_card_on_the_hub_is_checked(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        for name, path in (("bad", "/home/user/private/**"), ("good", "data/*")):
            text = card([{"config_name": "default", "data_files": path}])
            hub.create(f"user/{name}", "dataset", {"README.md": text.encode()})
        hub.create("user/none", "dataset", {"a.csv": b"x"})
        assert check_cards("user/good", False)
        assert not check_cards("user/none", False)
        assert not check_cards("user/nowhere", False)
        with pytest.raises(DataError, match=r"README.md of user/bad .*/home/user/private"):
            check_cards("user/bad", False)


PRIVATE = "configs: [{config_name: default, data_files: ../private/**}]"
CARD_TEXTS = {
    "comment": f"---\n# --- files ---\n{PRIVATE}\n---\n",
    "value": f"---\npretty_name: a --- b\n{PRIVATE}\n---\n",
    "long rule": f"---\n#-\n#----\n{PRIVATE}\n---\ntext",
    "CRLF": f"---\r\n# ---\r\n{PRIVATE}\r\n---\r\n",
    "CR": f"---\r# ---\r{PRIVATE}\r---\r\n",
    "byte order mark": f"\ufeff---\n# ---\n{PRIVATE}\n---\n",
    "no final line break": f"---\n{PRIVATE}\n---",
    "spaces": f"\n  ---\n{PRIVATE}\n---  \n",
    "two blocks": f"---\n{PRIVATE}\n---\n---\nlicense: mit\n---\n",
}


@pytest.mark.parametrize("text", CARD_TEXTS.values(), ids=CARD_TEXTS)
def test_check_cards_reads_the_metadata_that_datasets_reads(tmp_path, text):
    (tmp_path / "README.md").write_text(text, newline="")
    if not DatasetCard.load(tmp_path / "README.md").data.get("configs"):
        pytest.skip("not read by this huggingface_hub")  # a byte order mark, by 1.31
    with pytest.raises(DataError, match=r"^dataset_name: ") as caught:
        check_cards(str(tmp_path), False)
    assert_names(caught.value, "../private")


@pytest.mark.parametrize(
    "text", ["", "text\n", f"text\n---\n{PRIVATE}\n---\n", f"---\nlicense: mit\n---\n---\n{PRIVATE}\n---\n"]
)
def test_check_cards_ignores_text_after_the_metadata(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert not check_cards(str(tmp_path), False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "---\na: [\n---\n"),
        ("README.md", "---\n- a\n---\n"),
        ("README.md", "---\na: !!bool x\n---\n"),
        ("README.md", b"---\na: \xff\n---\n"),
        (".huggingface.yaml", f"[[configs, {PRIVATE.partition(': ')[2]}]]"),
    ],
)
def test_check_cards_with_a_card_that_cannot_be_parsed_raises(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"^dataset_name: ") as caught:
        check_cards(str(tmp_path), True)
    assert_names(caught.value, name)


def test_card_whose_aliases_multiply_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\nconfigs: *a11\n---\n")
    with pytest.raises(DataError, match=r"^dataset_name: .*README.md"):
        check_cards(str(tmp_path), False)


@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset_whose_files_are_outside_is_refused(tmp_path, splits):
    saved = datasets.Dataset.from_list(rows_of())
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(tmp_path / "set")
    saved.save_to_disk(tmp_path / "private")
    state = next((tmp_path / "set").rglob("state.json"))
    values = json.loads(state.read_text())
    arrow = next((tmp_path / "private").glob("*.arrow"))
    for name in (str(arrow), f"{'../' * (1 + splits)}private/{arrow.name}"):
        values["_data_files"] = [{"filename": name}]
        state.write_text(json.dumps(values))
        with pytest.raises(DataError, match=r"^dataset_name: .*state.json"):
            load_splits(str(tmp_path / "set"), test_split=None)
    values["splits"] = ["train"]  # only dataset_dict.json has it
    state.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"^dataset_name: .*state.json"):
        load_splits(str(tmp_path / "set"), test_split=None)
    splits = load_splits(str(tmp_path / "set"), test_split=None, allow_outside_paths=True)
    assert len(splits.train) + len(splits.validation) == 20


@pytest.mark.parametrize("is_absolute", [False, True])
def test_saved_dataset_whose_splits_are_outside_is_refused(tmp_path, is_absolute):
    saved = datasets.Dataset.from_list(rows_of())
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "set")
    saved.save_to_disk(tmp_path / "private")
    outside = str(tmp_path / "private") if is_absolute else "../private"
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": [outside]}))
    with pytest.raises(DataError, match=r"^dataset_name: .*dataset_dict\.json") as caught:
        load_splits(str(tmp_path / "set"), train_split=outside, test_split=None)
    assert_names(caught.value, outside, "allow_outside_paths")


@pytest.mark.parametrize("is_folder", [False, True])
def test_saved_dataset_with_a_link_to_files_outside_is_refused(tmp_path, is_folder):
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows_of())})
    saved.save_to_disk(tmp_path / "set")
    linked = tmp_path / "set/train"
    linked = linked if is_folder else next(linked.glob("*.arrow"))
    shutil.move(linked, tmp_path / "private")
    linked.symlink_to(tmp_path / "private")
    with pytest.raises(DataError, match=r"^dataset_name: ") as caught:
        load_splits(str(tmp_path / "set"), test_split=None)
    assert_names(caught.value, str(linked), "allow_outside_paths")
    splits = load_splits(str(tmp_path / "set"), test_split=None, allow_outside_paths=True)
    assert len(splits.train) + len(splits.validation) == 20


def test_saved_dataset_in_the_cache_of_the_hub_is_read(tmp_path):
    """Files of a snapshot are links to those in `blobs` beside `snapshots`."""
    snapshot = tmp_path / "datasets--user--set/snapshots/0123abcd"
    blobs = tmp_path / "datasets--user--set/blobs"
    blobs.mkdir(parents=True)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows_of())}).save_to_disk(snapshot)
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    splits = load_splits(str(snapshot), test_split=None)
    assert len(splits.train) + len(splits.validation) == 20


# ---- Empty bytes beside a path ----


def test_path_beside_empty_bytes_is_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(image_bytes())
    encoded = {"bytes": b"", "path": str(tmp_path / "secret.png")}
    with pytest.raises(DataError, match="row 3"):
        decode(encoded, "train", 3)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    dataset = datasets.Dataset(pa.table({"image": pa.array([encoded], kind)}))
    dataset = as_images(dataset, "image", "train")
    with pytest.raises(DataError, match="row 0"):
        decode(dataset[0]["image"], "train", 0)


def test_saved_dataset_with_a_pipe_is_refused(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows_of())}).save_to_disk(tmp_path / "set")
    state = tmp_path / "set/train/state.json"
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(DataError, match=r"^dataset_name: .*state\.json"):
        load_splits(str(tmp_path / "set"), test_split=None)


# `datasets` reads a file in place of bytes that have its path.


@pytest.mark.parametrize("load", [load_splits, stream_splits])
@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize("content", [image_bytes(1), b""])
def test_member_of_a_shard_named_like_a_file_is_not_that_file(tmp_path, monkeypatch, load, is_absolute, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.png").write_bytes(image_bytes(0, size=33))
    samples = [{"png": image_bytes(n), "cls": str(n % 2).encode()} for n in range(20)]
    for split in ("train", "validation"):
        write_shard(tmp_path / f"set/{split}.tar", samples)
        with tarfile.open(tmp_path / f"set/{split}.tar", "a") as shard:
            for extension, data in (("png", content), ("cls", b"1")):
                info = tarfile.TarInfo(f"{tmp_path}/secret.{extension}" if is_absolute else f"secret.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    splits = load(str(tmp_path / "set"), class_names=["a", "b"], test_split=None)
    for role in ("train", "validation"):
        image = list(splits[role])[-1]["image"]
        assert image["path"].endswith("secret.png")
        assert image["bytes"] == content


@pytest.mark.parametrize("load", [load_splits, stream_splits])
@pytest.mark.parametrize("through_datasets", [True, False])
def test_row_with_the_path_of_a_file_has_its_own_bytes(tmp_path, load, through_datasets):
    (tmp_path / "secret.png").write_bytes(image_bytes(0, size=33))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": image_bytes(n), "path": str(tmp_path / "secret.png")} for n in range(20)]
    table = pa.table({"image": images, "label": [n % 2 for n in range(20)]})
    dataset = datasets.Dataset(table.cast(features.arrow_schema), datasets.DatasetInfo(features=features))
    for split in ("train", "validation"):
        dataset.to_parquet(tmp_path / "set" / f"{split}.parquet")
    options = {"test_split": None}
    if through_datasets:
        files = [{"split": split, "path": f"{split}.parquet"} for split in ("train", "validation")]
        (tmp_path / "set/README.md").write_text(card([{"config_name": "mine", "data_files": files}]))
        options["dataset_config_name"] = "mine"
    splits = load(str(tmp_path / "set"), **options)
    for role in ("train", "validation"):
        assert [row["image"]["bytes"] for row in splits[role]] == [image["bytes"] for image in images]


# ---- Size ----


def test_sparse_file_of_many_bytes_is_refused_unread(tmp_path):
    write_images(tmp_path, {"a": 10, "b": 10})
    with (tmp_path / "a/huge.png").open("wb") as file:
        file.write(image_bytes())
        file.truncate(DEFAULT_LIMITS.max_bytes + 1)
    with pytest.raises(DataError, match=r"huge.png.*bytes"):
        decode({"bytes": None, "path": str(tmp_path / "a/huge.png")}, "train", 0)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_member_of_many_bytes_is_refused_unread(tmp_path, kind, monkeypatch):
    import zipfile

    monkeypatch.setattr("hfvit.data.archives.DEFAULT_LIMITS", type(DEFAULT_LIMITS)(max_bytes=100_000))
    content = {f"{label}/{n}.png": image_bytes(n) for n in range(10) for label in "ab"} | {"a/x.png": bytes(100_001)}
    path = tmp_path / f"train.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"train\.(zip|tar) .*100,000 bytes"):
        load_splits(str(path), test_split=None)
