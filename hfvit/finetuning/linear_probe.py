"""Linear probe: multinomial logistic regression on cached features."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import TrainOutput

from hfvit.artifacts.run_sections import Probe
from hfvit.data.dataset import ArrayReader, ImageDataset
from hfvit.data.pixel_cache import cache_key
from hfvit.errors import ModelError, NonFiniteLossError, RecipeError
from hfvit.metrics.task import trainer_metrics
from hfvit.recipe.arguments import FinetuningArguments
from hfvit.training.out_of_memory import micro_batches, none_if_out_of_memory
from hfvit.training.trainer import SHOWN_IMAGES, HFViTTrainer
from hfvit.utils.eval_mode import eval_mode
from hfvit.utils.files import remove_abandoned, temporary_file

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 2000  # L-BFGS iterations for each C
CACHE_FORMAT = 1  # part of a cache file's name; increase it when features are computed differently
ABSENT_LOGIT = -1e3  # logit of a class without training images


def train_linear_probe(trainer: HFViTTrainer, arguments: FinetuningArguments) -> TrainOutput:
    """Fit the classifier by logistic regression on features that are extracted once.

    One problem is solved for each C of `probe_c`. The best by `metric_for_best_model` on the validation split, or the
    smallest of equals, is written to the model. Processes share the extraction, and each solves the same problems.

    Args:
        trainer: trainer with a model of `prepare_linear_probe`.
        arguments: `probe_c`, `probe_passes` and `class_balance` are used.

    Returns:
        `TrainOutput` without steps; its metrics are `train_runtime` and `probe`, a `Probe` as a dict.

    Raises:
        RecipeError: weights are sharded (FSDP, DeepSpeed).
        NonFiniteLossError: a feature is not finite.
    """
    if trainer.is_sharded:
        raise RecipeError("finetuning: linear_probe requires unsharded weights. Launch without FSDP or DeepSpeed.")
    start = time.perf_counter()
    extractor = FeatureExtractor(trainer)
    labels = trainer.class_names
    values = sorted(arguments.probe_c)
    training = probe_dataset(trainer.train_dataset, arguments.probe_passes)
    trainer.speed.start()
    features = extractor.features(training)
    validation_features = extractor.features(trainer.eval_dataset)
    trainer.speed.stop()
    logger.info("Fitting the linear probe for %d values of C", len(values))
    solver = solve if training.labels.ndim == 1 else solve_one_vs_rest
    solutions = solver(features, training.labels, len(labels), values, arguments.class_balance)
    metric = (trainer.args.metric_for_best_model or trainer.task.default_metric).removeprefix("eval_")
    compute_metrics = trainer_metrics(trainer.task, labels, metric=metric)
    scores = [
        compute_metrics(EvalPrediction(validation_features @ weight.T + bias, trainer.eval_dataset.labels))
        for weight, bias in solutions
    ]
    choose = np.argmax if trainer.args.greater_is_better else np.argmin
    best = int(choose([score[metric] for score in scores]))
    weight, bias = solutions[best]
    with torch.no_grad():
        extractor.classifier.weight.copy_(torch.from_numpy(weight))
        extractor.classifier.bias.copy_(torch.from_numpy(bias))
    if best == len(values) - 1 and len(values) > 1:
        logger.warning("probe_c: the largest value, %g, was the best. Add larger ones.", values[best])
    probe = Probe(
        features=features.shape[1],
        rows=features.shape[0],
        c=values,
        best_c=values[best],
        selected_by=metric,
        validation=scores,
    )
    return TrainOutput(0, float("nan"), {"train_runtime": time.perf_counter() - start, "probe": probe.to_json()})


def check_no_checkpoint(checkpoint: str | None) -> None:
    """Raise `RecipeError` for a checkpoint, as linear probes do not write any."""
    if checkpoint:
        raise RecipeError(
            f"resume_from_checkpoint: not supported with finetuning=linear_probe, got {checkpoint}. Omit it, and pass"
            " --overwrite_output_dir or another output_dir."
        )


def prepare_linear_probe(model) -> None:
    """Freeze all but the classifier, which must be one linear layer."""
    model.freeze("backbone")
    body_and_classifier(model)


def probe_dataset(train_dataset: ImageDataset, passes: int) -> "ImageDataset | AugmentedPasses":
    """Create a data set of `passes` augmented copies (0: one without augmentation)."""
    if passes:
        return AugmentedPasses(train_dataset, passes)
    return ImageDataset(train_dataset.labels, train_dataset.reader)


def probe_images(trainer: HFViTTrainer, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images that the probe is fitted on, and their labels.

    Args:
        trainer: trainer of the run.
        passes: number of augmented copies, as in `probe_dataset`.

    Returns:
        As `HFViTTrainer.training_images`.
    """
    if passes:
        return trainer.training_images()
    dataset = probe_dataset(trainer.train_dataset, passes)
    rows = np.linspace(0, len(dataset) - 1, min(SHOWN_IMAGES, len(dataset))).astype(int)
    batch = trainer.prepare_batch(dataset.__getitems__(rows.tolist()))
    mean = 255.0 * trainer.preprocessing.mean
    std = 255.0 * trainer.preprocessing.std
    images = (batch["pixel_values"] * std + mean).clamp(0, 255).round().byte().permute(0, 2, 3, 1)
    return images.cpu().numpy(), batch["labels"].cpu().numpy()


class FeatureExtractor:
    """Extract the classifier's input features of a data set, with a cache on disk.

    Args:
        trainer: trainer whose model, data loaders and out-of-memory handling are used.
    """

    def __init__(self, trainer: HFViTTrainer):
        self.trainer = trainer
        self.body, self.classifier = body_and_classifier(trainer.model)

    def features(self, dataset) -> np.ndarray:
        """Return the features (rows, features) float32, from the cache if possible."""
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfvit_features"
        path = folder / f"{self._key(dataset)}.npy"
        cached = self._load(path, len(dataset))
        # All processes take part in the extraction, and each machine may have its own cache.
        if all(gather_object([cached is not None])):
            logger.info("Loaded features of %s images from %s", f"{len(cached):,}", folder)
            return cached
        features = self._extract(dataset)
        if self.trainer.args.local_process_index == 0:
            try:
                remove_abandoned(folder, ".*.npy")
                with temporary_file(path) as temporary:
                    np.save(temporary, features, allow_pickle=False)
            except OSError as error:
                logger.warning("Cannot cache the features in %s: %s", folder, error.strerror or error)
        return features

    def _load(self, path: Path, rows: int) -> np.ndarray | None:
        """Load cached features, None if they are missing or damaged."""
        try:
            cached = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return cached if cached.shape == (rows, self.classifier.in_features) else None

    @torch.no_grad()
    def _extract(self, dataset) -> np.ndarray:
        trainer = self.trainer
        trainer.model.eval()
        loader = trainer.get_eval_dataloader(dataset)
        hidden = trainer.args.disable_tqdm or not trainer.args.should_save
        extracted = []
        for batch in tqdm(loader, desc="Extracting features", unit="batch", disable=hidden):
            features = None
            while features is None:
                parts = micro_batches(batch, trainer.out_of_memory.eval_batch_size, trainer.augmentation)
                features = none_if_out_of_memory(self._extract_parts, parts)
                if features is None:
                    trainer.out_of_memory.shrink_evaluation(len(parts[0]["labels"]), "feature extraction")
            extracted.append(trainer.accelerator.gather_for_metrics(features).cpu().numpy())
            trainer.speed.images += len(extracted[-1])
        features = np.concatenate(extracted)
        if not np.isfinite(features).all():
            raise NonFiniteLossError(
                "finetuning: the features of the linear probe are NaN or infinite. Use bf16 or full precision instead"
                " of fp16, and check the weights and images."
            )
        return features

    def _extract_parts(self, parts: list[dict]) -> torch.Tensor:
        with self.trainer.compute_loss_context_manager():
            features = [self.body(self.trainer.prepare_batch(part)["pixel_values"]) for part in parts]
        return torch.cat(features).float()

    def _key(self, dataset) -> str:
        """Return the cache file's name: a digest of weights, images and their processing."""
        source = dataset.source if isinstance(dataset, AugmentedPasses) else dataset
        model = self.trainer.model
        digest = hashlib.sha256()
        head = {id(parameter) for parameter in self.classifier.parameters()}
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in head:
                digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        config = model.config.to_dict()
        values = [
            CACHE_FORMAT,
            [config[key] for key in ("architecture", "model_args", "pretrained_cfg")],
            len(dataset),
        ]
        values.append(self.trainer.args.mixed_precision)
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + images_key(source.reader))
        if source is not dataset:
            # `constants` is an object, made from the mean.
            augmentation = {key: str(value) for key, value in vars(source.augmentation).items() if key != "constants"}
            digest.update(json.dumps([source.seed, augmentation], sort_keys=True).encode())
        return digest.hexdigest()[:40]


class AugmentedPasses(torch.utils.data.Dataset):
    """Concatenate `passes` augmented copies of a training set."""

    def __init__(self, source: ImageDataset, passes: int):
        self.source = source
        self.passes = passes
        self.labels = np.concatenate([source.labels] * passes)

    def __len__(self) -> int:
        return len(self.source) * self.passes

    def __getitems__(self, indices: list[int]) -> dict:
        """Return a batch; each copy is augmented like another epoch."""
        return self.source.__getitems__([divmod(index, len(self.source)) for index in indices])


def images_key(reader) -> bytes:
    """Identify the images of a reader by the `cache_key` of its dataset."""
    if isinstance(reader, ArrayReader):
        return reader.pixels.path.name.encode() + np.ascontiguousarray(reader.rows).tobytes()
    return cache_key(reader.split).encode()


@torch.no_grad()
def body_and_classifier(model) -> tuple[Callable[[torch.Tensor], torch.Tensor], nn.Linear]:
    """Split a model into a function from pixel values to features, and the classifier.

    Raises:
        ModelError: the classifier is not one linear layer with a bias.
    """
    timm_model = model.timm_model
    classifier = timm_model.get_classifier()

    def body(pixel_values: torch.Tensor) -> torch.Tensor:
        return timm_model.forward_head(timm_model.forward_features(pixel_values), pre_logits=True)

    if isinstance(classifier, nn.Linear) and classifier.bias is not None:
        image = torch.randn(1, 3, *model.config.image_size, device=model.device)
        with eval_mode(model):
            features = body(image)
            is_linear = features.shape == (1, classifier.in_features)
            if is_linear and not image.is_meta:  # `hfvit train --estimate` has no values to compare
                is_linear = torch.allclose(classifier(features), model(image).logits, atol=1e-4, rtol=1e-4)
        if is_linear:
            return body, classifier
    raise ModelError(
        f"finetuning: linear_probe requires a classifier of one linear layer, got {model.config.architecture}. Use"
        " freeze: backbone, which trains the head by gradient descent."
    )


def solve(
    features: np.ndarray, labels: np.ndarray, classes: int, c: list[float], class_balance: str = "none"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fit logistic regression (L-BFGS) on standardized features for each C.

    Args:
        features: (rows, features) float32.
        labels: class ids (rows,).
        classes: number of classes; those without rows get `ABSENT_LOGIT`.
        c: inverse strengths of the L2 penalty (scikit-learn's C), ascending; each fit starts from the previous one.
        class_balance: "weight" for scikit-learn's balanced class weights, or "none".

    Returns:
        Weight (classes, features) and bias (classes,) for each C, with the standardization folded in.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardized = scaler.fit_transform(features)
    class_weight = "balanced" if class_balance == "weight" else None
    model = LogisticRegression(max_iter=MAX_ITERATIONS, class_weight=class_weight, warm_start=True)
    solutions = []
    for value in c:
        model.set_params(C=value).fit(standardized, labels)
        coefficients = model.coef_
        intercept = model.intercept_
        if len(coefficients) == 1:  # two classes: scikit-learn returns the difference of the logits
            coefficients = np.vstack([-coefficients, coefficients]) / 2
            intercept = np.append(-intercept, intercept) / 2
        folded = coefficients / scaler.scale_
        weight = np.zeros((classes, features.shape[1]), dtype=np.float32)
        bias = np.full(classes, ABSENT_LOGIT, dtype=np.float32)
        weight[model.classes_] = folded
        bias[model.classes_] = intercept - folded @ scaler.mean_
        solutions.append((weight, bias))
    return solutions


def solve_one_vs_rest(
    features: np.ndarray, targets: np.ndarray, classes: int, c: list[float], class_balance: str = "none"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fit one logistic regression per label, otherwise as `solve`.

    Args:
        features: (rows, features) float32.
        targets: labels 0 and 1 (rows, classes).
        classes: number of classes; a class of all rows or none gets a constant logit.
        c: inverse strengths of the L2 penalty (scikit-learn's C), ascending.
        class_balance: "weight" for equal weights of positives and negatives, or "none".

    Returns:
        Weight (classes, features) and bias (classes,) for each C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardized = scaler.fit_transform(features)
    class_weight = "balanced" if class_balance == "weight" else None
    solutions = []
    for value in c:
        weight = np.zeros((classes, features.shape[1]), dtype=np.float32)
        bias = np.where(targets.all(axis=0), -ABSENT_LOGIT, ABSENT_LOGIT).astype(np.float32)
        for index in np.flatnonzero(targets.any(axis=0) & ~targets.all(axis=0)):
            model = LogisticRegression(C=value, max_iter=MAX_ITERATIONS, class_weight=class_weight)
            model.fit(standardized, targets[:, index])
            folded = model.coef_[0] / scaler.scale_
            weight[index] = folded
            bias[index] = model.intercept_[0] - folded @ scaler.mean_
        solutions.append((weight, bias))
    return solutions
