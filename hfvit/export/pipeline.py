"""`optimum-cli export onnx`: load, export, quantize, validate and save."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.constants import CONFIG_FILE, PREPROCESSOR_FILE, PRETRAINED_CFG, RECIPE_FILE
from hfvit.artifacts.export_folder import check_same_model, file_name, staging_folder
from hfvit.artifacts.export_record import ExportedFile, ExportRecord, Parity
from hfvit.artifacts.gate import ArtifactResult
from hfvit.errors import DataError, GateError, ModelError
from hfvit.export.client_config import family_config, stock_processor_config
from hfvit.export.image_parity import PhotographLogits, check_images
from hfvit.export.onnx import (
    CHECKED_BATCHES,
    check_graph,
    check_takes_images,
    describe,
    export_onnx,
    input_channels,
    trace_onnx,
    weights_sha256,
)
from hfvit.export.options import (
    CALIBRATED,
    CALIBRATION_SAMPLES,
    GATE,
    GATE_SAMPLES,
    MAX_ACCURACY_DROP,
    refuse_unused,
)
from hfvit.export.parity import tolerance
from hfvit.export.preprocessing import check_steps
from hfvit.export.processor_steps import image_steps
from hfvit.export.text_inputs import check_reads_texts
from hfvit.inference.classifier import batched, load_classifier
from hfvit.utils.files import commit_file, expand_user, write_object
from hfvit.utils.formatting import aligned

CALIBRATION_BATCH = 16


class Export:
    """Run `export onnx` with the model and the record of each exported file.

    Args:
        options: parsed options of `optimum-cli export onnx`.
        folder: output folder.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options = options
        self.folder = folder
        self.started = time.monotonic()
        self.files: dict[str, ExportedFile] = {}
        self.results: dict[str, ArtifactResult] = {}  # of the accuracy gate, by file
        self.comparison = None
        self.traced = None
        self.tokenizer_files: list[str] = []
        self.target = options.target or "onnxruntime"
        self.fixed_batch = (options.batch_size or 1) if options.no_dynamic_axes else None

    def run(self) -> None:
        """Export all files; on an error the output folder is unchanged.

        Raises:
            GateError: the accuracy gate refused files; the others were saved.
        """
        with self.graphs() as staging:
            if self.kept:
                self.save(staging)
        print(self.table())
        if self.refused:
            raise GateError(self.refusal)

    @contextmanager
    def graphs(self) -> Iterator[Path]:
        """Yield a temporary folder inside the output folder with the validated files."""
        options = self.options
        self.log(f"loading {options.model}")
        self.load()
        calibration = self.calibration_images() if options.quantize in CALIBRATED else None
        gate = self.gate_split()
        with staging_folder(self.folder) as staging:
            write_object(staging / CONFIG_FILE, self.config)
            write_object(staging / PREPROCESSOR_FILE, self.processor_config)
            if self.classifier.text_reader:
                self.tokenizer_files = self.classifier.text_reader.save(staging)
            self.float_files(staging)
            if options.quantize:
                self.quantized_file(staging, calibration)
            self.traced = None
            self.check_images(staging)
            if gate is not None:
                self.validate(staging, gate)
            yield staging

    def log(self, text: str) -> None:
        """Print a line with the elapsed seconds."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def load(self) -> None:
        """Load the model in float32 and its processor, and check the output folder."""
        options = self.options
        hub = {"revision": options.revision, "cache_dir": options.cache_dir}
        hub = {key: value for key, value in hub.items() if value}
        # `export tensorrt` has no such options: it takes the ONNX file of a changed model.
        changes = {key: vars(options).get(key) for key in ("patch_size", "merge_tokens")}
        load = partial(load_classifier, options.model, device=options.device or "cpu", **hub)
        self.classifier = load()
        # Digest of the unchanged checkpoint, by which `hfvit push` finds its exports.
        self.weights = weights_sha256(self.classifier.backend.model.float())
        if any(changes.values()):
            self.classifier = load(**changes)
        self.classifier.backend.tf32 = False  # logits are compared in full float32
        self.model = self.classifier.backend.model.float()
        self.processor = self.classifier.processor
        self.config = family_config(self.model)
        if changes["merge_tokens"]:
            self.config["merge_tokens"] = changes["merge_tokens"]  # keeps other rates out of this folder
        self.processor_config = stock_processor_config(self.processor)
        wanted = {key: vars(options)[key] for key in ("quantize", "with_preprocessing", "optimize")}
        check_reads_texts(self.model, **wanted, **{self.target: self.target != "onnxruntime"})
        check_same_model(self.folder, self.config, self.weights)
        if options.with_preprocessing:
            check_steps(image_steps(self.processor))
        check_takes_images(self.model)
        shape = self.processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"].shape
        if len(shape) != 4:
            raise ModelError(
                f"{type(self.processor).__name__} returns patches {tuple(shape)} instead of images (batch, channels,"
                " height, width). Such models (NaFlex) cannot be exported."
            )
        self.shape = tuple(shape[1:])
        if self.shape[0] != (channels := input_channels(self.model)):
            raise ModelError(
                f"The model takes images of {channels} channel(s), but its image processor returns {self.shape[0]}."
                " Such models cannot be exported."
            )

    def calibration_images(self):
        """Return the calibration images of the options or the recipe."""
        from hfvit.export.calibration_data import calibration_images

        options = self.options
        alternative = "--quantize int8-dynamic" if self.target == "onnxruntime" else "--dtype fp16"
        images = calibration_images(
            options.model,
            dataset_name=options.calibration_dataset,
            split=options.calibration_split,
            max_samples=options.calibration_samples or CALIBRATION_SAMPLES,
            alternative=f", or pass {alternative}",
        )
        if len(images) < self.calibration_batch:
            raise DataError(
                f"--calibration_samples: must be at least the fixed batch size {self.fixed_batch}, got {len(images)}"
                " images."
            )
        return images

    @property
    def calibration_batch(self) -> int:
        return self.fixed_batch or 1

    def gate_split(self):
        """Return the recipe's validation split, None without recipe or gate."""
        options = self.options
        if options.no_gate:
            return None
        if find_artifact(options.model).beside(RECIPE_FILE) is None:
            refuse_unused(
                options, GATE, f"needs the validation images of a {RECIPE_FILE}, which {options.model} lacks"
            )
            return None
        from hfvit.evaluation.compare import check_recordable
        from hfvit.evaluation.split import evaluation_split

        check_recordable([options.model])
        try:
            return evaluation_split(options.model, max_samples=options.gate_samples or GATE_SAMPLES)
        except DataError as error:
            raise DataError(f"{error} Pass --no_gate to export without the accuracy check.") from None

    def float_files(self, staging: Path) -> None:
        """Export the float file, and the optimized one if requested."""
        options = self.options
        wanted = [{"dtype": options.dtype}] + ([{"optimize": True}] if options.optimize else [])
        for variant in wanted:
            name = file_name(**variant, with_preprocessing=options.with_preprocessing)
            self.log(f"exporting {name}")
            self.files[name] = self.export(staging / name, **variant)

    def export(self, path: Path, with_preprocessing: bool | None = None, **variant) -> ExportedFile:
        """Export one ONNX file.

        Args:
            path: file to write.
            with_preprocessing: whether the graph includes preprocessing; None follows the option.
            **variant: `dtype` or `optimize` of `export_onnx`.
        """
        options = self.options
        inside = options.with_preprocessing if with_preprocessing is None else with_preprocessing
        if self.traced is None:
            self.traced = trace_onnx(
                self.model,
                opset=options.opset,
                batch_size=self.fixed_batch,
                image_size=self.shape[1:],
                verbose=options.verbose,
            )
        return export_onnx(
            self.model,
            path,
            opset=options.opset,
            batch_size=self.fixed_batch or 1,
            dynamic_axes=not options.no_dynamic_axes,
            atol=options.atol,
            preprocessing=self.processor if inside else None,
            image_size=self.shape[1:],
            verbose=options.verbose,
            traced=self.traced,
            images=self.photographs.pixel_values if variant.get("dtype") == "fp16" else None,
            **variant,
        )

    @cached_property
    def photographs(self) -> PhotographLogits:
        """Return pixel values and logits of the photographs, computed once for all files."""
        return PhotographLogits(self.classifier)

    def quantized_file(self, staging: Path, calibration) -> None:
        """Quantize the float file, exporting it first if necessary."""
        from hfvit.export.quantization import quantize_onnx

        options = self.options
        name = file_name(quantize=options.quantize, target=self.target, with_preprocessing=options.with_preprocessing)
        path = staging / name
        with staging_folder(staging) as work:
            source = staging / file_name()
            if source.name not in self.files:
                source = work / "model.onnx"
                self.export(source, with_preprocessing=False)
            with_images = f" with {len(calibration)} calibration images" if calibration is not None else ""
            self.log(f"quantizing {name}{with_images}")
            try:
                quantization = quantize_onnx(
                    source,
                    path,
                    mode=options.quantize,
                    runtime=self.target,
                    calibration=self.batches(calibration) if calibration is not None else None,
                )
            except ModelError as error:  # about a temporary file
                raise ModelError(str(error).replace(str(source), f"--quantize: {options.model}")) from error
            ratio = path.stat().st_size / source.stat().st_size
        if ratio > 0.9:
            self.log(f"{name} has {ratio:.0%} of the float file's size, as few of its weights are quantized")
        dtype = "fp8" if options.quantize == "fp8" else "int8"
        batch_sizes = [self.fixed_batch] if self.fixed_batch else CHECKED_BATCHES
        parity = check_graph(
            path,
            self.model,
            self.shape,
            batch_sizes,
            dtype,
            tolerance(dtype, options.atol),
            self.processor if options.with_preprocessing else None,
            name,
        )
        described = describe(path, self.shape, parity, dtype=dtype, batch_size=self.fixed_batch)
        described.quantization = quantization
        described.calibration = calibration.record if calibration is not None else None
        self.files[name] = described

    def check_images(self, staging: Path) -> None:
        """Compare every file with the checkpoint on photographs, preprocessing included."""
        if self.photographs.pixel_values is None:
            self.log("not compared on photographs, as the image processor returns images of several sizes")
            return
        # Rounding decides which of equally similar tokens are merged, such as those of a blue sky.
        has_limit = not vars(self.options).get("merge_tokens")
        for name, described in self.files.items():
            if described.dtype != "bf16":  # ONNX Runtime does not compute in bf16 on CPUs
                dtype = described.dtype if has_limit else None
                described.parity.images = check_images(
                    self.photographs, staging / name, dtype, self.options.atol, name
                )

    @property
    def refused(self) -> list[str]:
        """Return the files that the accuracy gate refused."""
        return [name for name, row in self.results.items() if row.failure]

    @property
    def kept(self) -> dict[str, ExportedFile]:
        """Return the files to save, with their records."""
        return {name: described for name, described in self.files.items() if name not in self.refused}

    @property
    def refusal(self) -> str:
        """Return why files were refused, for an error message."""
        reasons = "\n".join(f"{name}: {self.results[name].failure}" for name in self.refused)
        written = f"Written without {', '.join(self.refused)}." if self.kept else "Nothing was written."
        return (
            f"{reasons}\n{written} Pass --max_accuracy_drop or --min_agreement to allow more, or --no_gate to skip the"
            " check."
        )

    def validate(self, staging: Path, split) -> None:
        """Compare every file with the checkpoint on a labeled split."""
        from hfvit.evaluation.compare import compare

        options = self.options
        names = [name for name in self.files if not name.startswith("model_bf16")]
        if len(names) < len(self.files):
            self.log("bf16 is not validated, as ONNX Runtime does not support it on CPUs")
        if not names:
            return
        self.log(f"validating {', '.join(names)} on {split.name}")
        self.comparison = compare(
            self.classifier,
            [staging / name for name in names],
            split,
            max_accuracy_drop=MAX_ACCURACY_DROP if options.max_accuracy_drop is None else options.max_accuracy_drop,
            min_agreement=options.min_agreement,
            show_progress=options.verbose,
        )
        self.results = dict(zip(names, self.comparison.rows[1:], strict=True))

    @property
    def source(self) -> str:
        """Return the model's Hub id or folder name, without local paths."""
        folder = expand_user(self.options.model)
        return folder.resolve().name if folder.is_dir() else self.options.model

    def save(self, staging: Path) -> None:
        """Rename the files into the output folder, then update export.json and run.json.

        export.json is written first, without the new files: by it, an export after a kill knows those of this one.
        """
        export = ExportRecord.load(self.folder)
        export.source = self.source
        export.weights_sha256 = self.weights
        export.remove(self.folder, self.kept)
        for name in (CONFIG_FILE, PREPROCESSOR_FILE, *self.tokenizer_files, *self.kept):
            commit_file(staging / name, self.folder / name)
        export = ExportRecord.load(self.folder)  # another export may have added files
        for name, described in self.kept.items():
            export.enter(self.folder, name, described)
        saved = {name: row for name, row in self.results.items() if not row.failure}
        if saved:
            from hfvit.evaluation.compare import Comparison, record

            rows = [self.comparison.rows[0], *saved.values()]
            comparison = Comparison(replace(self.comparison.gate, artifacts=rows, passed=True))
            record(comparison, [self.options.model, *(self.folder / name for name in saved)])

    def table(self) -> str:
        """Return the summary with a row for each file, and what to know about it."""
        rows = [
            ("file", "MB", "difference", "on photographs", "score", "change (95 % interval)", "agreement", "result")
        ]
        notes = []
        for name, described in self.files.items():
            parity = described.parity
            row = self.results.get(name)
            gate = ("", "", "", "no gate")
            if row:
                gate = (f"{row.score.value:.2%}", row.change, f"{row.agreement:.2%}", row.verdict)
                notes += [f"{name}: {row.warning}"] * bool(row.warning)
            images = "" if parity.images is None else f"{parity.images.max_abs_difference:.2g}"
            rows.append((name, f"{described.bytes / 1e6:.1f}", f"{parity.max_abs_difference:.2g}", images, *gate))
            notes += [f"{name}: {note}" for note in self.stock_notes(parity)]
            if described.float32_values:
                notes.append(f"{name}: {described.float32_values} values stay in float32, as fp16 may not hold them")
        legend = "difference: largest one of a logit from the checkpoint's, on random pixel values and on photographs"
        saved = f"saved in {self.folder}" if self.kept else "nothing was saved"
        return "\n".join([*aligned(rows), "", legend, *notes, saved])

    def stock_notes(self, parity: Parity) -> list[str]:
        """Return how stock image processors differ from the checkpoint's preprocessing."""
        images = parity.images
        worst = None if images is None else images.stock_max_abs_difference
        if worst is None:
            return []
        if PRETRAINED_CFG in self.processor_config:
            reason = "start the crop of some images one pixel off the checkpoint's (docs/export.md)"
        elif images.atol is not None and worst > images.atol:
            reason = "round resized pixels otherwise"
        else:
            return []
        return [f"stock image processors {reason}; on photographs, a logit differs by {worst:.2g}"]

    def batches(self, calibration) -> Iterator[np.ndarray]:
        """Yield calibration batches (batch, 3, height, width) of float32 pixel values."""
        size = self.fixed_batch or CALIBRATION_BATCH
        for images in batched(calibration.images(), size):
            if len(images) >= self.calibration_batch:
                yield self.processor(images, return_tensors="pt")["pixel_values"].numpy()
