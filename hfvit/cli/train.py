"""`hfvit train`."""

import argparse
import dataclasses
import os
import textwrap

from hfvit.cli.options import exit_codes
from hfvit.recipe.files import find_recipe, is_recipe_name
from hfvit.utils.collector import importing
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import is_hub_id

DESCRIPTION = """\
Train an image classifier from a recipe. Options override the values of the recipe.

examples:
  hfvit train quickstart
  hfvit train path/to/folder
  hfvit train vit_base --dataset_name path/to/folder --output_dir outputs/mine
  hfvit train my_recipe.yaml --learning_rate 3e-4 --num_train_epochs 10 --bf16 true
  hfvit train my_recipe.yaml --resume_from_checkpoint auto
  hfvit train quickstart --seeds 5
  hfvit train quickstart --folds 5
  hfvit train vit_base --estimate
  hfvit train quickstart --find_lr
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml hfvit/train.py vit_base
"""

EPILOG = f"""\
The values `none` and `null` mean null. All other fields of transformers' TrainingArguments are options, too:
`python -m hfvit.train --help` lists them.

{exit_codes(0, 2, 3, 5, 6, 7, 8, 75)}"""

# Options in the order of the help; fields of the recipe that are in no group are shown under RARE.
GROUPS = {
    "data and output": "dataset_name output_dir dataset_config_name dataset_revision image_column label_column"
    " group_column problem_type train_split validation_split test_split validation_fraction max_train_samples"
    " max_eval_samples",
    "model": "model_name_or_path architecture image_size drop_path_rate drop_rate attn_drop_rate patch_drop_rate"
    " model_args model_revision",
    "length and learning rate": "num_train_epochs max_steps learning_rate global_batch_size warmup_steps"
    " lr_scheduler_type weight_decay label_smoothing_factor max_grad_norm layer_decay ema_decay swa_start soup optim"
    " seed seeds folds fold",
    "augmentation": "policy rand_augment_magnitude rand_augment_num_ops crop_scale crop_ratio crop_padding"
    " crop_padding_mode horizontal_flip vertical_flip color_jitter mixup_alpha cutmix_alpha random_erasing"
    " mix_off_epochs repeated_augmentation",
    "fine-tuning": "finetuning freeze lora_rank lora_alpha lora_dropout lora_targets probe_c probe_passes"
    " head_from_text head_templates class_balance teacher distillation distillation_alpha distillation_temperature"
    " progressive_image_size train_image_size",
    "evaluation and logging": "eval_strategy eval_steps eval_tta metric_for_best_model load_best_model_at_end"
    " early_stopping_patience logging_steps report_to save_predictions plots quiet verbose json_log",
    "checkpoints": "resume_from_checkpoint overwrite_output_dir save_strategy save_steps save_total_limit"
    " keep_checkpoints",
    "hardware and precision": "bf16 fp16 per_device_train_batch_size per_device_eval_batch_size torch_compile"
    " channels_last activation_checkpointing use_cpu dataloader_num_workers",
    "Hub": "push_to_hub hub_model_id hub_private_repo hub_revision",
    "image and text": "text_encoder text_column text_encoder_revision fusion fusion_layers max_text_length",
    "multi-label": "label_separator multi_label_loss",
    "streaming": "streaming shuffle_buffer_size stream_evaluation",
}
RARE = "rarely needed"
WIDTH = 110
INDENT = 31


def add(commands) -> None:
    """Add the parser of `hfvit train`."""
    parser = commands.add_parser(
        "train",
        help="train an image classifier from a recipe",
        usage="hfvit train RECIPE|DATASET [--estimate | --find_lr] [--from_scratch] [--option value ...]",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE|DATASET",
        help="YAML file, or a name that `hfvit recipes` lists; or a folder, table, archive or Hub id of images, to"
        " train with the recipe that `hfvit inspect` prints",
    )
    parser.add_argument(
        "--from_scratch", action="store_true", help="train a small model on DATASET without pretrained weights"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--estimate", action="store_true", help="print memory and disk needs without training")
    instead.add_argument(
        "--find_lr", action="store_true",
        help="train 100 steps with a growing learning rate, draw the losses and suggest a rate; no run is trained",
    )  # fmt: skip
    # Options of the recipe are described, not declared: `recipe.loader` parses them, and importing it takes seconds.
    parser.epilog = f"{describe_options()}\n\n{EPILOG}"
    parser.set_defaults(command=train, accepts_recipe_options=True)


def describe_options() -> str:
    """Describe the options of a recipe in groups."""
    from hfvit.recipe.arguments import (
        AugmentationArguments,
        DataArguments,
        FinetuningArguments,
        ModelArguments,
        RunArguments,
        TrainerArguments,
    )

    sections = (
        DataArguments, ModelArguments, TrainerArguments, RunArguments, AugmentationArguments, FinetuningArguments
    )  # fmt: skip
    fields = {field.name: field for section in sections for field in dataclasses.fields(section)}
    named = {name for names in GROUPS.values() for name in names.split()}
    groups = {**GROUPS, RARE: " ".join(name for name in fields if name not in named)}
    lines = []
    for title, names in groups.items():
        lines += ["", f"{title}:", *(line for name in names.split() for line in _describe(fields[name]))]
    return "\n".join(lines[1:])


def _describe(field: dataclasses.Field) -> list[str]:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    text = field.metadata["help"] + (f" [{_shown(default)}]" if default is not None else "")
    head = f"  --{field.name}"
    lines = textwrap.wrap(text, width=WIDTH, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    if len(head) < INDENT:
        return [head.ljust(INDENT) + lines[0][INDENT:], *lines[1:]]
    return [head, *lines]


def _shown(value) -> str:
    """Format a default as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(f"'{item}'" if isinstance(item, str) else f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def train(options: argparse.Namespace) -> None:
    """Run `hfvit train RECIPE [--option value ...]`."""
    name = options.recipe
    exists = os.path.exists(expand_user(name))  # False for a name that is too long
    if is_recipe_name(name) or not (exists or name == "digits" or is_hub_id(name)):
        find_recipe(name)  # before torch is imported
    words = [name, *(["--from_scratch"] if options.from_scratch else []), *options.rest]
    if options.estimate:
        from hfvit.data.starting_recipe import find_and_load
        from hfvit.estimate import estimate

        recipe = find_and_load(words)
        print(estimate(recipe), *([f"\n{recipe.ignored}"] if recipe.ignored else []), sep="\n")
        return
    if options.find_lr:
        from hfvit.lr_finder import main as find_lr

        find_lr(words)
        return
    with importing():
        from hfvit.multirun import main as train_main

    train_main(words)
