"""Train, evaluate, save and report the run that a recipe describes."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from hfvit.artifacts.checkpoint import check_same_model, remove_checkpoints
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.output_dir import (
    check_inputs_are_kept,
    claim_output_dir,
    clear_run,
    is_finished,
    lock_folder,
    mark_finished,
    remove_plots,
)
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import MultiLabelMetrics, SplitMetrics, Thresholds
from hfvit.data.evaluation_stream import EvaluationStream
from hfvit.data.factory import build_datasets, load_splits
from hfvit.data.labels import read_column
from hfvit.data.local import data_root, image_file
from hfvit.data.splits import ImageSplits, warn_about_sizes
from hfvit.data.starting_recipe import STARTING_RECIPE, find_and_load
from hfvit.errors import HubError, NonFiniteLossError, printable, printable_lines
from hfvit.evaluation.examples import ClassAnswers, Examples, LabelAnswers, answers_of
from hfvit.evaluation.predictions import write_predictions
from hfvit.finetuning.factory import FineTuning, build_trainer, prepare_finetuning
from hfvit.hub.model_card import write_model_card
from hfvit.hub.push import Destination, check_destination, push_to
from hfvit.metrics.task import TASKS
from hfvit.models.configuration import check_model_name
from hfvit.models.describe import describe_architecture
from hfvit.models.factory import build_model
from hfvit.recipe.loader import Recipe
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.report.summary import run_summary
from hfvit.training.display import Display
from hfvit.training.distributed import require_shared_folder
from hfvit.training.resume import check_origin, describe_origin
from hfvit.training.trackers import Tracking
from hfvit.training.trainer import HFViTTrainer
from hfvit.utils.credentials import mask_values
from hfvit.utils.environment import use_all_cores
from hfvit.utils.files import sync_files, write_text
from hfvit.utils.quiet import log_level, quiet_run
from hfvit.utils.terminal import terminal_width

STREAMED_EXAMPLES = 512  # first images of a streamed split, among which the report shows mistakes

logger = logging.getLogger("hfvit")


def main(argv: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Run a recipe once, with command-line options.

    Args:
        argv: `RECIPE [--key value ...]`, or a local data set in place of the recipe; `sys.argv` by default.
        callbacks: callbacks of the trainer.
    """
    start(find_and_load(sys.argv[1:] if argv is None else argv), callbacks)


def start(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    train_transforms: Callable | None = None,
    **options: Any,
) -> RunRecord | None:
    """Set up logging and threads, lock the output directory, and `run`.

    Args:
        recipe: recipe of `load_recipe`.
        callbacks: callbacks of the trainer.
        train_transforms: replaces the augmentation.
        **options: further arguments of `HFViTTrainer`.

    Raises:
        RecipeError: the recipe describes several runs, see `hfvit.multirun`.
    """
    recipe.check_is_one_run()
    args = recipe.training
    if is_already_finished(args):
        if args.should_save:
            folder = printable(args.output_dir)
            print(f"{folder}: finished run. Pass --overwrite_output_dir to start a new one.", flush=True)
        return RunRecord.load(args.output_dir)
    with (
        Display(args) as display,
        quiet_run(args.verbose, display.with_bars),
        log_level(logger.name, display.log_level),
    ):
        log_recipe(recipe)
        if args.device.type == "cpu":
            use_all_cores(args.world_size)
        with lock_folder(args.output_dir, "training") if args.should_save else nullcontext():
            return run(recipe, display, callbacks, train_transforms, **options)


def log_recipe(recipe: Recipe) -> None:
    """Log a starting recipe, and warnings about the options of any recipe."""
    args = recipe.training
    if recipe.source.name == STARTING_RECIPE:
        logger.info(
            "Starting recipe for %s: %s, %d px, batch %d, %g epochs, learning rate %g; see `hfvit inspect`",
            recipe.data.dataset_name,
            recipe.model.model_name_or_path or f"{recipe.model.architecture} from scratch",
            recipe.model.image_size,
            args.global_batch_size,
            args.num_train_epochs,
            args.learning_rate,
        )
    if recipe.ignored and args.process_index == 0:
        logger.warning(recipe.ignored)
    if args.eval_tta and not recipe.augmentation.horizontal_flip and args.process_index == 0:
        logger.warning("eval_tta: flip evaluates mirror images, which horizontal_flip=0 does not train on")


def is_already_finished(args: HFViTTrainingArguments) -> bool:
    """Return whether `--resume_from_checkpoint auto` finds a finished run.

    Its checkpoints, which a kill may have left, are deleted.
    """
    if args.resume_from_checkpoint != "auto" or args.overwrite_output_dir or not is_finished(args.output_dir):
        return False
    if args.should_save and not args.keep_checkpoints:
        remove_checkpoints(args.output_dir)
    return True


def run(
    recipe: Recipe,
    display: Display,
    callbacks: Sequence[TrainerCallback] = (),
    train_transforms: Callable | None = None,
    **options: Any,
) -> RunRecord | None:
    """Train, evaluate, save and report the run of a recipe.

    Args:
        recipe: recipe of `load_recipe`.
        display: display of the run.
        callbacks: callbacks of the trainer.
        train_transforms: replaces the augmentation.
        **options: further arguments of `HFViTTrainer`.

    Returns:
        The run's record, on the main process.
    """
    args = recipe.training
    destination = resolve_destination(args)
    checkpoint = prepare_output_dir(recipe)
    prepared = prepare_run(recipe, checkpoint, callbacks, train_transforms, **options)
    splits, method, trainer = prepared.splits, prepared.method, prepared.trainer
    display.attach(trainer)
    trainer.origin = describe_origin(mask_values(recipe.values), splits.metadata["splits"])
    if checkpoint:
        check_origin(checkpoint, trainer.origin, args.allow_changed_data)

    if args.overwrite_output_dir and args.should_save:
        # Only after everything that a new run needs has been checked.
        clear_run(args.output_dir, checkpoint, recipe.source)
    figure = TrainingImages(prepared) if args.plots and args.should_save else None
    if figure:
        trainer.add_callback(figure)
    elif args.should_save:
        remove_plots(args.output_dir)
    tracking = Tracking(trainer, recipe.values, checkpoint)
    with tracking.closing():
        output = method.train(trainer, checkpoint)
        method.finish(trainer)
        if figure:
            figure.draw()  # a linear probe has no steps

        evaluation = evaluate_splits(prepared, display)
        if evaluation.thresholds:
            prepared.plain_model.config.thresholds = evaluation.thresholds.values
        trainer.save_model(args.output_dir)
        trainer.save_state()
        record = None
        if args.should_save:
            with display.phase("Drawing figures" if args.plots else "Writing the report"):
                record = report_run(prepared, output, evaluation)
            metrics = {split: values.to_json() for split, values in record.metrics.items()}
            tracking.log_results(metrics, record.training.steps)
            summary = run_summary(record, args.output_dir, terminal_width())
            display.result(summary, {"output_dir": args.output_dir, "metrics": metrics})
    if destination:
        push_run(args.output_dir, destination)
    return record


@dataclass
class PreparedRun:
    """Hold the trainer of a run, and what it was built from.

    Args:
        recipe: recipe, fitted to its data.
        splits: splits of `load_splits`.
        method: fine-tuning method, with the model.
        tokenizer: tokenizer of an image-text model, or None.
        datasets: data sets of `build_datasets` by role; `test` may be missing.
        trainer: trainer of the method.
    """

    recipe: Recipe
    splits: ImageSplits
    method: FineTuning
    tokenizer: PreTrainedTokenizerBase | None
    datasets: Mapping[str, Dataset]
    trainer: HFViTTrainer

    @property
    def plain_model(self) -> PreTrainedModel:
        """Return the model without the wrappers of training."""
        return self.trainer.accelerator.unwrap_model(self.method.model)


class TrainingImages(TrainerCallback):
    """Draw training images once, after the first step.

    Importing matplotlib would delay that step.

    Args:
        prepared: the run, whose method selects the images.
    """

    def __init__(self, prepared: PreparedRun):
        self.images, self.targets = prepared.method.training_images(prepared.trainer)
        self.labels = prepared.splits.labels
        self.output_dir = prepared.recipe.training.output_dir
        self.speed = prepared.trainer.speed
        self.is_drawn = False

    def draw(self) -> None:
        """Draw the images, unless they have been drawn."""
        if not self.is_drawn:
            from hfvit.report.plots import write_training_images

            write_training_images(self.images, self.targets, self.labels, self.output_dir)
            self.is_drawn = True

    def on_step_end(self, args, state, control, **kwargs):
        with self.speed.paused():
            self.draw()


def prepare_run(
    recipe: Recipe,
    checkpoint: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    train_transforms: Callable | None = None,
    **options: Any,
) -> PreparedRun:
    """Load the data of a recipe, and build model, data sets and trainer.

    Args:
        recipe: recipe of `load_recipe`, which is fitted to its data.
        checkpoint: checkpoint that the training will resume from, or None.
        callbacks: callbacks of the trainer.
        train_transforms: replaces the augmentation.
        **options: further arguments of `HFViTTrainer`.
    """
    check_model_name(recipe.model)  # before the data set is read, which may take minutes
    splits = load_data(recipe)
    set_seed(recipe.training.seed)
    model, tokenizer = build_model(recipe.model, splits.labels, recipe.data, splits.problem_type)
    method = prepare_finetuning(recipe.finetuning, model)
    if checkpoint:
        check_same_model(checkpoint, model)
        logger.info("Resuming from %s", checkpoint)
    datasets = build_datasets(splits, model.config, recipe, tokenizer, train_transforms)
    if not checkpoint:
        method.initialize(datasets["validation"])
    trainer = build_trainer(recipe, method, datasets, callbacks, **options)
    return PreparedRun(recipe, splits, method, tokenizer, datasets, trainer)


def load_data(recipe: Recipe) -> ImageSplits:
    """Load the splits of a recipe, and fit the recipe to them."""
    args = recipe.training
    with args.main_process_first(desc="loading the data set"):
        splits = load_splits(recipe.data, args.seed, check_length=args.fit_stream)
    recipe.pin(splits.metadata["dataset_commit"], splits.kind.separator)
    logger.info(splits.describe())
    warn_about_sizes(splits)
    fit_recipe(recipe, splits.problem_type, None if recipe.data.streaming else len(splits.train))
    return splits


def fit_recipe(recipe: Recipe, problem_type: str, images: int | None) -> None:
    """Fit a recipe to its data.

    Args:
        recipe: recipe, changed in place.
        problem_type: problem type of the data.
        images: number of training images, None of a stream.
    """
    task = TASKS[problem_type]
    metrics = (*task.scalar_metrics, *task.ranking_metrics)
    recipe.fit_problem(task.problem_type, metrics, task.default_metric)
    if images is not None and recipe.finetuning.finetuning != "linear_probe":
        recipe.fit(images)
    elif images is None:
        recipe.augmentation.check_against(recipe.training)


def resolve_destination(args: HFViTTrainingArguments) -> Destination | None:
    """Check that the run can be pushed to the Hub at the end.

    Returns:
        The destination, None if this process does not push.

    Raises:
        HubError: the repository cannot be pushed to.
    """
    if not (args.push_at_end and args.should_save):
        return None
    return check_destination(
        Destination(args.hub_model_id, args.hub_private_repo, args.hub_revision, token=args.hub_token)
    )


def prepare_output_dir(recipe: Recipe) -> str | None:
    """Claim `output_dir` for the run, without deleting an earlier run yet.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        RecipeError: the folder is not usable.
    """
    args = recipe.training
    if args.overwrite_output_dir:
        check_inputs_are_kept(args.output_dir, recipe.checkpoints)
    with args.main_process_first(local=False, desc="claiming output_dir"):
        checkpoint = claim_output_dir(
            args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, is_main=args.should_save
        )
    if not args.save_on_each_node:
        require_shared_folder(args.output_dir)
    return checkpoint


@dataclass
class Evaluation:
    """Hold predictions and metrics of the evaluated splits by role.

    Args:
        results: logits (images, classes) and labels (images,), or (images, classes) of a multi-label run.
        metrics: metrics of each split.
        thresholds: thresholds of a multi-label run.
    """

    results: dict[str, tuple[np.ndarray, np.ndarray]]
    metrics: dict[str, MultiLabelMetrics | SplitMetrics]
    thresholds: Thresholds | None


def evaluate_splits(prepared: PreparedRun, display: Display) -> Evaluation:
    """Predict the validation and test splits once, after all selection.

    Raises:
        NonFiniteLossError: logits are NaN or infinite.
    """
    trainer, datasets = prepared.trainer, prepared.datasets
    trainer.compute_metrics = None  # computed below
    results = {}
    roles = [role for role in ("validation", "test") if role in datasets]
    with display.phase(f"Evaluating {' and '.join(roles)}"):
        for role in roles:
            prediction = trainer.predict(datasets[role], metric_key_prefix=role)
            results[role] = prediction.predictions, prediction.label_ids
    thresholds = trainer.task.fit_thresholds(results)
    labels = prepared.splits.labels
    metrics = {}
    for role, result in results.items():
        try:
            metrics[role] = trainer.task.metrics(*result, labels, thresholds)
        except NonFiniteLossError as error:
            saved = f" The last checkpoint is {trainer.last_checkpoint}." if trainer.last_checkpoint else ""
            raise NonFiniteLossError(f"{role}: {error}{saved}") from None
    return Evaluation(results, metrics, thresholds)


def report_run(prepared: PreparedRun, output: TrainOutput, evaluation: Evaluation) -> RunRecord:
    """Write record, recipe, examples, plots and model card.

    Args:
        prepared: parts of the run, after training.
        output: output of the training.
        evaluation: result of `evaluate_splits`.
    """
    recipe, splits, trainer = prepared.recipe, prepared.splits, prepared.trainer
    args = recipe.training
    plain_model = prepared.plain_model
    for role, (_, targets) in evaluation.results.items():
        splits.metadata["splits"][role]["rows"] = len(targets)  # of a stream unknown before
    record = RunRecord.collect(recipe, splits, plain_model, trainer, output, evaluation.metrics)
    record.model.description = describe_architecture(plain_model.timm_model)
    record.temperature = trainer.task.calibrate(evaluation.results)
    record.thresholds = evaluation.thresholds
    record.out_of_distribution = trainer.task.fit_out_of_distribution(evaluation.results)
    role = record.role
    answers = answers_of(*evaluation.results[role], splits.labels, plain_model.config)
    examples = select_examples(splits, role, prepared.datasets[role], answers)
    examples.add_explanations(plain_model, trainer.preprocessing, args.device, trainer.is_sharded)
    examples.write(args.output_dir)
    record.examples = examples.record
    if args.save_predictions:
        root = data_root(recipe.data.dataset_name) if splits.metadata["is_local"] else None
        write_predictions(args.output_dir, splits, evaluation.results, root)
    if prepared.tokenizer:
        prepared.tokenizer.save_pretrained(args.output_dir)
    write_text(Path(args.output_dir) / RECIPE_FILE, recipe.to_yaml())
    record.save(args.output_dir)
    if args.plots:
        from hfvit.report.plots import write_plots

        write_plots(record, args.output_dir)
    write_model_card(record, args.output_dir)
    mark_finished(args.output_dir)
    sync_files(Path(args.output_dir))  # before the checkpoints are removed
    if not args.keep_checkpoints:
        remove_checkpoints(args.output_dir)
    return record


def select_examples(
    splits: ImageSplits, role: str, dataset: Dataset, answers: ClassAnswers | LabelAnswers
) -> Examples:
    """Select the example images of a split, of a stream among its first images.

    Args:
        splits: splits of `load_splits`.
        role: role of the split.
        dataset: data set of `build_datasets`.
        answers: predictions of the model.
    """
    if isinstance(dataset, EvaluationStream):
        # The rows before a shard are only known if all images of the split are evaluated.
        rows = range(dataset.images) if dataset.limit is None else None
        return Examples(role, dataset.first(STREAMED_EXAMPLES), rows, answers)
    images = splits[role].select_columns(["image"])
    root = data_root(splits.metadata["dataset_name"]) if splits.metadata["is_local"] else None
    rows = read_column(splits[role], "row").to_numpy()
    return Examples(role, dataset, rows, answers, lambda place: image_file(images[place]["image"], root))


def push_run(output_dir: str, destination: Destination) -> None:
    """Push the finished run; a failure is printed, as the run itself has succeeded."""
    try:
        print(push_to(output_dir, destination))
    except HubError as error:
        reason = printable_lines(str(error))
        print(f"hfvit: the run is finished and saved; the push failed: {reason}", file=sys.stderr)
