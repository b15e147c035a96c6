"""`optimum-cli export tensorrt`: build and save the engine of an ONNX graph."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hfvit
from hfvit.artifacts.artifact import find_artifact, read_head
from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_RECORD_FILE, PREPROCESSOR_FILE
from hfvit.artifacts.engine_record import BuildOptions, EngineRecord, SourceGraph
from hfvit.artifacts.export_folder import check_same_model, claim_folder, file_digest, staging_folder
from hfvit.artifacts.export_record import ExportedFile, ExportRecord, TensorInfo
from hfvit.errors import GateError, ModelError
from hfvit.export.options import CALIBRATED, CALIBRATION, as_onnx_options
from hfvit.export.pipeline import Export
from hfvit.trt.api import Backend, EngineOptions
from hfvit.trt.builder import build_engine, read_graph
from hfvit.trt.triton import CONFIG, LABELS, PLAN, triton_config, triton_labels
from hfvit.utils.files import commit_file, read_object, wrap_write_errors, write_object, write_text
from hfvit.utils.formatting import aligned

ENGINE_FILE = "model.engine"


class CheckpointGraph(Export):
    """Export a checkpoint to ONNX and validate it as `export onnx` does."""

    def float_files(self, staging: Path) -> None:
        if not self.options.quantize:
            super().float_files(staging)

    @contextmanager
    def graph(self) -> Iterator[tuple[Path, ExportedFile]]:
        """Yield the temporary ONNX file and its record."""
        with self.graphs() as staging:
            ((name, described),) = self.files.items()
            if self.refused:
                raise GateError(self.refusal)
            if self.comparison:
                row = replace(self.comparison.rows[1], artifact=name)
                described.gate = self.comparison.gate.of(row)
            yield staging / name, described

    @property
    def labels(self) -> list[str]:
        return self.classifier.labels


class GivenGraph:
    """Read an existing ONNX file and the configuration beside it."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options = options
        self.folder = folder
        self.started = time.monotonic()

    def log(self, text: str) -> None:
        """Print a line with the elapsed seconds."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    @contextmanager
    def graph(self) -> Iterator[tuple[Path, ExportedFile | None]]:
        """Yield the ONNX file and its record, None when it is not in export.json."""
        artifact = find_artifact(self.options.model)
        self.labels = read_head(artifact).labels
        info = read_graph(artifact.file)
        if self.options.dtype not in (None, info.dtype):
            raise ModelError(
                f"--dtype {self.options.dtype}: must be {info.dtype}, the precision of {artifact.file}. Omit --dtype,"
                " or pass the checkpoint instead of the file."
            )
        if info.classes != len(self.labels):
            raise ModelError(
                f"{artifact.file} has {info.classes} logits, but {CONFIG_FILE} names {len(self.labels)} classes."
            )
        self.config = read_object(artifact.beside(CONFIG_FILE))
        known = ExportRecord.load(artifact.file.parent)
        self.source = known.source or artifact.file.name
        self.weights = known.weights_sha256
        check_same_model(self.folder, self.config, self.weights)
        processor = artifact.beside(PREPROCESSOR_FILE)
        if processor is None:
            raise ModelError(f"{artifact.file}: {PREPROCESSOR_FILE} is missing beside the file.")
        self.processor_config = read_object(processor)
        yield artifact.file, known.files.get(artifact.file.name)


class EngineExport:
    """Run one call of the command.

    Args:
        options: parsed options of `optimum-cli export tensorrt`.
        backend: the TensorRT package to build with.
        engine_options: build options, already checked.
    """

    def __init__(self, options: argparse.Namespace, backend: Backend, engine_options: EngineOptions):
        self.options = options
        self.backend = backend
        self.engine_options = engine_options
        kind = CheckpointGraph if find_artifact(options.model).is_checkpoint else GivenGraph
        self.graph = kind(options, claim_folder(options.output))

    def run(self) -> None:
        """Build and save the engine; after a failed build the output folder is unchanged."""
        graph = self.graph
        folder = graph.folder
        with graph.graph() as (onnx_file, described), staging_folder(folder) as staging:
            graph.log(f"building the engine of {onnx_file.name} with {self.backend.title}")
            built = build_engine(
                onnx_file,
                staging / ENGINE_FILE,
                self.backend,
                self.engine_options,
                verbose=self.options.verbose,
            )
            self.add_calibration(built.options)
            record = EngineRecord(
                **vars(built),
                hfvit_version=hfvit.__version__,
                source=graph.source,
                weights_sha256=graph.weights,
                file=PLAN if self.options.triton else ENGINE_FILE,
                onnx=self.source_graph(onnx_file, described),
                labels=graph.labels,
                preprocessing=graph.processor_config,
            )
            self.save(staging, record)
        print(self.table(record))

    def add_calibration(self, built: BuildOptions) -> None:
        """Record the given options that replace the recipe's calibration images."""
        options = self.options
        if options.quantize not in CALIBRATED or not isinstance(self.graph, CheckpointGraph):
            return
        from hfvit.evaluation.split import redacted_name

        for name in CALIBRATION:
            setattr(built, name, getattr(options, name))
        built.calibration_dataset = built.calibration_dataset and redacted_name(built.calibration_dataset)

    @staticmethod
    def source_graph(file: Path, described: ExportedFile | None) -> SourceGraph:
        """Return the record of the ONNX file for engine.json."""
        graph = SourceGraph(name=file.name, **file_digest(file))
        if described is not None:
            for key in ("opset", "parity", "quantization", "calibration", "gate"):
                setattr(graph, key, getattr(described, key))
        return graph

    def save(self, staging: Path, record: EngineRecord) -> None:
        """Move the files to the output folder.

        engine.json is written first: an engine that does not match it is not loaded, and by it, a build after a kill
        knows the files of this one.
        """
        folder = self.graph.folder
        engine = folder / record.file
        engine.parent.mkdir(exist_ok=True)
        with wrap_write_errors(folder / ENGINE_RECORD_FILE):
            record.save(folder)
        commit_file(staging / ENGINE_FILE, engine)
        write_object(folder / CONFIG_FILE, self.graph.config)
        write_object(folder / PREPROCESSOR_FILE, self.graph.processor_config)
        if self.options.triton:
            write_text(folder / LABELS, triton_labels(record.labels))
            write_text(folder / CONFIG, triton_config(self.options.triton, record))

    def table(self, record: EngineRecord) -> str:
        """Return the summary of the engine."""
        onnx = record.onnx
        low, best, high = record.profile.batches
        products = ", ".join(f"{count} in {kind.lower()}" for kind, count in record.network.products.items())
        rows = [
            ("engine", f"{record.file}, {record.bytes / 1e6:.1f} MB, built in {record.seconds:.1f} s"),
            ("backend", self.backend.title + (f", CUDA {self.backend.cuda}" if self.backend.cuda else "")),
            ("precision", f"{record.dtype}; products of the network: {products}"),
            ("batch", f"{low} to {high}, best at {best}" if low < high else str(low)),
            ("input", _signature(record.input)),
            ("output", _signature(record.output)),
            ("runs on", f"GPUs of compute capability {', '.join(record.compute_capabilities)}"),
            ("onnx", f"{onnx.name}, {onnx.bytes / 1e6:.1f} MB{_checked(onnx)}"),
        ]
        return "\n".join([*aligned(rows), "", f"saved in {self.graph.folder}"])


def graph_options(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of `export onnx` for the graph of an engine."""
    if options.dtype in CALIBRATED:
        return as_onnx_options(options, "tensorrt", dtype="fp32", quantize=options.dtype)
    return as_onnx_options(options, "tensorrt")


def _signature(tensor: TensorInfo) -> str:
    shape = ", ".join(["batch", *map(str, tensor.shape[1:])])
    return f"{tensor.name} ({shape}) {tensor.type.lower()}"


def _checked(onnx: SourceGraph) -> str:
    parity = onnx.parity
    gate = onnx.gate
    checked = f", logits within {parity.max_abs_difference:.2g} of PyTorch's in float32" if parity else ""
    if gate:
        checked += f"; gate {gate.change_points:+.2f} points, {gate.agreement:.2%} agree"
    return checked
