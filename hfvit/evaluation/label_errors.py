"""Find suspicious labels by the predictions of a trained run."""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import OUT_OF_FOLD_FILE, RECIPE_FILE
from hfvit.data.decode import decode
from hfvit.data.inspect import ImageNames, Opened, open_data
from hfvit.data.inspection import ImageName, LabelCheck, Suspect
from hfvit.data.labels import read_column, targets_of
from hfvit.errors import DataError, ModelError
from hfvit.evaluation.predictions import read_out_of_fold
from hfvit.evaluation.split import read_recipe
from hfvit.inference.classifier import Classifier, load_classifier
from hfvit.inference.embed import with_features
from hfvit.metrics.label_errors import confident_disagreements
from hfvit.utils.files import expand_user
from hfvit.utils.quiet import quiet_run

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
    recipe = expand_user(run) / "fold_0" / RECIPE_FILE if has_folds(run) else find_artifact(run).beside(RECIPE_FILE)
    if recipe is None:
        return None
    data, seed = read_recipe(recipe)
    if os.path.realpath(expand_user(data.dataset_name)) != os.path.realpath(expand_user(dataset)):
        return None
    return open_data(dataclasses.replace(data, **fields), seed)


def find_label_errors(
    run: str | Path, opened: Opened, has_trained_on: bool = True, show_progress: bool = True
) -> LabelCheck:
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
        The images with suspicious labels, the most confident first. Images that cannot be decoded are left out.

    Raises:
        DataError: the classes of the data set are not those of the model.
        ModelError: the run cannot be loaded, or has a text encoder.
    """
    splits = opened.splits
    if np.asarray(splits.train[:1]["label"]).ndim == 2:
        raise DataError("--run: not available with several labels per image. Omit it.")
    if has_folds(run):
        return _find_out_of_fold(expand_user(run), opened, has_trained_on)
    with quiet_run(with_bars=True):
        classifier = load_classifier(run)
    _check_classes(run, opened, classifier.labels)
    if classifier.multi_label:
        raise DataError("--run: not available with several labels per image. Omit it.")
    if classifier.text_reader:
        raise ModelError(f"--run: {run} needs texts. Pass a run that classifies images only.")
    order = [classifier.labels.index(label) for label in splits.labels]
    names = ImageNames(opened)
    suspects: list[Suspect] = []
    agreed: list[np.ndarray] = []
    with_probe = has_trained_on and len(splits.train) <= MAX_PROBE_IMAGES
    for role in splits.sources:
        rows, logits, features = _predict(classifier, splits[role], role, show_progress)
        labels = targets_of(splits[role])[rows]
        probabilities = softmax(logits[:, order], axis=1)
        if role == "train" and with_probe:
            probabilities = cross_validated(features, labels, len(splits.labels))
        predicted = np.nan_to_num(probabilities).argmax(axis=1)
        agreed.append((predicted == labels)[~np.isnan(probabilities).any(axis=1)])
        for index in suspicious_rows(probabilities, labels):
            suspects.append(_suspect(names(role, rows[index]), splits.labels, probabilities[index], labels[index]))
    suspects.sort(key=lambda suspect: suspect.label_probability - suspect.probability)
    source = f"by {Path(run).name}"
    if with_probe:
        source += "; training images by a linear probe on its features, cross-validated"
    elif has_trained_on:
        source += ", which was trained on the training images and may have learned their wrong labels"
    agreement = np.concatenate(agreed)
    return LabelCheck(source=source, agreement=float(agreement.mean()) if len(agreement) else 0.0, suspects=suspects)


def has_folds(run: str | Path) -> bool:
    """Return whether `run` is a folder with the runs of cross-validation."""
    return (expand_user(run) / OUT_OF_FOLD_FILE).is_file()


def _check_classes(run: str | Path, opened: Opened, labels: Sequence[str]) -> None:
    """Raise `DataError` if a run has other classes than a data set.

    Args:
        run: output folder of the run, for messages.
        opened: data set.
        labels: class names of the run.
    """
    other = sorted(set(opened.splits.labels) ^ set(labels))
    if other:
        raise DataError(
            f"--run: must have the classes of {opened.data.dataset_name}, got {run} ({', '.join(other[:5])} differ)."
            " Pass a run that was trained on these classes."
        )


def _suspect(image: ImageName, classes: Sequence[str], probabilities: np.ndarray, label: int) -> Suspect:
    """Describe an image with a suspicious label.

    Args:
        image: the image.
        classes: class names.
        probabilities: probability of each class `(classes,)`.
        label: class of the image.
    """
    predicted = int(probabilities.argmax())
    return Suspect(
        image=image,
        predicted=classes[predicted],
        probability=float(probabilities[predicted]),
        label_probability=float(probabilities[label]),
    )


def _find_out_of_fold(folder: Path, opened: Opened, has_trained_on: bool) -> LabelCheck:
    """Find suspicious labels by the out-of-fold predictions of cross-validation.

    Args:
        folder: folder of the runs.
        opened: data set, with the splits of the first fold.
        has_trained_on: whether the folds are of this data set.
    """
    if not has_trained_on:
        raise DataError(f"--run: {folder} has folds of another data set. Pass a single run.")
    found = read_out_of_fold(folder)
    splits = opened.splits
    _check_classes(folder, opened, found.classes)
    order = [found.classes.index(label) for label in splits.labels]
    place_of = {row: place for place, row in enumerate(found.rows.tolist())}
    names = ImageNames(opened)
    images = [
        (role, index, place_of[row], label)
        for role in ("train", "validation")
        for index, (row, label) in enumerate(
            zip(read_column(splits[role], "row").to_pylist(), targets_of(splits[role]), strict=True)
        )
        if row in place_of
    ]
    labels = np.array([label for *_, label in images], np.int64)
    places = np.array([place for _, _, place, _ in images], np.int64)
    if not len(labels) or (np.array(order)[labels] != found.labels[places]).any():
        raise DataError(f"--run: the data set has changed since {folder} was trained. Train the folds again.")
    probabilities = found.probabilities[places][:, order]
    suspects = [
        _suspect(names(*images[index][:2]), splits.labels, probabilities[index], labels[index])
        for index in suspicious_rows(probabilities, labels)
    ]
    suspects.sort(key=lambda suspect: suspect.label_probability - suspect.probability)
    source = f"by {folder.name}, each image by the fold that was not trained on it"
    agreement = float((probabilities.argmax(axis=1) == labels).mean())
    return LabelCheck(source=source, agreement=agreement, suspects=suspects)


def suspicious_rows(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rows with a suspicious label.

    Args:
        probabilities: `(images, classes)`, NaN for an image without a prediction.
        labels: class indices `(images,)`.
    """
    rows = np.flatnonzero(~np.isnan(probabilities).any(axis=1))
    known = probabilities[rows]
    return rows[
        confident_disagreements(
            known.argmax(axis=1), known.max(axis=1), labels[rows], known[np.arange(len(rows)), labels[rows]]
        )
    ]


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


def _predict(
    classifier: Classifier, split: Any, role: str, show_progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows that can be decoded, their logits and their features.

    Features are the inputs of the head, or the logits if there is no head.
    """
    rows: list[int] = []
    logits = [np.empty((0, len(classifier.labels)), np.float32)]
    features = []
    bar = tqdm(total=len(split), desc=f"Predicting {role}", unit="image", disable=None if show_progress else True,
               leave=False)  # fmt: skip
    with bar, with_features(classifier) as run:
        for start in range(0, len(split), BATCH):
            images = split[start : start + BATCH]["image"]
            decoded = []
            for row, image in enumerate(images, start):
                with suppress(DataError):
                    decoded.append(decode(image, role, row))
                    rows.append(row)
            if decoded:
                found, inputs = run(classifier, classifier.prepare(decoded))
                logits.append(found)
                features.append(found if inputs is None else inputs)
            bar.update(len(images))
    found = np.concatenate(logits)
    return np.array(rows, np.int64), found, np.concatenate(features) if features else found
