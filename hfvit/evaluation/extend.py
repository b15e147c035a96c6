"""Add classes to a trained classifier from a few images each, without training."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import hfvit
from hfvit.artifacts.artifact import revision_arguments
from hfvit.artifacts.constants import PREPROCESSOR_FILE
from hfvit.artifacts.extension_record import ExtensionRecord
from hfvit.data.decode import find_images, is_hidden, read_image
from hfvit.data.labels import normalized
from hfvit.errors import DataError, ModelError, printable
from hfvit.evaluation.derived_checkpoint import empty_folder, save_checkpoint
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import Classifier, load_classifier
from hfvit.inference.embed import check_embeds, embed, find_head
from hfvit.models.freezing import classifier_parameters
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.utils.checks import check_integer
from hfvit.utils.files import expand_user, write_object
from hfvit.utils.formatting import shortened
from hfvit.utils.global_state import kept_state
from hfvit.utils.quiet import hidden_loading_bars

logger = logging.getLogger(__name__)

SCALES = np.geomspace(1e-2, 1e2, 41)  # of the prototypes' scores
MAX_CLASSES_SHOWN = 5


def extend(
    run: str | Path,
    folder: str | Path,
    output_dir: str | Path,
    *,
    dataset_name: str | None = None,
    split: str | None = None,
    max_samples: int | None = 5000,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> ExtensionRecord:
    """Add the classes of a folder to a checkpoint, and save the larger checkpoint.

    The rows of the head of the old classes stay. The row of a new class is the mean feature of its images (weight
    imprinting, https://arxiv.org/abs/1712.07136). One scale and one offset for all new rows balance old and new
    classes: they are chosen on the even rows of the old classes' labeled split and on the new images, and the accuracy
    of the old classes is that of the odd rows. New images are classified by prototypes of the other images
    (leave-one-out).

    Args:
        run: checkpoint folder or Hub id of a timm model with a linear head.
        folder: folder with a subfolder of images for each new class.
        output_dir: folder for the checkpoint, which must be empty or new.
        dataset_name: labeled images of the old classes. Default: the data set of the run's recipe.
        split: split of the data set. Default: the validation images of the recipe.
        max_samples: largest number of labeled images of the old classes, sampled. None: all.
        batch_size: number of images per forward pass. Default: that of the device.
        device: `cpu`, `cuda`, ... Default: CUDA if available.
        revision: branch, tag or commit of the run, if it is a Hub id. Default: main.

    Returns:
        Accuracies of old and new classes, also saved as extension.json.

    Raises:
        ModelError: the model is no timm checkpoint with one linear head, or has several labels per image.
        DataError: there are no images of a new class, or a class is not new.
    """
    check_integer("max_samples", max_samples)
    check_integer("batch_size", batch_size)
    hub = revision_arguments(run, revision)
    with empty_folder(output_dir) as target:
        images = _images_by_class(folder)
        classifier = load_classifier(run, device, **hub)
        head = _linear_head(classifier)
        known = sorted(set(images) & set(map(normalized, classifier.labels)))
        if known:
            raise DataError(
                f"FOLDER: {_listed(known)} of {folder} are already classes of {run}. Rename or remove them."
            )
        old = evaluation_split(run, dataset_name=dataset_name, split=split, max_samples=max_samples, revision=revision)
        old_features = embed(classifier, old.images(), batch_size=batch_size)
        new = {name: _read_features(classifier, name, files, batch_size) for name, files in images.items()}
        weight, bias = (tensor.detach().float().cpu().numpy() for tensor in (head.weight, head.bias))
        rows = fit_prototypes(weight, bias, old_features[::2], old.labels[::2], list(new.values()))
        half = slice(1, None, 2) if len(old) > 1 else slice(None)
        judged, labels = old_features[half], old.labels[half]
        logits = judged @ weight.T + bias
        extended = np.concatenate([logits, judged @ rows.weight.T + rows.bias], axis=1)
        with kept_state(), hidden_loading_bars():  # the new head is initialized before it is replaced
            _save(run, hub, list(images), rows, target)
        record = ExtensionRecord(
            hfvit_version=hfvit.__version__,
            new_classes=list(images),
            images=[len(features) for features in new.values()],
            old_images=len(labels),
            old_accuracy_before=float((logits.argmax(axis=1) == labels).mean()),
            old_accuracy=float((extended.argmax(axis=1) == labels).mean()),
            new_accuracy=new_accuracy(weight, bias, rows, list(new.values())),
        )
        write_object(target / record.FILE, record.to_json())
        return record


@dataclass
class Rows:
    """Rows of a linear head for new classes.

    Attributes:
        weight: (classes, dimensions).
        bias: (classes,).
        scale: factor of the prototypes' scores in `weight` and `bias`.
        offset: added to the scores of all new classes in `bias`.
        center: mean feature of the old classes, the origin of the scores.
    """

    weight: np.ndarray
    bias: np.ndarray
    scale: float
    offset: float
    center: np.ndarray


def fit_prototypes(
    weight: np.ndarray, bias: np.ndarray, old_features: np.ndarray, old_labels: np.ndarray, new: list[np.ndarray]
) -> Rows:
    """Compute rows of a linear head for new classes.

    The logit of a new class is the mean of the old logits, plus a scaled score and an offset. The score of a prototype
    is half the difference of the squared distances to the center and to the prototype. Scale and offset maximize the
    mean of the accuracies of old and new images; of equal ones, rows of the usual length, and the largest margin, are
    preferred.

    Args:
        weight: weight of the head (old classes, dimensions).
        bias: bias of the head (old classes,).
        old_features: features of images of the old classes (images, dimensions).
        old_labels: their classes (images,).
        new: features of the images of each new class (images, dimensions).
    """
    center = old_features.mean(axis=0)
    means = np.stack([features.mean(axis=0) for features in new])
    # Softmax ignores what all rows have in common, so that it has an arbitrary size.
    common_weight = weight.mean(axis=0)
    common_bias = bias.mean()
    own_weight = weight - common_weight
    own_bias = bias - common_bias
    old_logits = old_features @ own_weight.T + own_bias
    old_scores = prototype_scores(old_features, means, center)
    new_scores, new_labels = leave_one_out_scores(new, center)
    rivals = (np.concatenate(new) @ own_weight.T + own_bias).max(axis=1)
    is_right = old_logits.argmax(axis=1) == old_labels
    is_found = new_scores.argmax(axis=1) == new_labels
    prototypes = means - center
    unit = np.linalg.norm(own_weight, axis=1).mean() / max(np.linalg.norm(prototypes, axis=1).mean(), 1e-12)
    best = (-1.0, 0.0, unit, 0.0)
    for factor in SCALES:
        scale = factor * unit
        # An image of an old class keeps it below the first offset, a new one gets its class above the second.
        keeps = np.sort(np.where(is_right, old_logits.max(axis=1) - scale * old_scores.max(axis=1), -np.inf))
        gets = np.sort(np.where(is_found, rivals - scale * new_scores.max(axis=1), np.inf))
        edges = np.concatenate([keeps, gets])
        edges = np.unique(edges[np.isfinite(edges)])
        if len(edges) < 2:
            continue
        offsets = (edges[1:] + edges[:-1]) / 2
        kept = 1 - np.searchsorted(keeps, offsets) / len(keeps)
        got = np.searchsorted(gets, offsets) / len(gets)
        both = np.round(kept + got, 9)
        place = int(np.where(both == both.max(), edges[1:] - edges[:-1], -1).argmax())
        best = max(best, (float(both[place]), -abs(float(np.log(factor))), float(scale), float(offsets[place])))
    *_, scale, offset = best
    biases = offset - scale * (prototypes @ center + (prototypes**2).sum(axis=1) / 2)
    return Rows(common_weight + scale * prototypes, common_bias + biases, scale, offset, center)


def prototype_scores(features: np.ndarray, prototypes: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Return the score of each prototype (images, classes), see `fit_prototypes`.

    Args:
        features: (images, dimensions).
        prototypes: (classes, dimensions).
        center: origin of the scores (dimensions,).
    """
    prototypes = prototypes - center
    return (features - center) @ prototypes.T - (prototypes**2).sum(axis=1) / 2


def leave_one_out_scores(new: list[np.ndarray], center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and classes of new images, leave-one-out.

    The prototype of an image's own class is the mean of the other images of the class, if there are others.

    Args:
        new: features of the images of each class (images, dimensions).
        center: origin of the scores (dimensions,).
    """
    means = np.stack([features.mean(axis=0) for features in new])
    scores = []
    for label, features in enumerate(new):
        own = prototype_scores(features, means, center)
        if len(features) > 1:
            others = (len(features) * means[label] - features) / (len(features) - 1) - center
            own[:, label] = ((features - center) * others).sum(axis=1) - (others**2).sum(axis=1) / 2
        scores.append(own)
    return np.concatenate(scores), np.repeat(np.arange(len(new)), [len(features) for features in new])


def new_accuracy(weight: np.ndarray, bias: np.ndarray, rows: Rows, new: list[np.ndarray]) -> float | None:
    """Return the leave-one-out accuracy, None if no class has two images.

    Args:
        weight: weight of the head (old classes, dimensions).
        bias: bias of the head (old classes,).
        rows: rows of the new classes.
        new: features of the images of each new class (images, dimensions).
    """
    scores, labels = leave_one_out_scores(new, rows.center)
    logits = np.concatenate(new) @ weight.T + bias
    own = rows.scale * scores + rows.offset + logits.mean(axis=1, keepdims=True)
    logits = np.concatenate([logits, own], axis=1)
    counted = np.repeat([len(features) > 1 for features in new], [len(features) for features in new])
    hits = logits.argmax(axis=1) == labels + len(weight)
    return float(hits[counted].mean()) if counted.any() else None


def _images_by_class(folder: str | Path) -> dict[str, list[str]]:
    """Return the image files of each subfolder.

    Raises:
        DataError: there is no subfolder, or one without images.
    """
    root = expand_user(folder)
    if not root.is_dir():
        raise DataError(f"FOLDER: no such folder, got {folder}. Pass a folder with a subfolder for each new class.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name))
    images: dict[str, list[str]] = {}
    for path in folders:  # two folders may be two Unicode forms of one name
        images[normalized(path.name)] = images.get(normalized(path.name), []) + find_images([str(path)])[0]
    empty = [name for name, files in images.items() if not files]
    if not images or empty:
        problem = f"no image in {_listed(empty)}" if empty else "no subfolder with images"
        raise DataError(f"FOLDER: {problem}, got {folder}. Each new class needs a subfolder with at least one image.")
    return images


def _read_features(classifier: Classifier, name: str, files: list[str], batch_size: int | None) -> np.ndarray:
    """Return the features of the readable images of a class; the others are logged.

    Args:
        classifier: classifier of a checkpoint.
        name: name of the class.
        files: its image files.
        batch_size: number of images per forward pass. Default: that of the device.

    Raises:
        DataError: none can be read.
    """
    readable = []
    for file in files:
        try:
            read_image(file)
        except DataError as error:
            logger.warning("%s", error)
        else:
            readable.append(file)
    if not readable:
        raise DataError(f"FOLDER: no readable image of the class {printable(name)}.")
    return embed(classifier, readable, batch_size=batch_size)


def _linear_head(classifier: Classifier) -> nn.Linear:
    """Return the linear head of a timm model.

    Raises `ModelError` for another kind of classifier.
    """
    check_embeds(classifier)
    network = getattr(classifier.backend.model, "timm_model", None)
    head = find_head(classifier)
    is_linear = type(head) is nn.Linear and head.bias is not None
    if network is None or not is_linear or len(classifier_parameters(network)) != 2:
        raise ModelError(f"RUN: requires a timm model with one linear head, got {classifier.name}.")
    if classifier.multi_label:
        raise ModelError(f"RUN: requires one class per image, but {classifier.name} predicts several labels.")
    return head


def _save(run: str | Path, hub: dict[str, str], names: list[str], rows: Rows, target: Path) -> None:
    """Save the checkpoint with the rows of the new classes.

    Args:
        run: checkpoint folder or Hub id.
        hub: arguments of `from_pretrained` for the Hub.
        names: new classes.
        rows: their rows of the head.
        target: output folder.
    """
    old = HFViTForImageClassification.from_pretrained(run, **hub)
    model = HFViTForImageClassification.from_pretrained(run, labels=[*old.config.label_names, *names], **hub)
    with torch.no_grad():
        for parameter, before, added in zip(
            classifier_parameters(model.timm_model),
            classifier_parameters(old.timm_model),
            (rows.weight, rows.bias),
            strict=True,
        ):
            parameter.copy_(torch.cat([before, torch.from_numpy(added).to(before.dtype)]))
    save_checkpoint(model, target, run, (PREPROCESSOR_FILE,))


def _listed(names: list[str]) -> str:
    return printable(shortened(names, MAX_CLASSES_SHOWN))
