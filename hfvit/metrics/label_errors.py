"""Find wrong labels by confident learning (https://arxiv.org/abs/1911.00068)."""

import numpy as np

WEAK_MODEL = 0.7  # fraction of the labels that a model predicts, below which it cannot judge them


def confident_disagreements(
    predicted: np.ndarray, confidence: np.ndarray, labels: np.ndarray, label_probability: np.ndarray
) -> np.ndarray:
    """Return the rows that are confidently predicted as another class.

    A prediction is confident if its probability is at least the mean over the images that are labeled as its class.

    Args:
        predicted: predicted class of each image `(images,)`.
        confidence: probability of the predicted class.
        labels: class of each image.
        label_probability: probability of that class.
    """
    classes = 1 + max(predicted.max(initial=0), labels.max(initial=0))
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):  # classes without images have no mean
        own = np.bincount(labels, label_probability, minlength=classes) / counts
    return np.flatnonzero((predicted != labels) & (confidence >= np.where(counts, own, np.inf)[predicted]))
