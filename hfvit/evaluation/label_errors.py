"""Find suspicious labels by the predictions of a trained run."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm.auto import tqdm

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.data.decode import decode
from hfvit.data.inspect import ImageNames, Opened, Suspect, open_data
from hfvit.errors import DataError, ModelError
from hfvit.evaluation.split import read_recipe
from hfvit.inference.backends import TorchBackend
from hfvit.inference.classifier import Classifier, load_classifier
from hfvit.utils.files import expand_user
from hfvit.utils.quiet import quiet_libraries

FOLDS = 5
MAX_PROBE_IMAGES = 20_000  # with more training images, the fit takes longer than the features
BATCH = 32


def open_as_trained(run: str | Path, dataset: str | Path, **fields: Any) -> Opened | None:
    """Open a data set with the splits of a run that was trained on it.

    Args:
        run: output folder, or another argument of `load_classifier`.
        dataset: data set, as `dataset_name` of a recipe.
        **fields: keys of `DataArguments`, which override those of the run.

    Returns:
        The data set, None if the run was trained on another one.
    """
    recipe = find_artifact(run).beside(RECIPE_FILE)
    if recipe is None:
        return None
    data, seed = read_recipe(recipe)
    if os.path.realpath(expand_user(data.dataset_name)) != os.path.realpath(expand_user(dataset)):
        return None
    return open_data(dataclasses.replace(data, **fields), seed)


def find_label_errors(
    run: str | Path, opened: Opened, has_trained_on: bool = True, show_progress: bool = True
) -> tuple[list[Suspect], str]:
    """Find suspicious labels by confident learning (https://arxiv.org/abs/1911.00068).

    A label is suspicious if another class is predicted, with at least the mean probability of that class over the
    images labeled with it. A model has also learned wrong labels of its training images; these are therefore predicted
    by a linear probe on the features of the model, with cross-validation in five folds.

    Args:
        run: output folder, or another argument of `load_classifier`.
        opened: data set, with the splits of the run if it was trained on it.
        has_trained_on: whether the run was trained on the training split.
        show_progress: show progress bars on standard error.

    Returns:
        (images with suspicious labels, the most confident first; description of the method).

    Raises:
        DataError: the classes of the data set are not those of the model, or an image cannot be decoded.
        ModelError: the run cannot be loaded, or has a text encoder.
    """
    quiet_libraries()
    classifier = load_classifier(run)
    splits = opened.splits
    if set(classifier.labels) != set(splits.labels):
        other = sorted(set(splits.labels) ^ set(classifier.labels))
        raise DataError(
            f"--run: must have the classes of {opened.data.dataset_name}, got {run} ({', '.join(other[:5])} differ)."
            " Pass a run that was trained on these classes."
        )
    if np.asarray(splits.train[:1]["label"]).ndim == 2 or classifier.multi_label:
        raise DataError("--run: not available with several labels per image. Omit it.")
    if classifier.text_reader:
        raise ModelError(f"--run: {run} needs texts. Pass a run that classifies images only.")
    order = [classifier.labels.index(label) for label in splits.labels]
    names = ImageNames(opened)
    suspects: list[Suspect] = []
    with_probe = has_trained_on and len(splits.train) <= MAX_PROBE_IMAGES
    for role in splits.sources:
        labels = np.asarray(splits[role]["label"])
        logits, features = _predict(classifier, splits[role], role, show_progress)
        probabilities = softmax(logits[:, order], axis=1)
        if role == "train" and with_probe:
            probabilities = cross_validated(features, labels, len(splits.labels))
        for row in suspicious_rows(probabilities, labels):
            predicted = int(probabilities[row].argmax())
            suspects.append(
                Suspect(
                    image=names(role, row),
                    predicted=splits.labels[predicted],
                    probability=float(probabilities[row, predicted]),
                    label_probability=float(probabilities[row, labels[row]]),
                )
            )
    suspects.sort(key=lambda suspect: suspect.label_probability - suspect.probability)
    how = f"by {Path(run).name}"
    if with_probe:
        how += "; training images by a linear probe on its features, cross-validated"
    elif has_trained_on:
        how += ", which was trained on the training images and may have learned their wrong labels"
    return suspects, how


def suspicious_rows(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rows with a suspicious label.

    Args:
        probabilities: `(images, classes)`, NaN for an image without a prediction.
        labels: class indices `(images,)`.
    """
    predicted = np.nan_to_num(probabilities).argmax(1)
    own = np.full(probabilities.shape[1], np.inf)
    for label in np.unique(labels):
        some = probabilities[labels == label, label]
        if not np.isnan(some).all():
            own[label] = np.nanmean(some)
    best = np.take_along_axis(probabilities, predicted[:, None], 1)[:, 0]
    return np.flatnonzero((predicted != labels) & (best >= own[predicted]))


def cross_validated(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Predict class probabilities with a cross-validated logistic regression.

    Args:
        features: `(images, dimensions)`.
        labels: class indices `(images,)`.
        classes: number of classes.

    Returns:
        Probabilities `(images, classes)`, NaN for images of classes with fewer images than folds.
    """
    found = np.full((len(labels), classes), np.nan)
    enough = np.bincount(labels, minlength=classes) >= FOLDS
    rows = np.flatnonzero(enough[labels])
    present = np.unique(labels[rows])
    if len(present) < 2:
        return found
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(probe, features[rows], labels[rows], cv=folds, method="predict_proba")
    found[rows] = 0.0
    found[np.ix_(rows, present)] = predicted
    return found


def _predict(classifier: Classifier, split: Any, role: str, show_progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of a split, and the inputs of the head, or the logits again without a head."""
    logits = []
    bar = tqdm(total=len(split), desc=f"Predicting {role}", unit="image", disable=None if show_progress else True,
               leave=False)  # fmt: skip
    with bar, _head_inputs(classifier) as features:
        for start in range(0, len(split), BATCH):
            images = split[start : start + BATCH]["image"]
            decoded = (decode(image, role, start + index) for index, image in enumerate(images))
            logits.append(classifier.run(classifier.prepare(decoded)))
            bar.update(len(images))
    found = np.concatenate(logits)
    return found, np.concatenate(features) if features else found


@contextmanager
def _head_inputs(classifier: Classifier) -> Iterator[list[np.ndarray]]:
    """Collect the inputs of a timm model's head while the model runs."""
    features: list[np.ndarray] = []
    timm_model = getattr(getattr(classifier.backend, "model", None), "timm_model", None)
    head = timm_model.get_classifier() if isinstance(classifier.backend, TorchBackend) and timm_model else None
    if not isinstance(head, nn.Module):
        yield features
        return

    def collect(module: nn.Module, inputs: tuple) -> None:
        features.append(inputs[0].float().flatten(1).cpu().numpy())

    handle = head.register_forward_pre_hook(collect)
    try:
        yield features
    finally:
        handle.remove()
