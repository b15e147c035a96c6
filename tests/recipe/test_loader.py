"""Recipes: parsing, precedence, errors, and the shipped recipes."""

import dataclasses
import re
import shlex

import pytest
import timm
import torch
import yaml
from helpers.commands import ROOT
from helpers.messages import assert_logged, assert_names, option_of

from hfvit.errors import RecipeError
from hfvit.recipe.arguments import TrainerArguments
from hfvit.recipe.files import read_head, shipped_recipes
from hfvit.recipe.loader import _FIELDS, NEEDS, build_parser, load_recipe
from hfvit.recipe.other_names import OTHER_NAMES, SET_ELSEWHERE, key_hint
from hfvit.recipe.training_args import split_batch

MINIMAL = "architecture: vit_tiny_patch16_224\ndataset_name: digits\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse(name):
    path = shipped_recipes()[name]
    recipe = load_recipe([name])
    assert recipe.source == path
    assert recipe.ignored is None
    assert recipe.training.output_dir == f"outputs/{name}"
    values = yaml.safe_load(path.read_text())
    architecture = recipe.model.architecture or recipe.model.model_name_or_path.removeprefix("timm/")
    assert timm.is_model(architecture.split(".")[0])
    # A number that YAML reads as text (1e-4) would still be coerced, but is better not shipped.
    assert not any(isinstance(values.get(key), str) for key in ("learning_rate", "weight_decay"))


@pytest.mark.parametrize("name", ["hiera_tiny", "swin_tiny", "vit_tiny_cifar10"])
def test_shipped_recipe_head_commands_parse(name):
    text = shipped_recipes()[name].read_text()
    command = re.search(rf"^#     hfvit train ({name} (?:.*\\\n)*.*)$", text, re.MULTILINE)[1]
    load_recipe(shlex.split(re.sub(r"\\\n# *", "", command)))


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_heads_have_time_and_accuracy(name):
    head = read_head(shipped_recipes()[name])
    assert head.keys() >= {"", "Parameters", "Hardware", "Time", "Accuracy"}
    assert all(head.values())
    low, high = load_recipe([name]).training.expected_accuracy
    assert 0 < low < high <= 100


@pytest.mark.parametrize("value", ["[95]", "[99, 95]", "[-1, 5]", "[95, 101]", "[.nan, 95]", "[1, 2, 3]", "ninety"])
def test_load_recipe_of_invalid_expected_accuracy_raises(write, value):
    with pytest.raises(RecipeError, match="expected_accuracy"):
        load_recipe([write(MINIMAL + f"expected_accuracy: {value}\n")])


def test_expected_accuracy_is_not_in_the_resolved_recipe(write):
    plain = load_recipe([write(MINIMAL)])
    expecting = load_recipe([write(MINIMAL + "expected_accuracy: [95, 99.5]\nexpected_accuracy_measured: false\n")])
    assert expecting.training.expected_accuracy == [95.0, 99.5]
    assert expecting.values == plain.values
    assert expecting.ignored is None


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_heads_have_the_model_size(name):
    path = shipped_recipes()[name]
    values = yaml.safe_load(path.read_text())
    architecture = values.get("architecture") or values["model_name_or_path"].removeprefix("timm/")
    arguments = {"img_size": values["image_size"], **values.get("model_args", {})}
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=10, **arguments)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert read_head(path)["Parameters"] == f"{parameters / 1e6:.1f} million."


def test_load_recipe_with_architecture_option_replaces_the_files_model(write):
    args = '{"patch_size": 2, "window_size": 4}'
    anew = load_recipe(["swin_tiny", "--architecture", "swin_tiny_patch4_window7_224", "--model_args", args])
    assert anew.model.model_name_or_path is None
    assert load_recipe([write(anew.to_yaml())]).model == anew.model
    pretrained = load_recipe(["quickstart", "--model_name_or_path", "a/b"])
    assert (pretrained.model.model_name_or_path, pretrained.model.architecture) == ("a/b", None)
    for both in ("vit_base_patch16_224", "vit_tiny_patch16_224"):  # the second is what the file says, too
        with pytest.raises(RecipeError, match=r"^--model_name_or_path, --architecture: "):
            load_recipe(["quickstart", "--model_name_or_path", "a/b", "--architecture", both])


def test_load_recipe_converts_yaml_11_values(write):
    recipe = load_recipe([write(MINIMAL + "learning_rate: 1e-4\neval_strategy: no\nsave_strategy: no\n"
                                "load_best_model_at_end: false\nwarmup_steps: 10\n")])  # fmt: skip
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.eval_strategy == "no"
    assert recipe.training.warmup_steps == 10
    assert recipe.training.load_best_model_at_end is False


def test_load_recipe_options_override_the_file(write):
    path = write(MINIMAL + "learning_rate: 1.0e-4\ncrop_scale: [0.5, 1.0]\nfreeze: backbone\n")
    recipe = load_recipe([path, "--learning_rate", "3e-4", "--crop_scale", "0.7", "0.9", "--freeze=2"])
    assert recipe.training.learning_rate == 3e-4
    assert recipe.augmentation.crop_scale == [0.7, 0.9]
    assert recipe.model.freeze == "2"
    assert recipe.values["learning_rate"] == 3e-4


def test_load_recipe_of_null_overrides_the_default(write):
    recipe = load_recipe([write(MINIMAL + "test_split: null\nsave_total_limit: null\nmodel_args: {depth: 3}\n")])
    assert recipe.data.test_split is None
    assert recipe.model.timm_kwargs == {"depth": 3}
    again = load_recipe([write(recipe.to_yaml())])
    assert again.data.test_split is None
    assert again.training.save_total_limit is None


def test_resolved_recipe_has_common_options(write):
    values = load_recipe([write(MINIMAL)]).values
    assert values["learning_rate"] == 5e-5
    assert values["lr_scheduler_type"] == "cosine"
    assert {"weight_decay", "num_train_epochs", "warmup_steps", "eval_strategy", "optim", "seed"} <= values.keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("test_split", "none"),
        ("test_split", "null"),
        ("validation_split", "None"),
        ("ema_decay", "NONE"),
        ("image_mean", "none"),
    ],
)
def test_load_recipe_of_none_or_null_option_is_null(write, option, value):
    path = write(MINIMAL + "validation_split: test\nema_decay: 0.9\nimage_mean: [0.5, 0.5, 0.5]\n")
    for words in ([f"--{option}", value], [f"--{option}={value}"], [f"--{option.replace('_', '-')}", value]):
        recipe = load_recipe([path, *words])
        section = recipe.training if option == "ema_decay" else recipe.data
        assert getattr(section, option) is None
    later = load_recipe([path, f"--{option}=none", "--ema_decay", "0.5"])
    assert later.training.ema_decay == 0.5


def test_load_recipe_of_none_as_a_choice_is_the_choice(write):
    recipe = load_recipe([write(MINIMAL), "--class_balance", "none", "--report_to", "none"])
    assert recipe.finetuning.class_balance == "none"
    assert recipe.training.report_to == []


@pytest.mark.parametrize("items", ["[no, yes]", "[cat, {a: b}]", "[cat, [dog]]", "[-cat, dog]", "[cat, --seed=5]"])
def test_load_recipe_with_list_items_that_would_change_names_the_option(write, items):
    path = write(f"{MINIMAL}class_names: {items}\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(path)}: class_names: "):
        load_recipe([path])


def test_load_recipe_keeps_quoted_and_negative_list_items(write):
    assert load_recipe([write(f"{MINIMAL}class_names: ['no', 'yes', -1]\n")]).data.class_names == ["no", "yes", "-1"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_mean", "[123.7, 116.3, 103.5]"),
        ("image_mean", "[0.5, .nan, 0.5]"),
        ("image_std", "[58.4, 57.1, 57.4]"),
        ("image_std", "[0.5, .nan, 0.5]"),
        ("crop_ratio", "[0.75, .inf]"),
        ("probe_c", "[1, .nan]"),
        ("probe_c", "[1, .inf]"),
    ],
)
def test_load_recipe_with_a_number_out_of_range_in_a_list_names_the_option(write, key, values):
    path = write(f"{MINIMAL}{key}: {values}\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(path)}: {key}: "):
        load_recipe([path])


def test_load_recipe_error_names_option_or_file(write):
    wrong = write(MINIMAL + "learning_rate: -1\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(wrong)}: learning_rate: .*-1\.0"):
        load_recipe([wrong, "--seed", "1"])
    with pytest.raises(RecipeError, match=r"^--learning_rate: .*-2\.0"):
        load_recipe([wrong, "--learning_rate", "-2"])
    mixed = write(MINIMAL + "mixup_alpha: 0.2\n")
    with pytest.raises(RecipeError, match=r"^mixup_alpha, cutmix_alpha: .*\b7\b"):  # the option causes the error
        load_recipe([mixed, "--global_batch_size", "7"])


def test_help_defaults_equal_the_parsers():
    parser = build_parser()
    for field in dataclasses.fields(TrainerArguments):
        assert parser.get_default(field.name) == field.default


def test_save_strategy_defaults_to_eval_strategy(write):
    steps = load_recipe([write(MINIMAL), "--eval_strategy", "steps", "--eval_steps", "50"]).training
    assert (steps.save_strategy, steps.save_steps) == ("steps", 50)
    logged = load_recipe([write(MINIMAL), "--eval_strategy", "steps", "--logging_steps", "25"]).training
    assert (logged.eval_steps, logged.save_steps) == (25, 25)
    never = load_recipe([write(MINIMAL), "--eval_strategy", "no"]).training
    assert (never.save_strategy, never.load_best_model_at_end) == ("epoch", False)


def test_save_steps_may_equal_the_default_of_eval_steps(write):
    training = load_recipe([write(MINIMAL + "eval_strategy: steps\nsave_strategy: steps\n")]).training
    assert training.save_steps == training.eval_steps == training.logging_steps == 500


def test_greater_is_better_is_false_for_ece(write):
    assert load_recipe([write(MINIMAL + "metric_for_best_model: ece\n")]).training.greater_is_better is False
    assert load_recipe([write(MINIMAL + "metric_for_best_model: macro_f1\n")]).training.greater_is_better is True


def test_resolved_recipe_round_trips(write, tmp_path):
    first = load_recipe([write(MINIMAL + "label_smoothing_factor: 0.1\nmodel_args: {depth: 3}\n"), "--seed", "9"])
    again = load_recipe([write(first.to_yaml())])
    assert again.model == first.model
    assert again.data == first.data
    assert again.values == first.values
    assert again.training.seed == 9


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("policy: trivial_augment\nrand_augment_magnitude: 5\n", [], {"rand_augment_magnitude", "policy"}),
        ("lora_rank: 4\nlora_dropout: 0.1\n", [], {"lora_rank", "lora_dropout", "finetuning"}),
        ("", ["--lora_rank", "8"], {"lora_rank", "finetuning"}),  # typed, though it is the default
        ("distillation_alpha: 0.9\n", ["--probe_passes=2"],
         {"distillation_alpha", "teacher", "probe_passes", "finetuning"}),
        ("eval_steps: 50\n", [], {"eval_steps", "eval_strategy"}),
        ("mix_off_epochs: 1\nmixup_alpha: 0.2\n", ["--mixup_alpha", "0"],
         {"mix_off_epochs", "mixup_alpha", "cutmix_alpha", "random_erasing"}),
        ("dataset_revision: v1\ndataset_config_name: plain\n", [], {"dataset_revision", "dataset_config_name"}),
        ("streaming: true\nvalidation_split: val\ntest_fraction: 0.2\n", [], {"test_fraction", "streaming"}),
        ("dataset_revision: v1\n", ["--dataset_name", "user/photos"], None),
        ("finetuning: lora\nlora_rank: 4\nprobe_passes: 0\n", [], None),
        ("policy: rand_augment\nrand_augment_num_ops: 3\neval_strategy: steps\neval_steps: 50\n", [], None),
    ],
)  # fmt: skip
def test_load_recipe_with_ignored_options_names_them(write, text, options, named):
    """`named` has exactly the keys of a recipe that the message names."""
    text = MINIMAL.replace("architecture", "model_name_or_path") + text if "finetuning" in text else MINIMAL + text
    recipe = load_recipe([write(text), *options])
    if named is None:
        assert recipe.ignored is None
    else:
        assert {action.dest for action in build_parser()._actions} & set(re.findall(r"\w+", recipe.ignored)) == named


def test_resolved_recipe_has_the_same_ignored_options(write):
    recipe = load_recipe([write(MINIMAL + "lora_rank: 4\n")])
    assert load_recipe([write(recipe.to_yaml())]).ignored == recipe.ignored


def test_needs_name_keys_of_a_recipe():
    fields = {action.dest for action in build_parser()._actions}
    assert {key for need in NEEDS for key in need.keys.split()} <= fields


def test_resolved_recipe_has_no_tokens(write):
    recipe = load_recipe([write(MINIMAL), "--hub_token", "hf_secret"])
    assert "hf_secret" not in recipe.to_yaml()
    assert "token" not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("text", "option", "data"),
    [
        ("learning_rat: 1.0e-4\n", "learning_rat", ["'learning_rate'"]),
        ("learning_rate: fast\n", "learning_rate", ["'fast'"]),
        ("num_train_epochs: [1, 2]\n", "num_train_epochs", ["[1, 2]"]),
        ("image_size: -3\n", "image_size", [-3]),
        ("drop_path_rate: 1.5\n", "drop_path_rate", [1.5]),
        ("freeze: head\n", "freeze", ["'head'"]),
        ("validation_fraction: 1.0\n", "validation_fraction", [1.0]),
        ("crop_scale: [1.0, 0.5]\n", "crop_scale", ["[1.0, 0.5]"]),
        ("crop_padding: 4\ncrop_scale: [0.5, 1.0]\n", "crop_padding", ["crop_scale", "[0.5, 1.0]"]),
        ("crop_padding: -1\n", "crop_padding", [-1]),
        ("crop_padding: 4\ncrop_padding_mode: edge\n", "crop_padding_mode", ["'edge'"]),
        ("patch_drop_rate: 1.0\n", "patch_drop_rate", [1.0]),
        ("crop_mode: border\n", "crop_mode", ["'border'", "squash, center"]),
        ("interpolation: cubic\n", "interpolation", ["'cubic'", "nearest, bilinear, bicubic, lanczos"]),
        ("image_mean: [0.5]\n", "image_mean", ["[0.5]"]),
        ("policy: autoaugment\n", "policy", ["'autoaugment'", "basic, trivial_augment"]),
        ("rand_augment_magnitude: 11\n", "rand_augment_magnitude", [11.0, 0, 10]),
        ("random_erasing: 2\n", "random_erasing", [2.0, 0, 1]),
        ("mixup_alpha: -1\n", "mixup_alpha", [-1.0]),
        ("repeated_augmentation: 0\n", "repeated_augmentation", [0]),
        ("mixup_alpha: 0.8\nglobal_batch_size: 7\n", "mixup_alpha, cutmix_alpha", [7, "global_batch_size"]),
        ("cutmix_alpha: 1\nper_device_train_batch_size: 1\n", "mixup_alpha, cutmix_alpha", [1, "global_batch_size"]),
        ("mix_off_epochs: 3\nnum_train_epochs: 3\n", "mix_off_epochs", [3]),
        ("dataloader_prefetch_factor: 4\n", "dataloader_prefetch_factor", ["dataloader_num_workers"]),
        ('accelerator_config: {"dispatch_batches": true}\n', "accelerator_config", ["dispatch_batches"]),
        ('accelerator_config: {"even_batches": false}\n', "accelerator_config", ["even_batches"]),
        ('accelerator_config: {"gradient_accumulation_kwargs": {"num_steps": 2}}\n',
         "accelerator_config", ["num_steps", 2]),
        ("layer_decay: 0\n", "layer_decay", [0.0]),
        ("model_name_or_path: a/b\n", "model_name_or_path, architecture", []),
        ("lr_scheduler_type: cosinus\n", "lr_scheduler_type", ["'cosinus'", "'cosine'"]),
        ("optim: adamx\n", "optim", ["'adamx'"]),
        ("dataloader_drop_last: true\n", "dataloader_drop_last", []),
        ("remove_unused_columns: true\n", "remove_unused_columns", []),
        ("auto_find_batch_size: true\n", "auto_find_batch_size", []),
        ("gradient_accumulation_steps: 4\n", "gradient_accumulation_steps", ["global_batch_size"]),
        ("metric_for_best_model: top1\n", "metric_for_best_model", ["'top1'", "accuracy, top5_accuracy, macro_f1"]),
        ("ema_decay: 0.9\nsave_only_model: true\n", "save_only_model", ["ema_decay"]),
        ("eval_strategy: steps\neval_steps: 10\nsave_strategy: steps\nsave_steps: 20\n", "save_steps", [20, 10]),
        ("eval_strategy: steps\nsave_strategy: steps\nlogging_steps: 50\n", "save_steps", [50, 500]),
        ("model_args: {img_size: 32}\n", "model_args", ["image_size", "img_size"]),
        ("model_args: {num_classes: 7}\n", "model_args", ["num_classes"]),
        ("freeze: ²\n", "freeze", ["'²'"]),
        ("fold: 1\n", "fold", [1, "folds"]),
        ("num_train_epochs: 0\n", "num_train_epochs", [0.0]),
        ("max_steps: 0\n", "max_steps", [0]),
        ("learning_rate: -1\n", "learning_rate", [-1.0]),
        ("learning_rate: .nan\n", "learning_rate", ["nan"]),
        ("label_smoothing_factor: 1.5\n", "label_smoothing_factor", [1.5]),
        ("per_device_eval_batch_size: 0\n", "per_device_eval_batch_size", [0]),
        ("per_device_train_batch_size: -4\n", "per_device_train_batch_size", [-4]),
        ("crop_scale: null\n", "crop_scale", []),
        ("seed: null\n", "seed", []),
        ("report_to: tensorbord\n", "report_to", ["'tensorbord'"]),
        ("fp16: true\n", "fp16", ["bf16"]),
        ("accelerator_config: {foo: 1}\n", "accelerator_config", ["foo"]),
        ("accelerator_config: no.json\n", "accelerator_config", ["'no.json'"]),
        ("fp16: true\nbf16: true\n", "fp16, bf16", []),
        ("save_strategy: steps\n", "save_strategy", ["'steps'", "eval_strategy", "epoch"]),
        ("eval_strategy: steps\neval_steps: 1.5\n", "eval_steps", [1.5]),
        ("logging_steps: 0\n", "logging_steps", [0.0]),
        ("push_to_hub: true\n", "push_to_hub", ["hub_model_id"]),
        ("push_to_hub: true\nhub_model_id: a/b\nhub_strategy: every_save\n", "hub_strategy", ["'every_save'"]),
        ("eval_strategy: no\nload_best_model_at_end: false\nearly_stopping_patience: 2\n",
         "early_stopping_patience", ["eval_strategy"]),
        ("global_batch_size: 0\n", "global_batch_size", [0]),
        ("model_args: 3\n", "model_args", [3]),
        ("seed: !!python/object/apply:os.system ['true']\n", None, ["os.system", "line 5"]),
        ("seed: [1\n", None, ["line 6"]),
    ],
)  # fmt: skip
def test_load_recipe_with_a_wrong_value_names_file_option_and_data(write, text, option, data):
    path = write(MINIMAL + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe([path])
    assert str(caught.value).startswith(f"{path}: ")
    assert option_of(caught.value) == option
    assert_names(caught.value, *data)


@pytest.mark.parametrize(
    ("argv", "option", "data"),
    [
        ([], "RECIPE", ["`hfvit recipes`"]),
        (["--learning_rate", "1"], "RECIPE", ["`hfvit recipes`"]),
        (["quickstart", "--learning_rat", "1"], "learning_rat", ["'--learning_rate'"]),
        (["quickstart", "--learning-rat", "1"], "learning-rat", ["'--learning_rate'"]),
        (["quickstart", "--seed", "none"], "seed", ["'none'"]),
        (["quickstart", "--train_split", "None"], "train_split", ["'None'"]),
        (["quickstart", "--crop_scale", "none"], "crop_scale", ["'none'"]),
        (["quickstart", "--patch_sizes", "8", "none"], "patch_sizes", []),
        (["quickstart", "--report_to", "wandb"], "report_to", ["'wandb'"]),
        (["quickstart", "--num_train_epochs", "-1"], "num_train_epochs", [-1.0]),
        (["quickstart", "--learning", "1"], "learning", []),
        (["quickstart", "--image_size", "big"], "image_size", ["'big'"]),
        (["quickstart", "--output_dir", ""], "output_dir", []),
        (["no_such.yaml"], "RECIPE", ["'no_such.yaml'", "quickstart"]),
    ],
)
def test_load_recipe_with_a_wrong_command_line_names_option_and_data(argv, option, data):
    with pytest.raises(RecipeError) as caught:
        load_recipe(argv)
    assert option_of(caught.value) == option
    assert ".yaml: " not in str(caught.value)
    assert_names(caught.value, *data)


def test_help_names_every_field():
    text = build_parser().format_help()
    for field in ("--image_size", "--train_split", "--learning_rate", "--global_batch_size"):
        assert field in text


def test_load_recipe_of_a_list_raises(write):
    path = write("- a\n- b\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe([path])
    assert_names(caught.value, path, "list")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((8, 1, None), (8, 1)), ((8, 2, None), (4, 1)), ((8, 1, 4), (4, 2)), ((8, 2, 2), (2, 2)), ((8, 1, 64), (8, 1))],
)
def test_split_batch_of_devices_and_limit(arguments, expected):
    assert split_batch(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "option", "data"),
    [
        ((9, 2, None), "global_batch_size", [9, 2, 8, 10]),
        ((1, 4, None), "global_batch_size", [1, 4]),
        ((8, 1, 3), "per_device_train_batch_size", [8, 3, 2]),
    ],
)
def test_split_batch_of_indivisible_batch_suggests_sizes(arguments, option, data):
    with pytest.raises(RecipeError, match=f"^{option}:") as caught:
        split_batch(*arguments)
    assert_names(caught.value, *data)


def test_mix_off_epochs_longer_than_max_steps_are_reported(write, caplog):
    path = write(MINIMAL + "mixup_alpha: 0.2\nmix_off_epochs: 2\nglobal_batch_size: 8\n")
    load_recipe([path, "--max_steps", "21"]).fit(87)
    assert not caplog.records
    load_recipe([path, "--max_steps", "20"]).fit(87)
    assert_logged(caplog, "WARNING", "mix_off_epochs", 2)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_load_without_warnings(path, monkeypatch, caplog):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert path.read_text().startswith("# ")
    config = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    assert config.num_processes == values["num_processes"]
    assert str(config.mixed_precision) == values["mixed_precision"]
    assert config.use_cpu == values.get("use_cpu", False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)  # the launcher would choose a number of threads
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "hfvit/train.py", "quickstart"])
    arguments, _, _ = _validate_launch_command(arguments)  # reads the file into the arguments
    assert arguments.num_processes == values["num_processes"]
    assert arguments.mixed_precision == values["mixed_precision"]
    assert not caplog.records


def test_unused_keys_are_those_whose_condition_is_not_met(write):
    recipe = load_recipe([write("architecture: test_vit\ndataset_name: digits\noutput_dir: out\n")])
    assert {"lora_rank", "probe_c", "fusion", "shuffle_buffer_size"} <= set(recipe.unused)
    assert not {"learning_rate", "architecture", "crop_scale"} & set(recipe.unused)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lr", "learning_rate"),
        ("batch-size", "global_batch_size"),
        ("epochs", "num_train_epochs"),
        ("imgsz", "image_size"),
        ("label_column_name", "label_column"),
        ("val_check_interval", "eval_steps"),
    ],
)
def test_load_recipe_with_a_name_of_another_library_suggests_the_key(write, name, key):
    with pytest.raises(RecipeError, match=rf"^--{name}:") as caught:
        load_recipe([write(MINIMAL), f"--{name}", "1"])
    assert_names(caught.value, f"--{key}")
    name = name.replace("-", "_")
    with pytest.raises(RecipeError, match=rf"{name}:") as caught:
        load_recipe([write(f"{MINIMAL}{name}: 1\n")])
    assert_names(caught.value, key)


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["--image_size", "32", "64"], "image_size", ["64"]),
        (["--max_steps", "64", "--image_size=32", "64"], "image_size", ["64"]),
        (["epochs=3"], "epochs", ["--num_train_epochs 3"]),
        (["image_size=32"], "image_size", ["--image_size 32"]),
        (["photos"], "photos", []),
    ],
)
def test_word_that_belongs_to_no_option_raises(write, words, option, data):
    with pytest.raises(RecipeError) as caught:
        load_recipe([write(MINIMAL), *words])
    assert option_of(caught.value) == option
    assert_names(caught.value, *data)


def test_names_of_other_libraries_are_no_keys_but_name_one():
    assert not set(_FIELDS) & {*OTHER_NAMES, *SET_ELSEWHERE}
    assert set(OTHER_NAMES.values()) <= set(_FIELDS)


@pytest.mark.parametrize("name", ["conf", "sync_bn", "shuffle", "val", "trust_remote_code"])
def test_key_hint_of_a_name_like_no_key_is_empty(name):
    assert key_hint(name, _FIELDS, "--") == ""


@pytest.mark.parametrize(
    ("name", "key"),
    [("num_worker", "dataloader_num_workers"), ("batchSize", "global_batch_size"), ("epoch", "num_train_epochs")],
)
def test_key_hint_of_a_name_like_one_of_another_library_is_its_key(name, key):
    assert key_hint(name, _FIELDS, "--") == f" Did you mean '--{key}'?"


def test_key_hint_names_no_key_that_cannot_be_set():
    assert "do_eval" not in key_hint("do_evaluate", _FIELDS)


def test_key_hint_of_a_device_names_where_it_is_chosen():
    assert "CUDA_VISIBLE_DEVICES" in key_hint("device", _FIELDS, "--")
