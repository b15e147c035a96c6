"""Temperature scaling against torch's L-BFGS."""

import json

import numpy as np
import pytest
import torch
from helpers.messages import assert_names
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold

from hfvit.metrics.classification import classification_metrics
from hfvit.metrics.temperature import calibrate, fit_temperature, negative_log_likelihood


def confident(images: int, scale: float, seed: int = 0, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = scale * (rng.normal(size=(images, classes)) + 2 * np.eye(classes)[labels])
    return logits.astype(np.float32), labels


def fitted_by_torch(logits: np.ndarray, labels: np.ndarray) -> float:
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], lr=0.1, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z * inverse, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return 1 / inverse.item()


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_fit_temperature_equals_lbfgs(scale):
    logits, labels = confident(500, scale)
    assert fit_temperature(logits, labels) == pytest.approx(fitted_by_torch(logits, labels), rel=1e-4)


def test_negative_log_likelihood_equals_scikit_learn():
    logits, labels = confident(200, 2.0)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, probabilities, labels=range(7)))


def test_calibrated_metrics_are_those_of_the_divided_logits_of_other_images():
    results = {"validation": confident(403, 3.0, 1), "test": confident(900, 3.0, 2)}
    found = calibrate(results)
    assert found.value > 1.2
    assert found.folds == 5
    temperatures = {"test": np.full((900, 1), found.value), "validation": np.empty((403, 1))}
    for others, rows in KFold(5, shuffle=True, random_state=0).split(results["validation"][1]):
        logits, labels = results["validation"]
        temperatures["validation"][rows] = fitted_by_torch(logits[others], labels[others])
    for role, (logits, labels) in results.items():
        divided = classification_metrics(logits / temperatures[role], labels, [str(n) for n in range(7)])
        before = classification_metrics(logits, labels, [str(n) for n in range(7)])
        split = found.splits[role]
        assert split.loss == pytest.approx(divided["loss"], abs=1e-4)
        assert split.ece == pytest.approx(divided["ece"], abs=1e-4)
        assert [each.to_json() for each in split.calibration] == [
            pytest.approx(entry, abs=1e-4) for entry in divided["calibration"]
        ]
        assert split.ece < before["ece"]
        assert split.loss < before["loss"]
    json.dumps(found.to_json(), allow_nan=False)


def test_fold_whose_other_images_are_all_correct_keeps_its_logits():
    labels = np.arange(20) % 3
    logits = 3.0 * np.eye(3)[labels]
    logits[7] = np.roll(logits[7], 1)
    found = calibrate({"validation": (logits, labels)})
    divided = np.empty_like(logits)
    for others, rows in KFold(5, shuffle=True, random_state=0).split(labels):
        divided[rows] = logits[rows] / (1.0 if 7 in rows else fitted_by_torch(logits[others], labels[others]))
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(divided), torch.from_numpy(labels)).item()
    assert found.splits["validation"].loss == pytest.approx(expected, abs=1e-4)


def test_three_validation_images_have_three_folds():
    logits = np.array([[0.0, 0.5], [0.0, 1.0], [1.0, 0.0]])
    assert calibrate({"validation": (logits, np.array([0, 1, 0]))}).folds == 3


def test_no_temperature_if_all_is_correct_or_logits_are_constant():
    labels = np.arange(12) % 3
    perfect = calibrate({"validation": (5.0 * np.eye(3)[labels], labels)})
    assert perfect.value is None
    assert perfect.reason
    assert perfect.splits == {}
    backwards = calibrate({"validation": (-5.0 * np.eye(3)[labels], labels)})
    assert backwards.value is None
    assert_names(backwards.reason, 0.05, 20)
