"""The `hfvit` command. Every import that costs time happens inside the command that needs it."""

import argparse
import dataclasses
import sys
import textwrap

import hfvit
from hfvit.errors import DataError, GateError, HFViTError, run
from hfvit.option_types import above_0, from_0, points, share
from hfvit.shipped import find_recipe, shipped_recipes, summary

TRAIN_EPILOG = """\
Any field of transformers' TrainingArguments works too, in the file and here:
  --learning_rate 3e-4 --weight_decay 0.05 --num_train_epochs 10 --max_steps 200
  --bf16 true --torch_compile true --eval_strategy steps --eval_steps 500
  --resume_from_checkpoint auto --report_to tensorboard --seed 1
  --push_to_hub true --hub_model_id user/my-vit --hub_private_repo true
`python -m hfvit.train --help` lists them all.

examples:
  hfvit train quickstart
  hfvit train my_recipe.yaml --learning_rate 3e-4 --output_dir outputs/higher_lr
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml hfvit/train.py vit_base
"""


VALIDATE_EPILOG = """\
The data are the validation rows that the reference's recipe.yaml held out, unless --dataset_name or --split name
others. Classes are matched by name. Latency and images/s are the model's alone, without reading and preprocessing,
but for a graph that does its own preprocessing (marked *).

The result is printed, saved in the reference's run.json and in the export.json beside an exported file, and with
--output in a file of your own.

exit code: 0 every artefact passed, 4 one of them did not, 2 something was wrong with the command.

examples:
  hfvit validate outputs/quickstart
  hfvit validate outputs/quickstart outputs/quickstart/onnx outputs/quickstart/onnx/model_quantized.onnx
  hfvit validate outputs/quickstart onnx/ --split test --min_agreement 0.99 --output gate.json
  hfvit validate user/my-vit onnx/ --dataset_name path/to/folder --split test --max_samples 2000
"""

PREDICT_EPILOG = """\
A folder stands for every picture in it and below it. A picture that cannot be read is named on standard error and
skipped; the exit code is then 1.

examples:
  hfvit predict outputs/quickstart digit.png
  hfvit predict outputs/quickstart/onnx photos/ --top_k 1
  hfvit predict user/my-vit "photos/**/*.jpg" https://example.org/cat.jpg --json > predictions.jsonl
  hfvit predict outputs/quickstart photos/ --save-grid grid.png
"""


PUSH_EPILOG = """\
What is pushed: the weights, config.json, the card, run.json, recipe.yaml, trainer_state.json and the plots, in one
commit; with --include the exports below OUTPUT_DIR too. Never checkpoints, optimiser state, pickles, hidden or
temporary files, pictures of the data set, nor the paths of this machine. What was edited in the card, here or on the
Hub, stays. The repository is then loaded back into an empty cache, and its logits are compared.

exit code: 0 done, 5 the Hub could not be reached or refused (with the command to repeat), 2 a wrong command.

examples:
  hfvit push outputs/quickstart user/digits --dry-run
  hfvit push outputs/quickstart user/digits --private
  hfvit push outputs/quickstart user/digits --include onnx --message "With INT8"
  hfvit push outputs/quickstart team/digits --create-pr
"""


GRID_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command; exits with the command's code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    # A recipe's options belong to the recipe, which knows them all; argparse here would have to know them twice.
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is not train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(run(lambda: options.command(options, rest)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfvit", description=hfvit.__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train_parser = commands.add_parser(
        "train",
        help="train a classifier from a recipe",
        description="Train on one process what `accelerate launch hfvit/train.py RECIPE` trains on many.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `hfvit recipes` lists")
    _describe_fields(train_parser)
    train_parser.set_defaults(command=train)

    _add_validate(commands)
    _add_predict(commands)
    _add_push(commands)

    doctor_parser = commands.add_parser(
        "doctor",
        help="tell what this machine can run, and what to install for the rest",
        description="GPU, driver, runtimes with their versions, and the precisions worth using here.",
    )
    doctor_parser.set_defaults(command=doctor)

    recipes_parser = commands.add_parser(
        "recipes", help="list the recipes that come with hfvit", description="List the shipped recipes, or print one."
    )
    recipes_parser.add_argument("name", nargs="?", help="print this recipe, to copy and change")
    recipes_parser.set_defaults(command=recipes)
    return parser


def _add_validate(commands) -> None:
    parser = commands.add_parser(
        "validate",
        help="compare checkpoints and exports on one data set, and fail when one lost accuracy",
        description="Run each artefact over the same pictures and hold it to the first.",
        epilog=VALIDATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "checkpoint folder, Hub id, .onnx file or export folder"
    parser.add_argument("reference", metavar="REFERENCE", help=f"{what}: what the others are held to")
    parser.add_argument("others", metavar="OTHER", nargs="*", help="the same kinds, to be judged")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, folder or 'digits' [the recipe's]")
    data.add_argument("--dataset_config_name", help="configuration of the data set, where it has several")
    data.add_argument("--split", help="split, slices such as test[:1000] too [the recipe's; validation]")
    data.add_argument("--image_column", help="found by its type when not given")
    data.add_argument("--label_column", help="found by its type when not given")
    data.add_argument("--max_samples", type=above_0, help="use this many images, drawn with --seed [all]")
    data.add_argument("--seed", type=from_0, default=42, help="[%(default)s]")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_accuracy_drop", type=points, default=0.5, help="in points [%(default)s]")
    limits.add_argument(
        "--min_agreement", type=share, help="share of the images, 0 to 1, that must get the reference's class [none]"
    )
    _add_running(parser, batch_size=16)
    parser.add_argument("--output", metavar="FILE", help="save the result as JSON, too")
    parser.set_defaults(command=validate)


def _add_predict(commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify pictures",
        description="Print the most probable classes of each picture.",
        epilog=PREDICT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artefact", metavar="ARTEFACT", help="checkpoint folder, Hub id, .onnx file or export folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder, pattern or URL")
    parser.add_argument("--top_k", type=above_0, default=5, help="classes shown of each picture [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each picture")
    parser.add_argument(
        "--save-grid", "--save_grid", metavar="FILE", help="draw the pictures with their predictions into this file"
    )
    _add_running(parser, batch_size=32)
    parser.set_defaults(command=predict)


def _add_push(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a run's folder on the Hub",
        description="Push the output folder of a run to a model repository on the Hub.",
        epilog=PUSH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="the output folder of a run")
    parser.add_argument("repository", metavar="USER/NAME", help="made where there is none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, made where there is none [main]")
    parser.add_argument("--create-pr", "--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--include", nargs="+", choices=("onnx", "tensorrt"), default=[], help="exports to push, too")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list files and sizes, and send nothing")
    parser.set_defaults(command=push)


def _add_running(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--batch_size", type=above_0, default=batch_size, help="images at a time [%(default)s]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    parser.add_argument("--threads", type=above_0, help="threads of the processor [PyTorch's own number]")


def _describe_fields(parser: argparse.ArgumentParser) -> None:
    """Name hfvit's own recipe fields in the help; their values are parsed by the recipe."""
    from hfvit.config import AugmentationArguments, DataArguments, ModelArguments, RunArguments

    lines = []
    for section in (ModelArguments, DataArguments, AugmentationArguments, RunArguments):
        lines += ["", section.__doc__]
        for field in dataclasses.fields(section):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            text = field.metadata["help"] + (f" [{default}]" if default is not None else "")
            lines += textwrap.wrap(
                text, width=100, initial_indent=f"  --{field.name:<26} ", subsequent_indent=" " * 31
            )
    parser.epilog = "\n".join(lines[1:]) + "\n\n" + parser.epilog


def train(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit train RECIPE [--key value ...]`"""
    find_recipe(options.recipe)  # a wrong name is told at once, before torch is imported
    from hfvit.train import main as train_main

    train_main([options.recipe, *rest])


def validate(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit validate REFERENCE [OTHER ...]`"""
    from hfvit.artefacts import find_artefact
    from hfvit.paths import writable

    paths = [options.reference, *options.others]
    for path in paths:
        find_artefact(path)  # a wrong path is told at once, before torch is imported
    output = writable(options.output, "--output")
    _quiet_libraries()
    from hfvit.evaluation_split import evaluation_split
    from hfvit.json_files import write_object
    from hfvit.validate import check_recordable, record
    from hfvit.validate import validate as compare

    check_recordable(paths)
    split = evaluation_split(
        options.reference,
        dataset_name=options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        max_samples=options.max_samples,
        seed=options.seed,
    )
    comparison = compare(
        options.reference,
        options.others,
        split,
        max_accuracy_drop=options.max_accuracy_drop,
        min_agreement=options.min_agreement,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
    )
    print(comparison.table())
    if output:
        write_object(output, comparison.to_dict())
    written = [*record(comparison, paths), *([output] if output else [])]
    if written:
        print(f"saved    {', '.join(map(str, written))}")
    if not comparison.passed:
        raise GateError("\n".join(comparison.failures))


def predict(options: argparse.Namespace, rest: list[str]) -> int:
    """`hfvit predict ARTEFACT IMAGE ...`"""
    from hfvit.artefacts import find_artefact
    from hfvit.paths import writable
    from hfvit.pictures import find_pictures

    find_artefact(options.artefact)
    grid = writable(options.save_grid, "--save-grid")
    if grid and grid.suffix.lower() not in GRID_KINDS:
        raise HFViTError(f"--save-grid: {grid} must end in one of {', '.join(GRID_KINDS)}.")
    names, wrong = find_pictures(options.images)
    if not names:
        raise DataError("No picture found: " + "; ".join(wrong) + ".")
    for sentence in wrong:
        print(f"hfvit: {sentence}.", file=sys.stderr)
    _quiet_libraries()
    from hfvit.inference import load_classifier
    from hfvit.predict import print_predictions

    classifier = load_classifier(options.artefact, options.device, options.threads)
    bad = print_predictions(classifier, names, options.batch_size, options.top_k, options.json, grid)
    if bad == len(names):
        raise DataError("None of the pictures could be classified.")
    if bad or wrong:
        print(f"hfvit: {bad + len(wrong)} of what was named could not be classified", file=sys.stderr)
    return 1 if bad or wrong else 0


def push(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit push OUTPUT_DIR USER/NAME`"""
    from hfvit.hub_files import files_to_push
    from hfvit.push import Destination, check_name, listing
    from hfvit.push import push as push_folder

    check_name(options.repository)
    include = tuple(dict.fromkeys(options.include))
    if options.dry_run:
        print(listing(files_to_push(options.folder, options.repository, include)))
        return
    _quiet_libraries()
    private = options.private or None
    destination = Destination(options.repository, private, options.revision, options.create_pr)
    print(push_folder(options.folder, destination, include, options.message))


def _quiet_libraries() -> None:
    """Leave standard error to what these commands say; loading a model says nothing that a reader needs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def doctor(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit doctor`"""
    from hfvit.doctor import report

    print(report())


def recipes(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit recipes [NAME]`"""
    if options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:<{width}}  {summary(path)}")
