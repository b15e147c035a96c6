"""Wrong and hostile files: each function writes what a row of test_bad_input.py is about.

`CANARY` stands for the path of a file that exists only if something here was run as code.
"""

import csv
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import onnx
from helpers.images import LABELS, colored_image, colored_split
from helpers.recipes import MICRO_RECIPE
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

CANARY = "@canary@"


def text_file(name: str, text: str | bytes):
    """A file as it is."""

    def make(place):
        content = text.encode() if isinstance(text, str) else text
        path = place.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace(CANARY.encode(), str(place.canary).encode()))

    return make


def recipe_with(more: str):
    """The micro recipe on the generated colors, with `more` lines."""
    return lambda place: text_file(
        "recipe.yaml", f"{MICRO_RECIPE}dataset_name: {place.colors}\noutput_dir: {place.tmp / 'out'}\n{more}"
    )(place)


def billion_laughs() -> str:
    lines = ["model_args:", "  a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, "crop_scale: *a11\n"])


# Data sets


def image_folder(damage=None, rows: int = 12):
    """train/ and test/ of an imagefolder in `data`; `damage(folder, place)` then spoils it."""

    def make(place):
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for row in range(rows):
                path = place.tmp / "data" / split / LABELS[row % 3] / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                colored_image(row % 3, rng).save(path)
        if damage:
            damage(place.tmp / "data", place)

    return make


def replaced(content: bytes, name: str = "train/red/3.png"):
    """An imagefolder one of whose pictures holds `content`."""
    return image_folder(lambda folder, place: (folder / name).write_bytes(content))


def truncated_image() -> bytes:
    buffer = io.BytesIO()
    colored_image(0, np.random.default_rng(0), 64).save(buffer, "PNG")
    return buffer.getvalue()[:900]


def bomb(side: int = 15_000) -> bytes:
    """A PNG of `side` x `side` pixels in 30 kB; Pillow itself only warns of so many."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    row = b"\0" * (side // 8 + 1)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def archive(kind: str):
    """An image archive, `data/train.zip` or `.tar.gz`, with a member that would land outside the folder."""

    def make(place):
        (place.tmp / "data").mkdir()
        buffer = io.BytesIO()
        colored_image(0, np.random.default_rng(0)).save(buffer, "PNG")
        inside = ["train/red/0.png", "train/blue/1.png"]
        outside = [f"../../{place.canary.name}", str(place.canary)]
        if kind == "zip":
            with zipfile.ZipFile(place.tmp / "data" / "train.zip", "w") as file:
                for name in inside + outside:
                    file.writestr(name, buffer.getvalue())
        else:
            with tarfile.open(place.tmp / "data" / "train.tar.gz", "w:gz") as file:
                for name in inside + outside:
                    info = tarfile.TarInfo(name)
                    info.size = len(buffer.getvalue())
                    file.addfile(info, io.BytesIO(buffer.getvalue()))
                link = tarfile.TarInfo("train/red/link.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                file.addfile(link)

    return make


def metadata(file_name: str):
    """An imagefolder whose metadata.csv names a file that is not in it."""

    def make(place):
        colored_image(0, np.random.default_rng(0)).save(place.tmp / "secret.png")
        folder = place.tmp / "data" / "train"
        folder.mkdir(parents=True)
        colored_image(1, np.random.default_rng(0)).save(folder / "a.png")
        with (folder / "metadata.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([("file_name", "label"), ("a.png", "red"), (file_name.format(tmp=place.tmp), "green")])

    return make


def table(train=None, test=None, features=None, **columns):
    """Parquet splits in `data`; `train` and `test` are labels."""

    def make(place):
        rng = np.random.default_rng(0)
        kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)} | (features or {})
        for name, labels in (("train", train), ("test", test)):
            if labels is None:
                continue
            values = {"img": [colored_image(0, rng) for _ in labels], "label": labels}
            values |= {key: [value] * len(labels) for key, value in columns.items()}
            split = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
            split.to_parquet(place.tmp / "data" / "data" / f"{name}-00000-of-00001.parquet")

    return make


def script(place):
    """A data set with a loading script, which datasets once ran."""
    (place.tmp / "data").mkdir()
    (place.tmp / "data" / "data.py").write_text(f"open({str(place.canary)!r}, 'w')\n")


def damaged_parquet(place):
    colored_split(12, 0).to_parquet(place.tmp / "data" / "data" / "train-00000-of-00001.parquet")
    path = place.tmp / "data" / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:500])


# Checkpoints


def checkpoint(damage):
    """A copy of a run's folder, `model`, spoilt by `damage(folder, place)`."""

    def make(place):
        shutil.copytree(place.run, place.tmp / "model")
        damage(place.tmp / "model", place)

    return make


def rewritten(name: str, content: str | bytes):
    """A checkpoint with another content in one of its files."""
    return checkpoint(lambda folder, place: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    ))  # fmt: skip


def with_values(name: str, **values):
    """A checkpoint with other values in one of its JSON files; None takes a key out."""

    def damage(folder, place):
        held = (json.loads((folder / name).read_text()) if (folder / name).exists() else {}) | values
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return checkpoint(damage)


def cut(name: str, keep: float):
    """A checkpoint of whose file `name` the first share `keep` is left."""

    def damage(folder, place):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return checkpoint(damage)


def other_weights(change):
    """A checkpoint whose tensors went through `change`."""

    def damage(folder, place):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return checkpoint(damage)


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(name: str, alone: bool = True):
    """A checkpoint with a pickle in place of its weights."""

    def damage(folder, place):
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(place.canary)))

    return checkpoint(damage)


def remote_code(folder, place, names=("config.json", "preprocessor_config.json")):
    """Code in the folder, which the `auto_map` of these files names, under a model type that nobody knows."""
    code = f"from pathlib import Path\nPath({str(place.canary)!r}).touch()\n"
    code += "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    (folder / "evil.py").write_text(code)
    for name in names:
        path = folder / name
        held = json.loads(path.read_text()) if path.exists() else {}
        auto = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
        held |= {"model_type": "evil", "image_processor_type": "Evil", "auto_map": dict.fromkeys(auto, "evil.Evil")}
        path.write_text(json.dumps(held))


# ONNX files and engines


def graph_folder(damage):
    """A copy of an export's folder, `onnx`, spoilt by `damage(file, place)`."""

    def make(place):
        shutil.copytree(place.graphs, place.tmp / "onnx")
        damage(place.tmp / "onnx" / "model.onnx", place)

    return make


def graph_of(source, nodes, target):
    """An export whose graph is another one."""

    def damage(file, place):
        graph = helper.make_graph(nodes, "other", [source], [target])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)

    return graph_folder(damage)


def pixel_values(*shape):
    return helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)


def outside_data(location: str):
    """An export whose weights are said to lie in another file of this machine."""

    def damage(file, place):
        model = onnx.load(file)
        tensor = next(t for t in model.graph.initializer if t.name == "weights")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "36")):
            tensor.external_data.add(key=key, value=value)
        file.write_bytes(model.SerializeToString())

    return graph_folder(damage)
