"""What is read and cannot be: data sets, checkpoints, graphs and pictures. Rows of bad_rows.py."""

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
    truncated_picture,
    with_values,
)
from helpers.onnx_graphs import write_graph
from onnx import TensorProto, helper

ON_DATA = "hfvit train {recipe} --dataset_name {tmp}/data"
FROM_MODEL = "hfvit train {tuning} --model_name_or_path {tmp}/model"
PREDICT = "hfvit predict {tmp}/model {picture}"
PUSH = "hfvit push {tmp}/model user/x --dry-run"
VALIDATE = "hfvit validate {tmp}/model"
WITH_ONNX = "hfvit predict {tmp}/onnx {picture}"
SCORES = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 7])
FLAT = [helper.make_node("Flatten", ["pixel_values"], ["scores"])]

DATA_SETS = {
    "a missing folder": (None, ON_DATA, "there is no folder"),
    "an empty folder": (lambda place: (place.tmp / "data").mkdir(), ON_DATA, "cannot be loaded"),
    "a file": (text_file("data", "x"), ON_DATA, "is a file, where a folder or a Hub id is expected"),
    "a loading script": (script, ON_DATA, "cannot be loaded"),
    "a missing split": (table([0, 1, 2] * 8), ON_DATA, "has no split 'test'; it has train"),
    "an empty split": (table([0, 1, 2] * 8, []), ON_DATA, "split 'test' is empty"),
    "a missing column": (
        table([0, 1, 2] * 8, [0, 1, 2]),
        f"{ON_DATA} --image_column image",
        "has no column 'image'; it has img",
    ),
    "a column of another kind": (
        table([0, 1, 2] * 8, [0, 1, 2]),
        f"{ON_DATA} --image_column label",
        "does not hold images",
    ),
    "labels out of range": (table([0, 1, 2] * 8, [0, 1, -1]), ON_DATA, "row 2: label -1 is outside the 3 classes"),
    "one class": (table([1] * 24, [0, 1, 2]), ON_DATA, "holds one class only"),
    "a label that is missing": (table([0, 1, None] * 8, [0, 1, 2]), ON_DATA, "row 2: the label is missing"),
    "fewer images than a batch": (table([0, 1, 2] * 2, [0, 1, 2]), ON_DATA, "cannot be held out"),
    "a truncated table": (damaged_parquet, ON_DATA, "cannot be loaded"),
    "a picture that is text": (replaced(b"not a picture"), ON_DATA, "not a readable picture"),
    "a picture that is empty": (replaced(b""), ON_DATA, "red/3.png"),
    "a picture cut short": (replaced(truncated_picture()), ON_DATA, "not a readable picture"),
    "a decompression bomb": (replaced(bomb()), ON_DATA, "DecompressionBomb"),
    "a picture that is a pipe to a password": (
        image_folder(lambda folder, place: (folder / "train/red/link.png").symlink_to("/etc/passwd")),
        ON_DATA,
        "not a readable picture",
    ),
    "a zip that leaves its folder": (archive("zip"), ON_DATA, "cannot"),
    "a tar that leaves its folder": (archive("tar"), ON_DATA, "has no split 'test'"),
    "a name that leaves the folder": (metadata("../../secret.png"), ON_DATA, "cannot be loaded"),
    "a name from the root": (metadata("{tmp}/secret.png"), ON_DATA, "cannot be loaded"),
    "a name of a scheme": (metadata("file://{tmp}/secret.png"), ON_DATA, "cannot be loaded"),
}


CHECKPOINTS = {
    "weights cut short": (cut("model.safetensors", 0.7), FROM_MODEL, "cannot be built"),
    "weights that are empty": (rewritten("model.safetensors", b""), FROM_MODEL, "cannot be built"),
    "a header without end": (rewritten("model.safetensors", b"\xff" * 64), FROM_MODEL, "cannot be built"),
    "a header of text": (rewritten("model.safetensors", b"\x05" + b"\0" * 7 + b"hello"), FROM_MODEL, "cannot be"),
    "a pickle named safetensors": (pickled("model.safetensors", alone=False), FROM_MODEL, "cannot be built"),
    "a pickle named pytorch_model": (pickled("pytorch_model.bin"), FROM_MODEL, "could run code"),
    "weights of another shape": (
        other_weights(lambda state: {name: value[..., :8].contiguous() for name, value in state.items()}),
        FROM_MODEL,
        "weights are missing or of another shape",
    ),
    "weights of another model": (
        other_weights(lambda state: {f"encoder.{name}": value for name, value in state.items()}),
        FROM_MODEL,
        "weights are missing or of another shape",
    ),
    "no weights": (checkpoint(lambda folder, _: (folder / "model.safetensors").unlink()), FROM_MODEL, "cannot be"),
    "a configuration that is no JSON": (rewritten("config.json", "{"), FROM_MODEL, "config.json"),
    "a configuration that is a list": (rewritten("config.json", "[]"), FROM_MODEL, "cannot be read"),
    "a configuration of another kind": (
        with_values("config.json", model_type="bert", architecture=None),
        FROM_MODEL,
        "is a 'bert' checkpoint",
    ),
    "a configuration of no timm model": (
        with_values("config.json", architecture="vit_none"),
        FROM_MODEL,
        "vit_none",
    ),
    "code in a configuration": (checkpoint(remote_code), FROM_MODEL, "is a 'evil' checkpoint"),
    "code in a configuration, to predict": (checkpoint(remote_code), PREDICT, "cannot be read"),
    "too few names": (with_values("config.json", label_names=["a"]), PREDICT, "has 1 label_names for 3 classes"),
    "too many names": (with_values("config.json", label_names=list("abcdefgh")), PREDICT, "has 8 label_names"),
    "names that are a number": (with_values("config.json", label_names=3), PREDICT, "cannot be read"),
    "weights cut short, to predict": (cut("model.safetensors", 0.5), PREDICT, "no image classifier that"),
    "a pickle, to predict": (pickled("pytorch_model.bin"), PREDICT, "could run code"),
    "a pickle, to export": (pickled("pytorch_model.bin"), "onnx --model {tmp}/model {tmp}/out", "no image classif"),
    "weights that are a pickle, to validate": (
        pickled("model.safetensors", alone=False),
        "hfvit validate {tmp}/model",
        "no image classifier that",
    ),
    "a recipe that is half, to validate": (rewritten("recipe.yaml", "seed: ["), VALIDATE, "recip"),
    "a recipe with code, to validate": (
        checkpoint(
            lambda folder, place: (folder / "recipe.yaml").write_text(
                f"dataset_name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path "
                f"['{place.canary}']]\n"
            )
        ),
        "hfvit validate {tmp}/model",
        "not valid YAML",
    ),
    "a recipe of laughs, to validate": (
        rewritten("recipe.yaml", billion_laughs()),
        "hfvit validate {tmp}/model",
        "aliases",
    ),
    "facts that are half, to validate": (rewritten("run.json", "{"), VALIDATE, "run.json"),
    "facts that are half, to push": (
        rewritten("run.json", "{"),
        "hfvit push {tmp}/model user/x --dry-run",
        "run.json",
    ),
    "facts that are a list, to push": (
        rewritten("run.json", "[1]"),
        "hfvit push {tmp}/model user/x --dry-run",
        "run.json",
    ),
    "facts that say nothing, to push": (
        rewritten("run.json", '{"metrics": 3}'),
        "hfvit push {tmp}/model user/x --dry-run",
        "run.json",
    ),
    "a state that is half, to push": (
        rewritten("trainer_state.json", "{"),
        "hfvit push {tmp}/model user/x --dry-run",
        "trainer_state.json",
        5,
    ),
    "facts that say nothing, to verify": (
        rewritten("run.json", '{"metrics": {"test": {"accuracy": 1}}}'),
        "hfvit verify {tmp}/model",
        "lacks model",
    ),
    "facts that are half, to verify": (
        rewritten("run.json", '{"me'),
        "hfvit verify {tmp}/model",
        "run.json cannot be",
    ),
    "a card of bytes, to push": (
        rewritten("README.md", bytes(range(256))),
        "hfvit push {tmp}/model user/x --dry-run",
        "README.md",
        5,
    ),
}


GRAPHS = {
    "a graph cut short": (
        graph_folder(lambda file, _: file.write_bytes(file.read_bytes()[:99])),
        WITH_ONNX,
        "no ONNX file that",
    ),
    "an empty graph": (graph_folder(lambda file, _: file.write_bytes(b"")), WITH_ONNX, "no ONNX file that"),
    "a graph of noise": (
        graph_folder(lambda file, _: file.write_bytes(bytes(range(256)) * 40)),
        WITH_ONNX,
        "no ONNX file that",
    ),
    "a graph that is a folder": (
        graph_folder(lambda file, _: (file.unlink(), file.mkdir())),
        WITH_ONNX,
        "ONNX",
    ),
    "weights in another file": (outside_data("../../../../../etc/passwd"), WITH_ONNX, "no ONNX file that"),
    "weights from the root": (outside_data("/etc/passwd"), WITH_ONNX, "no ONNX file that"),
    "a graph that takes no pictures": (
        graph_of(pixel_values(1, 7), FLAT, SCORES),
        WITH_ONNX,
        "not one batch of images",
    ),
    "a graph of other classes": (
        graph_of(pixel_values(1, 7, 1, 1), FLAT, SCORES),
        WITH_ONNX,
        "names 3 classes",
    ),
    "a graph that takes other pictures": (
        graph_folder(lambda file, _: write_graph(file, size=12)),
        WITH_ONNX,
        "but its preprocessing made",
    ),
    "a graph without names": (
        graph_folder(lambda file, _: (file.parent / "config.json").unlink()),
        WITH_ONNX,
        "has no config.json beside",
    ),
    "a graph without preprocessing": (
        graph_folder(lambda file, _: (file.parent / "preprocessor_config.json").unlink()),
        WITH_ONNX,
        "no image proc",
    ),
    "code in a processor": (
        graph_folder(lambda file, place: remote_code(file.parent, place, ("preprocessor_config.json",))),
        WITH_ONNX,
        "no image processor",
    ),
    "facts of an export that are half": (
        graph_folder(lambda file, _: (file.parent / "export.json").write_text("{")),
        "hfvit validate {tmp}/onnx --dataset_name {colors} --split test",
        "export.json cannot be read",
    ),
    "a graph cut short, to build": (
        graph_folder(lambda file, _: file.write_bytes(file.read_bytes()[:99])),
        "tensorrt --model {tmp}/onnx/model.onnx {tmp}/trt",
        "model.onnx",
    ),
    "weights in another file, to build": (
        outside_data("../../../../../etc/passwd"),
        "tensorrt --model {tmp}/onnx/model.onnx {tmp}/trt",
        "model.onnx",
    ),
    "facts of an engine that name none": (
        text_file("trt/engine.json", '{"engine": 1}'),
        "hfvit predict {tmp}/trt {picture}",
        "engine.json cannot be read",
    ),
    "facts of an engine that are half": (
        text_file("trt/engine.json", '{"eng'),
        "hfvit predict {tmp}/trt {picture}",
        "engine.json cannot be read",
    ),
    "an engine without facts": (
        text_file("trt/model.engine", "x"),
        "hfvit predict {tmp}/trt/model.engine {picture}",
        "has no config.json beside it",
    ),
    "pictures that are none": (text_file("a.png", "no"), "hfvit predict {graphs} {tmp}/a.png", "could be classified"),
    "a picture that is a bomb": (
        text_file("a.png", bomb()),
        "hfvit predict {graphs} {tmp}/a.png",
        "DecompressionBomb",
    ),
    "a picture that cannot be fetched": (None, "hfvit predict {graphs} http://127.0.0.1:9/a.png", "could be class"),
    "an address of this machine's files": (None, "hfvit predict {graphs} file:///etc/passwd", "no such file"),
}
