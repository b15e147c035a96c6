"""What a demo shows of the run that trained the model."""

from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfvit.artifacts.artifact import Artifact
from hfvit.artifacts.run_record import RunRecord, read_examples
from hfvit.artifacts.run_sections import OutOfDistribution, Score
from hfvit.errors import ModelError
from hfvit.inference.classifier import run_file
from hfvit.metrics.out_of_distribution import energy

UNLIKE_NOTE = "Unlike the training data: do not rely on this prediction."


@dataclass(frozen=True)
class RunResults:
    """Results of a run, None where they are unknown.

    Attributes:
        description: the network that was trained.
        score: accuracy or mAP with its interval.
        images: number of images that it was measured on.
        split: their split, test or validation.
        finished: day of the run.
        temperature: divisor of the logits for calibrated probabilities.
        tta: test-time augmentation of the logits that score, temperature and threshold are of.
        out_of_distribution: threshold of the energy.
    """

    description: str | None = None
    score: Score | None = None
    images: int = 0
    split: str = ""
    finished: date | None = None
    temperature: float | None = None
    tta: str | None = None
    out_of_distribution: OutOfDistribution | None = None

    @property
    def score_text(self) -> str:
        """Return the score in percent."""
        return f"{self.score.value:.1%}" if self.score else ""

    @property
    def score_note(self) -> str:
        """Return the interval of the score, its images and its date."""
        if not self.score:
            return ""
        low, high = self.score.interval
        day = f", {self.finished.isoformat()}" if self.finished else ""
        views = f", with {self.tta} test-time augmentation" if self.tta else ""
        return f"95 % interval {low:.1%} to {high:.1%}, {self.images:,} {self.split} images{views}{day}"

    def is_unlike(self, logits: np.ndarray, multi_label: bool) -> bool:
        """Return whether an image is unlike the training data.

        Args:
            logits: of the image `(1, classes)`, not calibrated.
            multi_label: whether images have several labels.
        """
        known = self.out_of_distribution
        return known is not None and bool(energy(logits, multi_label)[0] > known.threshold)


def read_results(artifact: Artifact, **kwargs: Any) -> RunResults:
    """Read the results of an artifact's run, none without a readable run.json.

    Args:
        artifact: checkpoint or export.
        **kwargs: Hub arguments of `from_pretrained`.
    """
    file = run_file(artifact, **kwargs)
    if file is None:
        return RunResults()
    try:
        record = RunRecord.load(file.parent)
    except ModelError:
        return RunResults()
    return RunResults(
        description=record.model.description,
        score=record.result.score,
        images=record.result.images,
        split=record.role,
        finished=datetime.fromisoformat(record.finished).date() if record.finished else None,
        temperature=record.temperature.value if record.temperature else None,
        tta=record.eval_tta,
        out_of_distribution=record.out_of_distribution,
    )


def write_class_examples(artifact: Artifact, folder: Path, **kwargs: Any) -> list[str]:
    """Write the run's images of each class to folders named after their class.

    Args:
        artifact: checkpoint or export.
        folder: folder to write to.
        **kwargs: Hub arguments of `from_pretrained`.

    Returns:
        The paths of the images, none if the run has no images.
    """
    file = run_file(artifact, **kwargs)
    try:
        record = RunRecord.load(file.parent) if file else None
    except ModelError:
        record = None
    if record is None or record.examples is None:
        return []
    arrays = read_examples(file.parent, record.examples)
    written = []
    examples = zip(record.examples.explanations, arrays.get("explanations", ()), strict=False)
    for number, (example, image) in enumerate(examples):
        name = example.true
        if name in record.data.labels and name not in (".", "..") and Path(name).name == name and "\\" not in name:
            path = folder / name / f"{number}.png"
            try:
                path.parent.mkdir(exist_ok=True)
            except (OSError, ValueError):  # the class has no name of a folder, such as one of more than 255 bytes
                continue
            Image.fromarray(image).save(path)
            written.append(str(path))
    return written
