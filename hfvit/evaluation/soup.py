"""Average the weights of several finished runs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import hfvit
from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import PREPROCESSOR_FILE, RECIPE_FILE
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.soup_record import SoupRecord
from hfvit.errors import DataError, ModelError, NonFiniteLossError
from hfvit.evaluation.derived_checkpoint import empty_folder, save_checkpoint
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import load_classifier
from hfvit.metrics.task import check_finite, task_of
from hfvit.models.configuration import HFViTConfig, load_config
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.models.soup import Weights, cook_soup
from hfvit.recipe.arguments import DROP_RATES, GREEDY, SOUPS
from hfvit.utils.checks import check_integer
from hfvit.utils.files import expand_user, write_object
from hfvit.utils.quiet import hidden_loading_bars

# Values of a configuration that all members of a soup must share.
SHARED = ("architecture", "model_args", "label_names", "problem_type", "pretrained_cfg")
# Of `model_args`, those that only training uses.
DROPOUT = (*DROP_RATES, "proj_drop_rate", "pos_drop_rate")


def soup(
    runs: Iterable[str | Path],
    output_dir: str | Path,
    *,
    kind: str = GREEDY,
    dataset_name: str | None = None,
    split: str | None = None,
    max_samples: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> SoupRecord:
    """Average the weights of several runs, and save the checkpoint.

    See https://arxiv.org/abs/2203.05482.

    Args:
        runs: two or more output folders or Hub ids, of one architecture with the same classes. One that is passed
            twice counts once.
        output_dir: folder for the checkpoint, which must be empty or new.
        kind: "greedy" to add one run after the other, the best first, as long as the accuracy or mAP does not drop;
            "uniform" for the mean of all.
        dataset_name: labeled images. Default: the data set of the first run's recipe.
        split: split of the data set, on which no run was trained. Default: the validation images of the recipe, which
            must be those of all runs.
        max_samples: number of images, sampled. Default: all.
        batch_size: number of images per forward pass. Default: that of the device.
        device: `cpu`, `cuda`, ... Default: CUDA if available.

    Returns:
        Scores of the runs and of the mean, also saved as soup.json.

    Raises:
        ModelError: a run cannot be loaded, or has another architecture, classes or preprocessing than the first.
        DataError: the runs have different validation images, or the images cannot be used.
        NonFiniteLossError: logits of a run or of the mean are NaN or infinite.
    """
    if kind not in SOUPS:
        raise ModelError(f"kind: must be one of {', '.join(SOUPS)}, got {kind!r}.")
    check_integer("max_samples", max_samples)
    check_integer("batch_size", batch_size)
    runs = [runs] if isinstance(runs, str | Path) else runs
    names = list(dict.fromkeys(str(expand_user(run)) for run in runs))  # `a/` is `a`
    if len(names) < 2:
        raise ModelError(f"RUN: must be two or more different runs, got {len(names)}. Pass more runs.")
    config = check_same_networks(names)
    with empty_folder(output_dir) as target:
        if dataset_name is None and split is None:
            check_same_validation_images(names)
        labeled = evaluation_split(names[0], dataset_name=dataset_name, split=split, max_samples=max_samples)
        task = task_of(config)
        classifier = load_classifier(names[0], device)
        logits = {}

        def read(name: str) -> Weights:
            with hidden_loading_bars():
                return HFViTForImageClassification.from_pretrained(name).float().state_dict()

        def score(weights: Weights, name: str | None) -> float:
            classifier.backend.model.load_state_dict(weights)
            logits["last"] = classifier.logits(labeled.images(), batch_size)
            try:
                check_finite(logits["last"])
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"RUN: {name or 'the mean of the runs'}: {error}") from None
            return task.scalars(logits["last"], labeled.labels, labeled.classes)[task.default_metric]

        result, weights = cook_soup(kind, names, read, score, metric=task.default_metric)
        thresholds = None
        if labeled.labels.ndim > 1:
            score(weights, None)
            thresholds = task.fit_thresholds({"validation": (logits["last"], labeled.labels)}).values
        with hidden_loading_bars():
            save_soup(names[0], weights, thresholds, target)
        for member in result.members:
            member.name = Path(member.name).name if find_artifact(member.name).folder else member.name
        record = SoupRecord(hfvit_version=hfvit.__version__, soup=result, data=labeled.record)
        write_object(target / record.FILE, record.to_json())
        return record


def check_same_networks(names: Sequence[str]) -> HFViTConfig:
    """Return the configuration that all runs share.

    Raises `ModelError` if one differs.

    Args:
        names: checkpoint folders or Hub ids.
    """
    configs = []
    for name in names:
        if not find_artifact(name).is_checkpoint:
            raise ModelError(f"RUN: must be a checkpoint, got {name}.")
        try:
            configs.append(load_config(name))
        except ModelError as error:
            raise ModelError(f"RUN: {str(error).removeprefix('model_name_or_path: ')}") from None
    first, *others = configs
    for name, config in zip(names[1:], others, strict=True):
        for key in SHARED:
            if _shared(first, key) != _shared(config, key):
                raise ModelError(f"RUN: {key} of {name} differs from that of {names[0]}. Pass runs that share it.")
    return first


def _shared(config: HFViTConfig, key: str) -> Any:
    """Return a value that all members must share, without rates of dropout."""
    value = getattr(config, key, None)
    if key == "model_args":
        return {name: own for name, own in (value or {}).items() if name not in DROPOUT}
    return value


def check_same_validation_images(names: Sequence[str]) -> None:
    """Raise `DataError` unless all runs have the same validation images.

    Otherwise some runs would be judged by images that they were trained on.

    Args:
        names: checkpoint folders.
    """
    found = {}
    remedy = "Pass --dataset_name or --split with images that no run was trained on"
    for name in names:
        folder = find_artifact(name).folder
        if folder is None:
            raise DataError(f"--dataset_name: required, as the validation images of {name} on the Hub are not known.")
        record = RunRecord.load(folder)
        images = record.data.splits.get("validation")
        found[name] = None
        if images and images.fingerprint:
            # The fingerprint of a streamed data set is that of all its configurations and splits.
            found[name] = (record.data.dataset_config_name, images.source, images.rows, images.fingerprint)
    first, *others = found.items()
    for name, description in others:
        if description is None or description != first[1]:
            raise DataError(
                f"RUN: {name} has other validation images than {first[0]}. {remedy}, or train them with the same seed"
                " or validation_split."
            )


def save_soup(run: str, weights: Weights, thresholds: Sequence[float] | None, target: Path) -> None:
    """Save the checkpoint, with preprocessing and recipe of the first run.

    Args:
        run: checkpoint folder or Hub id of the first run.
        weights: averaged weights.
        thresholds: thresholds of a multi-label model, or None.
        target: output folder.
    """
    model = HFViTForImageClassification.from_pretrained(run)
    model.load_state_dict(weights)
    if thresholds is not None:
        model.config.thresholds = list(thresholds)
    save_checkpoint(model, target, run, (PREPROCESSOR_FILE, RECIPE_FILE))
