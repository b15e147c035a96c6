"""Linear probe: logistic regression on cached features."""

import hashlib
import json
import logging
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm.auto import tqdm
from transformers.trainer_utils import TrainOutput

from hfvit.data.dataset import ArrayReader, ImageDataset
from hfvit.errors import ModelError, NonFiniteLossError, RecipeError
from hfvit.metrics.classification import trainer_metrics
from hfvit.training.out_of_memory import cut, where_it_fits
from hfvit.training.trainer import HFViTTrainer
from hfvit.utils.files import remove_abandoned, temporary_file

logger = logging.getLogger(__name__)

MOST_ITERATIONS = 2000  # of L-BFGS for each C
FORMAT = 1  # part of a file's name: raise it when features are computed otherwise than before
NEVER = -1e3  # the logit of a class without a training image


class LinearProbeTrainer(HFViTTrainer):
    """A Trainer whose `train` solves the classifier instead of descending to it.

    Args:
        labels: class names.
        c: inverse strengths of the L2 penalty on standardised features (scikit-learn's C). The one that is best on the
            validation split by `metric_for_best_model` is taken, the smallest of equals.
        passes: augmented copies of each training image; 0 for each image once, as evaluation sees it.
        class_balance: `weight` gives each class the same weight in the loss.

    Several processes share the extraction; each solves the same problem.
    """

    def __init__(self, *args, labels: list[str], c: list[float], passes: int = 0, class_balance="none", **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_sharded:
            raise RecipeError("finetuning: linear_probe takes whole weights; launch without FSDP or DeepSpeed.")
        self.labels, self.c, self.passes, self.class_balance = labels, sorted(c), passes, class_balance
        self.model.freeze("backbone")
        self.body, self.classifier = body_and_classifier(self.model)
        self._initial_global_step = 0
        drawn = self.train_dataset
        self.source = AugmentedPasses(drawn, passes) if passes else ImageDataset(drawn.labels, drawn.reader)

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        """Extract, solve for each C, and keep the best on the validation split in the model's classifier."""
        if resume_from_checkpoint:
            raise RecipeError(
                f"resume_from_checkpoint: {resume_from_checkpoint} is of another run, for a linear probe has no"
                " checkpoints; leave it out, with --overwrite_output_dir or another output_dir."
            )
        start = time.perf_counter()
        self._record_trained()
        self.speed.start()
        features = {"train": self.features(self.source), "validation": self.features(self.eval_dataset)}
        self.speed.stop()
        logger.info("Solving for %d values of C", len(self.c))
        solutions = solve(features["train"], self.source.labels, len(self.labels), self.c, self.class_balance)
        measure, key = trainer_metrics(self.labels), self.args.metric_for_best_model or "accuracy"
        key = key.removeprefix("eval_")
        scores = []
        for weight, bias in solutions:
            logits = features["validation"] @ weight.T + bias
            scores.append(measure(_Prediction(logits, self.eval_dataset.labels)))
        values = [score[key] for score in scores]
        best = int(np.argmax(values) if self.args.greater_is_better else np.argmin(values))
        with torch.no_grad():
            for parameter, value in zip((self.classifier.weight, self.classifier.bias), solutions[best], strict=True):
                parameter.copy_(torch.from_numpy(value))
        self.findings = {
            "probe": {
                "features": features["train"].shape[1],
                "rows": features["train"].shape[0],
                "c": self.c,
                "best_c": self.c[best],
                "selected_by": key,
                "validation": scores,
            }
        }
        if best == len(self.c) - 1 and len(self.c) > 1:
            logger.warning("probe_c: the largest value, %g, was the best; larger ones might be better.", self.c[best])
        return TrainOutput(0, float("nan"), {"train_runtime": time.perf_counter() - start})

    def training_images(self, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
        if self.passes:
            return super().training_images(count)
        rows = np.linspace(0, len(self.source) - 1, min(count, len(self.source))).astype(int)
        batch = self._prepare_inputs(self.source.__getitems__(rows.tolist()))
        mean, std = (255.0 * values for values in (self.preprocessing.mean, self.preprocessing.std))
        images = (batch["pixel_values"] * std + mean).clamp(0, 255).round().byte().permute(0, 2, 3, 1)
        return images.cpu().numpy(), batch["labels"].cpu().numpy()

    def features(self, dataset) -> np.ndarray:
        """What the classifier takes, float32 `(rows, features)`, from the cache or extracted into it."""
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfvit_features"
        path = folder / f"{self._key(dataset)}.npy"
        try:
            cached = np.load(path, allow_pickle=False)
            if cached.shape == (len(dataset), self.classifier.in_features):
                logger.info("%s features of images, from %s", f"{len(cached):,}", folder)
                return cached
        except (OSError, ValueError, EOFError):  # no file, or not all of one
            pass
        features = self._extract(dataset)
        if self.args.should_save:
            try:
                remove_abandoned(folder, ".*.npy")
                with temporary_file(path) as temporary:
                    np.save(temporary, features, allow_pickle=False)
            except OSError as error:
                logger.warning("The features are not kept: %s: %s", folder, error.strerror or error)
        return features

    @torch.no_grad()
    def _extract(self, dataset) -> np.ndarray:
        self.model.eval()
        loader, found = self.get_eval_dataloader(dataset), []
        hidden = self.args.disable_tqdm or not self.args.should_save
        for batch in tqdm(loader, desc="Extracting features", unit="batch", disable=hidden):
            features = None
            while features is None:
                pieces = cut(batch, self.eval_batch, self.augmentation)
                features = where_it_fits(self._of_pieces, pieces)
                if features is None:
                    self.shrink_evaluation(len(pieces[0]["labels"]), "feature extraction")
            found.append(self.accelerator.gather_for_metrics(features).cpu().numpy())
            self.speed.images += len(found[-1])
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            raise NonFiniteLossError(
                "the network's features are NaN or infinite, so that no probe can be solved on them: use bf16 or full"
                " precision instead of fp16, and look for broken weights or images."
            )
        return features

    def _of_pieces(self, pieces: list[dict]) -> torch.Tensor:
        with self.compute_loss_context_manager():
            found = [self.body(self._prepare_inputs(piece)["pixel_values"]) for piece in pieces]
        return torch.cat(found).float()

    def _key(self, dataset) -> str:
        """A name for the features of `dataset`: changes with the weights, the images, and all that is done to them."""
        source = dataset.source if isinstance(dataset, AugmentedPasses) else dataset
        state = hashlib.sha256()
        head = {id(parameter) for parameter in self.classifier.parameters()}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in head:
                state.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        config = self.model.config.to_dict()
        facts = [FORMAT, [config[key] for key in ("architecture", "model_args", "pretrained_cfg")], len(dataset)]
        facts.append(self.args.mixed_precision)
        state.update(json.dumps(facts, sort_keys=True, default=str).encode() + images_key(source.reader))
        if source is not dataset:
            augmentation = {key: str(value) for key, value in vars(source.augmentation).items()}
            state.update(json.dumps([source.seed, augmentation], sort_keys=True).encode())
        return state.hexdigest()[:40]


class AugmentedPasses(torch.utils.data.Dataset):
    """`passes` augmented copies of a training set, one whole copy after another."""

    def __init__(self, source: ImageDataset, passes: int):
        self.source, self.passes = source, passes
        self.labels = np.tile(source.labels, passes)

    def __len__(self) -> int:
        return len(self.source) * self.passes

    def __getitems__(self, indices: list[int]) -> dict:
        return self.source.__getitems__([divmod(index, len(self.source)) for index in indices])


class _Prediction:
    """What `metrics.trainer_metrics` reads of an EvalPrediction."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray):
        self.predictions, self.label_ids = logits, labels


def images_key(reader) -> bytes:
    """Which images a reader of images.py reads, by the fingerprints that `datasets` gives."""
    if isinstance(reader, ArrayReader):
        return reader.pixels.path.name.encode() + np.ascontiguousarray(reader.rows).tobytes()
    return reader.split._fingerprint.encode()


@torch.no_grad()
def body_and_classifier(model):
    """The network up to its classifier, as a function of pixel values, and the classifier: one linear layer.

    Raises `ModelError` for a family whose classifier is anything else.
    """
    timm_model = model.timm_model
    classifier = timm_model.get_classifier()

    def body(pixel_values: torch.Tensor) -> torch.Tensor:
        return timm_model.forward_head(timm_model.forward_features(pixel_values), pre_logits=True)

    if isinstance(classifier, nn.Linear) and classifier.bias is not None:
        was_training = model.training
        model.eval()
        image = torch.randn(1, 3, *model.config.image_size, device=model.device)
        features = body(image)
        fits = features.shape == (1, classifier.in_features)
        fits = fits and torch.allclose(classifier(features), model(image).logits, atol=1e-4, rtol=1e-4)
        model.train(was_training)
        if fits:
            return body, classifier
    raise ModelError(
        f"finetuning: linear_probe is not for {model.config.architecture}, whose classifier is not one linear layer;"
        " freeze: backbone trains it by gradient descent."
    )


def solve(
    features: np.ndarray, labels: np.ndarray, classes: int, c: list[float], class_balance: str = "none"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each C, the weight `(classes, features)` and bias `(classes,)` of multinomial logistic regression.

    Solved by L-BFGS on standardised features, each C from the solution before it; the standardisation is folded into
    the answer, so that it takes raw features.
    """
    scaler = StandardScaler()
    standard = scaler.fit_transform(features)
    weight_of = "balanced" if class_balance == "weight" else None
    model = LogisticRegression(max_iter=MOST_ITERATIONS, class_weight=weight_of, warm_start=True)
    solutions = []
    for value in c:
        model.set_params(C=value).fit(standard, labels)
        coefficients, intercept = model.coef_, model.intercept_
        if len(coefficients) == 1:  # two classes: scikit-learn gives the second's logit, and the first's is 0
            coefficients, intercept = (
                np.vstack([-coefficients, coefficients]) / 2,
                np.append(-intercept, intercept) / 2,
            )
        folded = coefficients / scaler.scale_
        weight = np.zeros((classes, features.shape[1]), dtype=np.float32)
        bias = np.full(classes, NEVER, dtype=np.float32)
        weight[model.classes_] = folded
        bias[model.classes_] = intercept - folded @ scaler.mean_
        solutions.append((weight, bias))
    return solutions
