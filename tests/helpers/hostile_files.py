"""Invalid and malicious files, a function for each case of test_bad_input.py.

`CANARY` is the path of a file that malicious code would create.
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
    """Write a file with this content."""

    def make(place):
        content = text.encode() if isinstance(text, str) else text
        path = place.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.replace(CANARY.encode(), str(place.canary).encode()))

    return make


def recipe_with(more: str):
    """Write the micro recipe with `more` lines."""
    return lambda place: text_file(
        "recipe.yaml", f"{MICRO_RECIPE}dataset_name: {place.colors}\noutput_dir: {place.tmp / 'out'}\n{more}"
    )(place)


def billion_laughs() -> str:
    lines = ["model_args:", "  a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, "crop_scale: *a11\n"])


# Data sets


def image_folder(damage=None, rows: int = 12):
    """Write class folders in `data`, then call `damage(folder, place)`."""

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
    """Write class folders, and replace one image by `content`."""
    return image_folder(lambda folder, place: (folder / name).write_bytes(content))


def truncated_image() -> bytes:
    buffer = io.BytesIO()
    colored_image(0, np.random.default_rng(0), 64).save(buffer, "PNG")
    return buffer.getvalue()[:900]


def bomb(side: int = 15_000) -> bytes:
    """Return a PNG of `side` x `side` pixels in 30 kB, for which Pillow only warns."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    row = b"\0" * (side // 8 + 1)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def archive(kind: str):
    """Write `data/train.zip` or `.tar.gz` with a member outside the folder."""

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
    """Write class folders with a metadata.csv that has a path outside the folder."""

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
    """Write Parquet splits in `data` with these labels."""

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
    """Write a data set with a loading script, which old versions of datasets ran."""
    (place.tmp / "data").mkdir()
    (place.tmp / "data" / "data.py").write_text(f"open({str(place.canary)!r}, 'w')\n")


def damaged_parquet(place):
    colored_split(12, 0).to_parquet(place.tmp / "data" / "data" / "train-00000-of-00001.parquet")
    path = place.tmp / "data" / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:500])


# Checkpoints


def checkpoint(damage):
    """Copy the run to `model`, then call `damage(folder, place)`."""

    def make(place):
        shutil.copytree(place.run, place.tmp / "model")
        damage(place.tmp / "model", place)

    return make


def rewritten(name: str, content: str | bytes):
    """Replace the content of a file of the checkpoint."""
    return checkpoint(lambda folder, place: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    ))  # fmt: skip


def with_values(name: str, **values):
    """Change values in a JSON file of the checkpoint; None removes a key."""

    def damage(folder, place):
        held = (json.loads((folder / name).read_text()) if (folder / name).exists() else {}) | values
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return checkpoint(damage)


def cut(name: str, keep: float):
    """Truncate a file of the checkpoint to the fraction `keep`."""

    def damage(folder, place):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return checkpoint(damage)


def other_weights(change):
    """Apply `change` to the tensors of the checkpoint."""

    def damage(folder, place):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return checkpoint(damage)


class Payload:
    """Object whose unpickling creates the canary."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(name: str, alone: bool = True):
    """Replace the weights of the checkpoint by a pickle."""

    def damage(folder, place):
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(place.canary)))

    return checkpoint(damage)


def remote_code(folder, place, names=("config.json", "preprocessor_config.json")):
    """Write code to the folder, and refer to it in the `auto_map` of these files."""
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
    """Copy the export to `onnx`, then call `damage(file, place)`."""

    def make(place):
        shutil.copytree(place.graphs, place.tmp / "onnx")
        damage(place.tmp / "onnx" / "model.onnx", place)

    return make


def graph_of(source, nodes, target):
    """Replace the graph of the export."""

    def damage(file, place):
        graph = helper.make_graph(nodes, "other", [source], [target])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)

    return graph_folder(damage)


def pixel_values(*shape):
    return helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)


def outside_data(location: str):
    """Set the external data of the export to another file of this machine."""

    def damage(file, place):
        model = onnx.load(file)
        tensor = next(t for t in model.graph.initializer if t.name == "weights")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "36")):
            tensor.external_data.add(key=key, value=value)
        file.write_bytes(model.SerializeToString())

    return graph_folder(damage)
