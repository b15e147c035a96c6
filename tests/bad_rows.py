"""The rows of test_bad_input.py: what is made first, the command, the message it must give, the exit code if not 2."""

from graphs import write_graph
from hostile import (
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
    recipe_with,
    remote_code,
    replaced,
    rewritten,
    script,
    table,
    text_file,
    truncated_picture,
    with_values,
)
from onnx import TensorProto, helper

TRAIN = "hfvit train {tmp}/recipe.yaml"
ON_DATA = "hfvit train {recipe} --dataset_name {tmp}/data"
FROM_MODEL = "hfvit train {tuning} --model_name_or_path {tmp}/model"
PREDICT = "hfvit predict {tmp}/model {picture}"
PUSH = "hfvit push {tmp}/model user/x --dry-run"
VALIDATE = "hfvit validate {tmp}/model"
WITH_ONNX = "hfvit predict {tmp}/onnx {picture}"
SCORES = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 7])
FLAT = [helper.make_node("Flatten", ["pixel_values"], ["scores"])]

RECIPES = {
    "empty": (text_file("recipe.yaml", ""), TRAIN, "this file holds NoneType"),
    "a list": (text_file("recipe.yaml", "- a\n- b\n"), TRAIN, "this file holds list"),
    "a sentence": (text_file("recipe.yaml", "train a model please"), TRAIN, "this file holds str"),
    "cut short": (text_file("recipe.yaml", "crop_scale: [0.5, "), TRAIN, "not valid YAML"),
    "tabs": (text_file("recipe.yaml", "model_args:\n\tdepth: 1\n"), TRAIN, "not valid YAML"),
    "binary": (text_file("recipe.yaml", bytes(range(256)) * 9), TRAIN, "cannot be read"),
    "another encoding": (text_file("recipe.yaml", "# été\nseed: 1\n".encode("latin-1")), TRAIN, "cannot be read"),
    "a tag that runs code": (
        text_file("recipe.yaml", "output_dir: !!python/object/apply:os.system ['touch @canary@']\n"),
        TRAIN,
        "not valid YAML",
    ),
    "a tag that makes an object": (
        text_file("recipe.yaml", "!!python/object/new:pathlib.Path ['@canary@']\n"),
        TRAIN,
        "not valid YAML",
    ),
    "billion laughs": (text_file("recipe.yaml", billion_laughs()), TRAIN, "aliases"),
    "an alias within itself": (text_file("recipe.yaml", "model_args: &a {depth: *a}\n"), TRAIN, "aliases"),
    "nested without end": (text_file("recipe.yaml", "model_args: " + "[" * 30_000), TRAIN, "nested"),
    "huge": (text_file("recipe.yaml", "# " + "x" * 3_000_000), TRAIN, "no recipe is so long"),
    "a key twice": (recipe_with("learning_rate: 1.0e-3\n"), TRAIN, "learning_rate is given twice"),
    "an unknown key": (recipe_with("learning_rat: 1\n"), TRAIN, "Did you mean 'learning_rate'?"),
    "a key that is no name": (recipe_with("3: 1\n"), TRAIN, "unknown key '3'"),
    "text for a number": (recipe_with("warmup_steps: many\n"), TRAIN, "invalid float value: 'many'"),
    "a list for a number": (recipe_with("weight_decay: [1]\n"), TRAIN, "takes one value, not the list"),
    "not a number": (recipe_with("weight_decay: .nan\n"), TRAIN, "a finite number of 0 or more"),
    "infinite": (recipe_with("ema_decay: .inf\n"), TRAIN, "a number from 0 to below 1"),
    "no schedule": (recipe_with("max_steps: -5\nlr_scheduler_type: x\n"), TRAIN, "x is not a valid"),
    "a number of 5,000 digits": (recipe_with(f"max_steps: {'9' * 5000}\n"), TRAIN, "not valid YAML"),
    "a day that is none": (recipe_with("hub_revision: 2024-13-45\n"), TRAIN, "not valid YAML"),
    "a seed below 0": (recipe_with("data_seed: -1\n"), TRAIN, "data_seed"),
    "not so many epochs": (recipe_with("weight_decay: 1.e+999\n"), TRAIN, "a finite number of 0 or more"),
    "a folder": (None, "hfvit train {colours}", "is a folder; name the recipe file in it"),
    "no file": (None, "hfvit train quickstrat", "Did you mean 'quickstart'?"),
    "wrong arguments of timm": (recipe_with("drop_rate: 0.1\nattn_drop_rate: 2\n"), TRAIN, "attn_drop_rate: 2.0"),
    "no model of timm": (None, "hfvit train {recipe} --architecture vit_tny_patch16_224", "has no model"),
    "no argument of timm": (None, "hfvit train {recipe} --model_args '{{\"depht\":1}}'", "does not take one of"),
    "a size that does not fit": (None, "hfvit train {recipe} --image_size 20", "use 16 or 24"),
    "a resume from nowhere": (None, "hfvit train {recipe} --resume_from_checkpoint {tmp}/no", "no whole checkpoint"),
    "a resume from what is no checkpoint": (
        checkpoint(lambda folder, place: None),
        "hfvit train {recipe} --resume_from_checkpoint {tmp}/model",
        "is no whole checkpoint of a run",
    ),
    "a resume from a checkpoint with half a list": (
        rewritten("checkpoint.json", '{"files": '),
        "hfvit train {recipe} --resume_from_checkpoint {tmp}/model",
        "is no whole checkpoint of a run",
    ),
    "an output below a file": (
        text_file("taken", "x"),
        "hfvit train {recipe} --output_dir {tmp}/taken/out",
        "cannot be written",
    ),
}

COMMAND_LINES = {
    "hfvit alone": (None, "hfvit", "the following arguments are required: COMMAND"),
    "an unknown command": (None, "hfvit trian", "invalid choice: 'trian'"),
    "train without a recipe": (None, "hfvit train", "the following arguments are required: RECIPE"),
    "train with an unknown option": (None, "hfvit train {recipe} --bathc_size 3", "unknown option '--bathc_size'"),
    "train with no value": (None, "hfvit train {recipe} --seed", "expected one argument"),
    "train with a stray word": (None, "hfvit train {recipe} more", "unknown option 'more'"),
    "recipes with an unknown name": (None, "hfvit recipes vit_bse", "Did you mean 'vit_base'?"),
    "recipes with an option": (None, "hfvit recipes --all", "unrecognized arguments: --all"),
    "doctor with a word": (None, "hfvit doctor me", "unrecognized arguments: me"),
    "validate nothing": (None, "hfvit validate", "the following arguments are required: REFERENCE"),
    "validate a missing folder": (None, "hfvit validate {tmp}/nothing", "There is no folder"),
    "validate over a share": (None, "hfvit validate {run} --min_agreement 99", "99 % is 0.99"),
    "validate into a folder": (None, "hfvit validate {run} --output {tmp}", "is a folder; name a file in it"),
    "validate on a missing split": (None, "hfvit validate {run} --split tset", "Did you mean 'test'?"),
    "validate nothing at all": (None, "hfvit validate {run} --max_samples 0", "0 is no whole number above 0"),
    "predict without a picture": (None, "hfvit predict {run}", "the following arguments are required: IMAGE"),
    "predict a missing picture": (None, "hfvit predict {run} {tmp}/no.png", "there is no such file or folder"),
    "predict an empty folder": (None, "hfvit predict {run} {tmp}", "no picture in this folder"),
    "predict into a document": (None, "hfvit predict {run} {picture} --save-grid a.docx", "must end in one of .png"),
    "predict on no device": (None, "hfvit predict {run} {picture} --device npu", "cannot use 'npu'"),
    "predict with a mistyped folder": (
        text_file("outputs/quickstart/x", ""),
        "hfvit predict outputs/quikstart {picture}",
        "Did you mean 'outputs/quickstart'?",
    ),
    "train from a mistyped folder": (
        text_file("outputs/quickstart/x", ""),
        "hfvit train {tuning} --model_name_or_path outputs/quickstrt",
        "Did you mean 'outputs/quickstart'?",
    ),
    "train on a mistyped folder": (
        text_file("photos/pets/x", ""),
        "hfvit train {recipe} --dataset_name photos/pet",
        "Did you mean 'photos/pets'?",
    ),
    "verify what is no run": (None, "hfvit verify {colours}", "holds no run: there is no run.json"),
    "verify a missing folder": (None, "hfvit verify {tmp}/no --eval-only", "There is no folder"),
    "push to an address": (None, "hfvit push {run} https://huggingface.co/user/x", "not its address", 5),
    "push to a wrong name": (None, "hfvit push {run} 'user/wrong name' --dry-run", "a repository is named", 5),
    "push nothing": (None, "hfvit push {tmp} user/x --dry-run", "holds no finished checkpoint", 5),
    "push an export that is not there": (
        None,
        "hfvit push {run} user/x --dry-run --include onnx",
        "holds no export",
        5,
    ),
    "export nothing": (None, "onnx --model {tmp}/no {tmp}/onnx", "There is no folder"),
    "export without a model": (None, "onnx {tmp}/onnx", "the following arguments are required: -m/--model"),
    "export an export": (None, "onnx --model {graphs} {tmp}/onnx", "is an export already"),
    "export into a file": (text_file("taken", ""), "onnx --model {run} {tmp}/taken", "is a file; name a folder"),
    "export over the checkpoint": (None, "onnx --model {run} {run}", "holds a config.json that is no export's"),
    "export to an unknown opset": (None, "onnx --model {run} {tmp}/onnx --opset 5", "opset"),
    "export of no precision": (None, "onnx --model {run} {tmp}/onnx --dtype fp12", "invalid choice: 'fp12'"),
    "export with a negative tolerance": (None, "onnx --model {run} {tmp}/onnx --atol -1", "no number from 0 on"),
    "export calibrated with nothing": (
        None,
        "onnx --model {run} {tmp}/onnx --quantize int8 --calibration_dataset {tmp}/no",
        "there is no folder",
    ),
    "build from nothing": (None, "tensorrt --model {tmp}/no {tmp}/trt", "There is no folder"),
    "build for no GPU": (None, "tensorrt --model {run} {tmp}/trt --compute_capability 9", "no compute capability"),
    "build of no size": (None, "tensorrt --model {run} {tmp}/trt --workspace lots", "is no size"),
    "build in FP8": (None, "tensorrt --model {run} {tmp}/trt --dtype fp8", "writes INT8 only"),
    "build of wrong batches": (None, "tensorrt --model {run} {tmp}/trt --min_batch 9 --max_batch 4", "batch"),
}

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
        "hfvit validate {tmp}/onnx --dataset_name {colours} --split test",
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

ROWS = {
    f"{kind}: {name}": row
    for kind, rows in (
        ("recipe", RECIPES), ("command", COMMAND_LINES), ("data", DATA_SETS), ("model", CHECKPOINTS), ("onnx", GRAPHS),
    )
    for name, row in rows.items()
}  # fmt: skip
