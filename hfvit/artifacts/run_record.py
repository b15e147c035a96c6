"""`RunRecord` (run.json): results, settings and environment of a run."""

import json
import math
import platform
import shlex
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

import hfvit
from hfvit.artifacts.constants import EXAMPLES_FILE, MULTIRUN_FILE, RUN_FILE
from hfvit.artifacts.gate import Gate, Hardware, migrate_gate
from hfvit.artifacts.json_record import OPTIONAL, FieldError, FileRecord, shown
from hfvit.artifacts.run_sections import (
    Data,
    ExampleImages,
    Model,
    MultiLabelMetrics,
    OutOfDistribution,
    Probe,
    Seeds,
    SplitMetrics,
    Temperature,
    TextModel,
    Thresholds,
    Training,
)
from hfvit.artifacts.run_summary import shown_path, summary_html, summary_table
from hfvit.errors import ModelError
from hfvit.recipe.arguments import TTA
from hfvit.utils.credentials import mask_values
from hfvit.utils.files import expand_user, finite, temporary_file
from hfvit.utils.hub_ids import is_local

PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn")
_ARRAYS_0_1 = {"attention": "explanations", "attention_maps": "explanation_maps"}
MAX_EXAMPLE_BYTES = 64 * 2**20  # of an array in examples.npz; 16 images of 224 px have 2.4 MB
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(kw_only=True)
class RunRecord(FileRecord):
    """run.json of a finished run.

    `metrics`, `data.splits` and `temperature.splits` have a key per role: `train`, `validation`, `test`.

    Attributes:
        recipe: all values of the recipe.
        unused: keys of the recipe that had no effect.
        history: `log_history` of the Trainer.
        events: problems during the training (docs/reliability.md).
    """

    FILE: ClassVar[str] = RUN_FILE
    REMEDY: ClassVar[str] = "Read it with the version that wrote it, or train again."

    hfvit_version: str | None = None
    finished: str | None = None
    command: str | None = None
    model: Model
    data: Data
    recipe: dict[str, Any]
    unused: list[str] | None = field(default=None, metadata=OPTIONAL)
    seeds: Seeds | None = field(default=None, metadata=OPTIONAL)
    metrics: dict[str, MultiLabelMetrics | SplitMetrics]
    training: Training
    events: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str | None]
    hardware: Hardware
    history: list[dict[str, Any]]
    temperature: Temperature | None = field(default=None, metadata=OPTIONAL)
    thresholds: Thresholds | None = field(default=None, metadata=OPTIONAL)
    out_of_distribution: OutOfDistribution | None = field(default=None, metadata=OPTIONAL)
    examples: ExampleImages | None = field(default=None, metadata=OPTIONAL)
    gate: Gate | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        self.folder: Path | None = None  # where it was loaded from or saved to

    @property
    def role(self) -> str:
        """Return the split of the main results, test if there is one, else validation."""
        return "test" if "test" in self.metrics else "validation"

    @property
    def result(self) -> Any:
        """Return `SplitMetrics` or `MultiLabelMetrics` of the split `role`."""
        return self.metrics[self.role]

    @property
    def eval_tta(self) -> str | None:
        """Return the test-time augmentation of the metrics, "flip" or None."""
        return next((name for name in TTA if name == self.recipe.get("eval_tta")), None)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read run.json of a folder.

        Raises:
            ModelError: the folder or the file is missing, or the file is invalid.
        """
        root = expand_user(folder)
        if not root.is_dir():
            raise ModelError(f"{folder}: no such folder. Pass the output_dir of a finished run.")
        if not (root / RUN_FILE).is_file():
            advice = "Pass the output_dir of a finished run."
            if (root / MULTIRUN_FILE).is_file():
                advice = f"It has several runs: pass the folder of one of them, {folder}/seed_N or {folder}/fold_N."
            raise ModelError(f"{folder}: no {RUN_FILE} in this folder. {advice}")
        record = super().load(folder)
        record.folder = root
        return record

    def save(self, folder: str | Path) -> Path:
        """Write run.json atomically and return its path."""
        path = super().save(folder)
        self.folder = path.parent
        return path

    def plot(self, name: str, dark: bool = False) -> Image.Image:
        """Return a figure of the run, which a notebook shows.

        Args:
            name: name of a file in `plots`, or the beginning of it: "confusion", "learning", "reliability", ...
            dark: the version for a dark background.

        Raises:
            ModelError: there is no such figure.
        """
        plots = (self.folder or expand_user(self.recipe["output_dir"])) / "plots"
        names = sorted(path.stem for path in plots.glob("*.png") if not path.stem.endswith("_dark"))
        found = [each for each in names if each.startswith(name)]
        if not found:
            there = f"found: {', '.join(names)}" if names else f"no figures in {plots}; hfvit report draws them"
            raise ModelError(f"plot: unknown, got '{name}' ({there}).")
        with Image.open(plots / f"{found[0]}{'_dark' if dark else ''}.png") as image:
            return image.convert("RGB")

    def __repr__(self) -> str:
        score = self.result.score
        folder = shown_path(self.folder or self.recipe.get("output_dir") or "")
        return f"RunRecord({folder}: {self.model.architecture}, {self.role} {score.name} {score.value:.2%})"

    def __str__(self) -> str:
        return summary_table(self, self.folder or self.recipe.get("output_dir") or "")

    def _repr_html_(self) -> str:
        return summary_html(self, self.folder)

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Convert the content of a version 0.1 file."""
        return {key: migrate_gate(value) if key == "gate" else value for key, value in content.items()}

    def check(self) -> None:
        """Raise `FieldError` for a wrong date or missing keys."""
        try:
            datetime.fromisoformat(self.finished or "2026-01-01")
        except ValueError:
            raise FieldError("finished", f"must be a date and time, got {self.finished!r}") from None
        try:
            shlex.split(self.command or "")
        except ValueError as error:
            raise FieldError("command", f"must be a command line ({error}), got {shown(self.command)}") from None
        if "global_batch_size" not in self.recipe:
            raise FieldError("recipe.global_batch_size")
        if not self.metrics.keys() & {"validation", "test"}:
            raise FieldError("metrics.validation")
        for place, scores in enumerate(self.training.probe.validation if self.training.probe else []):
            if self.result.score.key not in scores:
                raise FieldError(f"training.probe.validation[{place}].{self.result.score.key}")
        calibrated = self.temperature if self.temperature and self.temperature.value is not None else None
        for role in self.metrics:
            if role not in self.data.splits:
                raise FieldError(f"data.splits.{role}")
            if calibrated and role not in calibrated.splits:
                raise FieldError(f"temperature.splits.{role}")
        if self.thresholds and len(self.thresholds.values) != len(self.data.labels):
            raise FieldError(
                "thresholds.values", f"must have {len(self.data.labels)} items, got {len(self.thresholds.values)}"
            )
        if self.examples and self.examples.split not in self.data.splits:
            raise FieldError(f"data.splits.{self.examples.split}")

    @classmethod
    def collect(
        cls, recipe, splits, model, trainer, output, metrics: dict[str, MultiLabelMetrics | SplitMetrics]
    ) -> Self:
        """Create the record of a training that has just ended.

        Args:
            recipe: the loaded recipe.
            splits: `ImageSplits` of the data set.
            model: the trained model.
            trainer: the `HFViTTrainer`.
            output: result of `trainer.train()`.
            metrics: metrics by role.
        """
        # Imported here, since commands that only read a record do not need PyTorch.
        import torch

        from hfvit.utils.environment import hardware, installed_versions

        args = recipe.training
        state = trainer.state
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        is_soup = trainer.soup is not None and trainer.soup.is_used
        selected_by = "validation" if best or is_soup or "probe" in output.metrics else None
        record = cls(
            hfvit_version=hfvit.__version__,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command_line(),
            model=_model(recipe.model, model, trainer.trained_parameters),
            data=Data.from_json({**splits.metadata, "selected_by": selected_by}),
            recipe=json.loads(json.dumps(recipe.values, default=str)),
            unused=recipe.unused,
            seeds=Seeds(seed=args.seed, data_seed=args.data_seed, full_determinism=args.full_determinism),
            metrics=metrics,
            training=_training(args, trainer, best, output.metrics),
            events=trainer.events,
            versions={
                "python": platform.python_version(),
                "cuda": torch.version.cuda,
                **installed_versions(PACKAGES),
            },
            hardware=Hardware.from_json(hardware()),
            history=finite(state.log_history),  # infinite gradient norms are normal with the loss scaling of fp16
        )
        return cls.from_json(mask_values(record.to_json()))


def _model(arguments, model, trained_parameters: int) -> Model:
    base = arguments.model_name_or_path
    config = model.config
    texts = None
    if arguments.text_encoder:
        texts = TextModel(
            text_encoder=arguments.text_encoder,
            is_local=is_local(arguments.text_encoder),
            model_type=model.text_model.config.model_type,
            fusion=config.fusion,
            max_text_length=config.max_text_length,
            parameters=sum(p.numel() for p in model.text_model.parameters()),
        )
    return Model(
        architecture=config.architecture,
        model_args={key: value for key, value in (config.model_args or {}).items() if key != "img_size"} or None,
        base_model=base,
        is_local=base is not None and is_local(base),
        # timm's checkpoints have a license; a model trained from scratch has none.
        base_license=config.pretrained_cfg.get("license") if base else None,
        texts=texts,
        image_size=tuple(config.image_size),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=trained_parameters,
        preprocessing={key: config.pretrained_cfg.get(key) for key in PREPROCESSING},
    )


def _training(args, trainer, best: str | None, metrics: dict[str, Any]) -> Training:
    state = trainer.state
    micro = trainer.out_of_memory.micro
    probe = metrics.get("probe")
    return Training(
        steps=state.global_step,
        epochs=state.epoch,
        best_step=int(Path(best).name.removeprefix("checkpoint-")) if best else None,
        best_metric=state.best_metric if best else None,
        best_metric_name=args.metric_for_best_model if best else None,
        seconds=metrics["train_runtime"],
        **trainer.speed.overall(),
        flops_per_image=trainer.speed.flops_per_image,
        peak_flops=trainer.speed.peak_flops,
        resumed_at_step=trainer.resumed_at_step,
        precision=args.mixed_precision,
        processes=args.world_size,
        data_workers=args.dataloader_num_workers,
        per_device_batch_size=micro.size,
        gradient_accumulation_steps=args.gradient_accumulation_steps * micro.count,
        per_device_eval_batch_size=trainer.out_of_memory.eval_batch_size,
        probe=Probe.from_json(probe) if probe else None,
        soup=trainer.soup,
    )


def command_line() -> str:
    """Return the command line, without the folder of the program and without tokens."""
    program = Path(sys.argv[0])
    if not program.name:  # an interactive interpreter
        return ""
    words = [program.parent.name if program.name == "__main__.py" else program.name]  # python -m hfvit
    hide = False
    for word in sys.argv[1:]:
        option, _, value = word.partition("=")
        is_secret = option.startswith("--") and "token" in option.lower()
        words.append("***" if hide else f"{option}=***" if is_secret and value else word)
        hide = is_secret and not value
    return shlex.join(words)


def write_examples(output_dir: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write examples.npz atomically."""
    with temporary_file(Path(output_dir) / EXAMPLES_FILE) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def read_examples(output_dir: str | Path, examples: ExampleImages | None) -> dict[str, np.ndarray]:
    """Read examples.npz.

    Args:
        output_dir: output folder of the run.
        examples: example images in run.json, to which the arrays must belong.

    Returns:
        `mistakes`, `label_errors` and `explanations`, uint8 `(images, height, width, 3)`, and `explanation_maps`,
        float32 `(images, rows, columns)`. An array is missing if the file lacks it or has another number of images.
    """
    path = Path(output_dir) / EXAMPLES_FILE
    if examples is None or not path.is_file():
        return {}
    lists: dict[str, Sequence] = {
        "mistakes": examples.mistakes,
        "label_errors": examples.label_errors,
        "explanations": examples.explanations,
        "explanation_maps": examples.explanations,
    }
    try:
        with np.load(path, allow_pickle=False) as file:
            names = {name: name for name in lists} | _ARRAYS_0_1
            arrays = {
                names[name]: file[name]
                for name in file.files
                if name in names and _array_bytes(file, name) <= MAX_EXAMPLE_BYTES
            }
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return {}
    return {
        name: array
        for name, array in arrays.items()
        if len(lists[name]) and _has_layout(array, name, len(lists[name]))
    }


def _array_bytes(file: np.lib.npyio.NpzFile, name: str) -> int:
    """Return the size of an array without reading it.

    A small file can expand to any size.
    """
    with file.zip.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):  # later versions have headers of up to 4 GiB
            raise ValueError("not written by hfvit")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return math.prod(shape) * dtype.itemsize


def _has_layout(array: np.ndarray, name: str, count: int) -> bool:
    """Return whether an array of examples.npz has the layout of `count` images."""
    if name == "explanation_maps":
        return array.dtype.kind == "f" and array.ndim == 3 and len(array) == count and array.size > 0
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[::3] == (count, 3) and array.size > 0
