"""Cases of bad_rows.py with invalid data sets, checkpoints, graphs and images."""

from helpers.hostile_files import (
    archive,
    billion_laughs,
    bomb,
    checkpoint,
    cut,
    damaged_parquet,
    graph_folder,
    graph_of,
    image_folder,
    metadata,
    other_weights,
    outside_data,
    pickled,
    pixel_values,
    remote_code,
    replaced,
    rewritten,
    script,
    table,
    text_file,
    truncated_image,
    with_values,
)
from helpers.onnx_graphs import write_graph
from onnx import TensorProto, helper

ON_DATA = "hfvit train {recipe} --dataset_name {tmp}/data"
FROM_MODEL = "hfvit train {tuning} --model_name_or_path {tmp}/model"
PREDICT = "hfvit predict {tmp}/model {image}"
PUSH = "hfvit push {tmp}/model user/x --dry_run"
VALIDATE = "hfvit validate {tmp}/model"
WITH_ONNX = "hfvit predict {tmp}/onnx {image}"
SCORES = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 7])
FLAT = [helper.make_node("Flatten", ["pixel_values"], ["scores"])]

DATA_SETS = {
    "a missing folder": (None, ON_DATA, ("dataset_name:", "{tmp}/data")),
    "an empty folder": (
        lambda place: (place.tmp / "data").mkdir(),
        ON_DATA,
        ("dataset_name:", "{tmp}/data"),
    ),
    "a file": (text_file("data", "x"), ON_DATA, ("dataset_name:", "{tmp}/data")),
    "a loading script": (script, ON_DATA, ("{tmp}/data", "'train'", "data.py")),
    "a missing split": (
        table([0, 1, 2] * 8),
        f"{ON_DATA} --test_split tost",
        ("test_split:", "{tmp}/data", "'tost'", "train"),
    ),
    "an empty split": (table([0, 1, 2] * 8, []), ON_DATA, ("{tmp}/data", "'test'")),
    "a missing column": (
        table([0, 1, 2] * 8, [0, 1, 2]),
        f"{ON_DATA} --image_column image",
        ("image_column:", "'image'", "img, label"),
    ),
    "a column of another kind": (
        table([0, 1, 2] * 8, [0, 1, 2]),
        f"{ON_DATA} --image_column label",
        ("image_column:", "'label'", "'train'"),
    ),
    "labels out of range": (table([0, 1, 2] * 8, [0, 1, -1]), ON_DATA, ("'test'", "2", "-1", "3")),
    "one class": (table([1] * 24, [0, 1, 2]), ON_DATA, ("train_split:", "'train'")),
    "a missing label": (table([0, 1, None] * 8, [0, 1, 2]), ON_DATA, ("'train'", "2")),
    "one image per class": (
        table([0, 1, 2], [0, 1, 2]),
        ON_DATA,
        ("validation_fraction:", "'train'", "3"),
    ),
    "a truncated Parquet file": (
        damaged_parquet,
        ON_DATA,
        ("dataset_name:", "{tmp}/data", "train-00000", "ArrowInvalid"),
    ),
    "an image that is text": (
        replaced(b"not an image"),
        ON_DATA,
        ("'train'", "{tmp}/data/train/red/3.png", "UnidentifiedImageError"),
    ),
    "a truncated image": (
        replaced(truncated_image()),
        ON_DATA,
        ("'train'", "{tmp}/data/train/red/3.png", "OSError"),
    ),
    "a decompression bomb": (
        replaced(bomb()),
        ON_DATA,
        ("'train'", "{tmp}/data/train/red/3.png", "limit"),
    ),
    "an image that links to /etc/passwd": (
        image_folder(lambda folder, place: (folder / "train/red/link.png").symlink_to("/etc/passwd")),
        ON_DATA,
        ("'train'", "{tmp}/data/train/red/link.png", "UnidentifiedImageError"),
    ),
    "a zip with a path outside its folder": (
        archive("zip"),
        ON_DATA,
        ("dataset_name:", "{tmp}/data/train.zip", "../../canary"),
    ),
    "a tar with a path outside its folder": (
        archive("tar"),
        ON_DATA,
        ("dataset_name:", "{tmp}/data/train.tar.gz", "../../canary"),
    ),
    "a file name outside the folder": (
        metadata("../../secret.png"),
        ON_DATA,
        ("{tmp}/data/train", "'train'", "row 1", "../../secret.png"),
    ),
    "an absolute file name": (
        metadata("{tmp}/secret.png"),
        ON_DATA,
        ("{tmp}/data/train", "'train'", "row 1", "{tmp}/secret.png"),
    ),
    "a name of a scheme": (
        metadata("file://{tmp}/secret.png"),
        ON_DATA,
        ("{tmp}/data/train", "'train'", "row 1", "file://{tmp}/secret.png"),
    ),
}


CHECKPOINTS = {
    "weights cut short": (cut("model.safetensors", 0.7), FROM_MODEL, ("{tmp}/model", "header")),
    "weights that are empty": (rewritten("model.safetensors", b""), FROM_MODEL, ("{tmp}/model", "header")),
    "a header without end": (rewritten("model.safetensors", b"\xff" * 64), FROM_MODEL, ("{tmp}/model", "header")),
    "a header of text": (
        rewritten("model.safetensors", b"\x05" + b"\0" * 7 + b"hello"),
        FROM_MODEL,
        ("{tmp}/model", "header"),
    ),
    "a pickle named safetensors": (pickled("model.safetensors", alone=False), FROM_MODEL, ("{tmp}/model", "header")),
    "a pickle named pytorch_model": (pickled("pytorch_model.bin"), FROM_MODEL, ("{tmp}/model", "safetensors")),
    "weights of another shape": (
        other_weights(lambda state: {name: value[..., :8].contiguous() for name, value in state.items()}),
        FROM_MODEL,
        ("{tmp}/model", "vit_tiny_patch16_224", "30", "blocks.0.attn.proj.bias", "model_args"),
    ),
    "weights of another model": (
        other_weights(lambda state: {f"encoder.{name}": value for name, value in state.items()}),
        FROM_MODEL,
        ("{tmp}/model", "vit_tiny_patch16_224", "32", "blocks.0.attn.proj.bias", "model_args"),
    ),
    "no weights": (
        checkpoint(lambda folder, _: (folder / "model.safetensors").unlink()),
        FROM_MODEL,
        ("{tmp}/model", "model.safetensors"),
    ),
    "a configuration that is no JSON": (
        rewritten("config.json", "{"),
        FROM_MODEL,
        ("model_name_or_path:", "{tmp}/model", "config.json"),
    ),
    "a configuration that is a list": (
        rewritten("config.json", "[]"),
        FROM_MODEL,
        ("model_name_or_path:", "{tmp}/model", "config.json"),
    ),
    "a configuration of another kind": (
        with_values("config.json", model_type="bert", architecture=None),
        FROM_MODEL,
        ("model_name_or_path:", "{tmp}/model", "'bert'"),
    ),
    "a configuration of no timm model": (
        with_values("config.json", architecture="vit_none"),
        FROM_MODEL,
        ("{tmp}/model", "'vit_none'"),
    ),
    "code in a configuration": (checkpoint(remote_code), FROM_MODEL, ("model_name_or_path:", "{tmp}/model", "'evil'")),
    "code in a configuration, to predict": (
        checkpoint(remote_code),
        PREDICT,
        ("{tmp}/model", "config.json", "trust_remote_code=True"),
    ),
    "too few names": (
        with_values("config.json", label_names=["a"]),
        PREDICT,
        ("{tmp}/model", "config.json", "label_names", "1", "3"),
    ),
    "too many names": (
        with_values("config.json", label_names=list("abcdefgh")),
        PREDICT,
        ("{tmp}/model", "config.json", "label_names", "8", "3"),
    ),
    "names that are a number": (
        with_values("config.json", label_names=3),
        PREDICT,
        ("{tmp}/model", "config.json", "'int'"),
    ),
    "weights cut short, to predict": (cut("model.safetensors", 0.5), PREDICT, ("{tmp}/model", "header")),
    "a pickle, to predict": (pickled("pytorch_model.bin"), PREDICT, ("{tmp}/model", "safetensors")),
    "a pickle, to export": (
        pickled("pytorch_model.bin"),
        "onnx --model {tmp}/model {tmp}/out",
        ("{tmp}/model", "safetensors"),
    ),
    "weights that are a pickle, to validate": (
        pickled("model.safetensors", alone=False),
        "hfvit validate {tmp}/model",
        ("{tmp}/model", "header"),
    ),
    "a recipe that is half, to validate": (
        rewritten("recipe.yaml", "seed: ["),
        VALIDATE,
        ("{tmp}/model/recipe.yaml", "line 1, column 8"),
    ),
    "a recipe with code, to validate": (
        checkpoint(
            lambda folder, place: (folder / "recipe.yaml").write_text(
                f"dataset_name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path "
                f"['{place.canary}']]\n"
            )
        ),
        "hfvit validate {tmp}/model",
        ("{tmp}/model/recipe.yaml", "pathlib.Path.touch"),
    ),
    "a recipe of laughs, to validate": (
        rewritten("recipe.yaml", billion_laughs()),
        "hfvit validate {tmp}/model",
        ("{tmp}/model/recipe.yaml", "*name"),
    ),
    "facts that are half, to validate": (
        rewritten("run.json", "{"),
        VALIDATE,
        ("{tmp}/model/run.json", "line 1 column 2"),
    ),
    "facts that are half, to push": (
        rewritten("run.json", "{"),
        "hfvit push {tmp}/model user/x --dry_run",
        ("{tmp}/model/run.json", "line 1 column 2"),
    ),
    "facts that are a list, to push": (
        rewritten("run.json", "[1]"),
        "hfvit push {tmp}/model user/x --dry_run",
        ("{tmp}/model/run.json", "JSON"),
    ),
    "facts that say nothing, to push": (
        rewritten("run.json", '{"model": {}, "metrics": 3}'),
        "hfvit push {tmp}/model user/x --dry_run",
        ("{tmp}/model/run.json", "model.architecture"),
    ),
    "a state that is half, to push": (
        rewritten("trainer_state.json", "{"),
        "hfvit push {tmp}/model user/x --dry_run",
        ("{tmp}/model/trainer_state.json", "line 1 column 2"),
    ),
    "facts that say nothing, to verify": (
        rewritten("run.json", '{"model": {}, "metrics": {"test": {"accuracy": 1}}}'),
        "hfvit verify {tmp}/model",
        ("{tmp}/model/run.json", "model.architecture"),
    ),
    "facts that are half, to verify": (
        rewritten("run.json", '{"me'),
        "hfvit verify {tmp}/model",
        ("{tmp}/model/run.json", "line 1 column 2"),
    ),
    "a card of bytes, to push": (
        rewritten("README.md", bytes(range(256))),
        "hfvit push {tmp}/model user/x --dry_run",
        ("{tmp}/model/README.md", "0x80", "128"),
    ),
}


GRAPHS = {
    "a graph cut short": (
        graph_folder(lambda file, _: file.write_bytes(file.read_bytes()[:99])),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "INVALID_PROTOBUF"),
    ),
    "an empty graph": (
        graph_folder(lambda file, _: file.write_bytes(b"")),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "INVALID_ARGUMENT"),
    ),
    "a graph of noise": (
        graph_folder(lambda file, _: file.write_bytes(bytes(range(256)) * 40)),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "INVALID_PROTOBUF"),
    ),
    "a graph that is a folder": (
        graph_folder(lambda file, _: (file.unlink(), file.mkdir())),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "INVALID_PROTOBUF"),
    ),
    "weights in another file": (
        outside_data("../../../../../etc/passwd"),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "ONNXRuntimeError", "weights"),
    ),
    "weights with an absolute path": (
        outside_data("/etc/passwd"),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "ONNXRuntimeError", "weights"),
    ),
    "a graph without an image input": (
        graph_of(pixel_values(1, 7), FLAT, SCORES),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "pixel_values", "[1, 7]"),
    ),
    "a graph of other classes": (
        graph_of(pixel_values(1, 7, 1, 1), FLAT, SCORES),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "[1, 7]", "config.json", "3"),
    ),
    "a graph with another input size": (
        graph_folder(lambda file, _: write_graph(file, size=12)),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "(3, 12, 12)", "(3, 16, 16)"),
    ),
    "a graph without names": (
        graph_folder(lambda file, _: (file.parent / "config.json").unlink()),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "config.json"),
    ),
    "a graph without preprocessing": (
        graph_folder(lambda file, _: (file.parent / "preprocessor_config.json").unlink()),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "preprocessor_config.json"),
    ),
    "code in a processor": (
        graph_folder(lambda file, place: remote_code(file.parent, place, ("preprocessor_config.json",))),
        WITH_ONNX,
        ("{tmp}/onnx/model.onnx", "preprocessor_config.json", "trust_remote_code=True"),
    ),
    "a truncated export.json": (
        graph_folder(lambda file, _: (file.parent / "export.json").write_text("{")),
        "hfvit validate {tmp}/onnx --dataset_name {colors} --split test",
        ("{tmp}/onnx/export.json", "line 1 column 2"),
    ),
    "a graph cut short, to build": (
        graph_folder(lambda file, _: file.write_bytes(file.read_bytes()[:99])),
        "tensorrt --model {tmp}/onnx/model.onnx {tmp}/trt",
        ("{tmp}/onnx/model.onnx", "'onnx.ModelProto'"),
    ),
    "weights in another file, to build": (
        outside_data("../../../../../etc/passwd"),
        "tensorrt --model {tmp}/onnx/model.onnx {tmp}/trt",
        ("{tmp}/onnx/model.onnx", "weights", "'../../../../../etc/passwd'"),
    ),
    "an engine.json without sha256": (
        text_file("trt/engine.json", '{"engine": 1}'),
        "hfvit predict {tmp}/trt {image}",
        ("{tmp}/trt/engine.json", "sha256"),
    ),
    "a truncated engine.json": (
        text_file("trt/engine.json", '{"eng'),
        "hfvit predict {tmp}/trt {image}",
        ("{tmp}/trt/engine.json", "line 1 column 2"),
    ),
    "an engine without config.json": (
        text_file("trt/model.engine", "x"),
        "hfvit predict {tmp}/trt/model.engine {image}",
        ("{tmp}/trt/model.engine", "config.json"),
    ),
    "a file that is not an image": (
        text_file("a.png", "no"),
        "hfvit predict {graphs} {tmp}/a.png",
        ("{tmp}/a.png", "UnidentifiedImageError"),
    ),
    "a decompression bomb": (
        text_file("a.png", bomb()),
        "hfvit predict {graphs} {tmp}/a.png",
        ("{tmp}/a.png", "limit"),
    ),
    "an unreachable URL": (
        None,
        "hfvit predict {graphs} http://127.0.0.1:9/a.png",
        ("http://127.0.0.1:9/a.png", "URLError"),
    ),
    "a file URL": (None, "hfvit predict {graphs} file:///etc/passwd", "file:///etc/passwd"),
}
