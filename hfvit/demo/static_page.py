"""Static page that runs an ONNX export in the browser."""

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from jinja2 import StrictUndefined

from hfvit.artifacts.artifact import Artifact, find_artifact, read_head
from hfvit.artifacts.constants import CONFIG_FILE, EXPORT_FILE, PREPROCESSOR_FILE
from hfvit.artifacts.export_folder import file_name
from hfvit.artifacts.export_record import ExportedFile, ExportRecord
from hfvit.data.decode import read_image
from hfvit.data.labels import normalized
from hfvit.demo.run_results import RunResults, read_results
from hfvit.demo.web_runtime import WebRuntime
from hfvit.errors import ModelError
from hfvit.export.processor_steps import image_steps
from hfvit.utils.files import (
    check_writable,
    expand_user,
    read_object,
    sync,
    sync_tree,
    wrap_write_errors,
    write_object,
)
from hfvit.utils.markup import html_environment, markdown_environment

PAGE_FILE = "page.json"
OWN_FOLDERS = ("model", "vendor", "examples")
COPIED_FILES = ("style.css", "page.js", "worker.js", "pixels.js", "icon.svg")
OWN_FILES = ("index.html", "README.md", PAGE_FILE, *COPIED_FILES)
# ONNX files that a browser can run, preferred ones first -> dtype in transformers.js.
BROWSER_FILES = {file_name(quantize="int8"): "q8", file_name(): "fp32"}
MAX_EXAMPLES = 12
EXAMPLE_PIXELS = 768


def browser_file(export: str | Path) -> Path:
    """Find the ONNX file that the page runs: INT8 if there is one, else float32.

    Args:
        export: export folder, output folder of a run with `onnx/`, or an .onnx file, which is then used itself.

    Raises:
        ModelError: there is no such file; the message has the command that writes one.
    """
    given = expand_user(export)
    if given.suffix == ".onnx":
        find_artifact(given)
        found = [given] if given.name in BROWSER_FILES else []
    else:
        folders = (given, given / "onnx")
        found = [folder / name for name in BROWSER_FILES for folder in folders if (folder / name).is_file()]
    if not found:
        raise ModelError(
            f"ARTIFACT: with --static, must be or contain {' or '.join(BROWSER_FILES)}, got {export}. Export one with:"
            " optimum-cli export onnx --model CHECKPOINT --quantize int8 EXPORT"
        )
    return found[0]


def check_page_folder(output: str | Path, overwrite: bool) -> Path:
    """Return the folder for a page after checking that it may be written.

    Its path has no symbolic links.

    Args:
        output: folder of the page.
        overwrite: accept a folder with files.

    Raises:
        ModelError: the folder is not writable, is an export, or has files that would be replaced.
    """
    folder = Path(os.path.realpath(expand_user(output)))
    if (folder / EXPORT_FILE).exists() or any(folder.glob("*.onnx")):
        raise ModelError(f"--static: must not be an export folder, got {output}. Choose another folder.")
    check_writable(folder if folder.exists() else folder.parent, "--static", ModelError)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if names and not overwrite:
        raise ModelError(
            f"--static: {output} is not empty (found {names[0]}). Choose another folder, or pass --overwrite."
        )
    links = [name for name in OWN_FOLDERS if (folder / name).is_symlink()]
    if links:
        raise ModelError(f"--static: {folder / links[0]} is a symbolic link. Choose another folder.")
    wrong = [name for name in OWN_FOLDERS if name in names and not (folder / name).is_dir()]
    wrong += [name for name in OWN_FILES if name in names and not (folder / name).is_file()]
    if wrong:
        kind = "a folder" if wrong[0] in OWN_FOLDERS else "a file"
        raise ModelError(f"--static: {folder / wrong[0]} must be {kind}. Choose another folder.")
    foreign = [name for name in OWN_FOLDERS if name in names and PAGE_FILE not in names]
    if foreign:
        raise ModelError(f"--static: {output} has a {foreign[0]}/ that no page has written. Choose another folder.")
    return folder


def write_page(
    export: str | Path,
    output: str | Path,
    runtime: WebRuntime,
    *,
    title: str | None = None,
    examples: list[str] = (),
    top_k: int = 5,
    overwrite: bool = False,
) -> Path:
    """Write a page that runs `export` into the folder `output`.

    The page is written to a staging folder and moved to `output` at the end.

    Args:
        export: export folder, output folder of a run, or .onnx file.
        output: folder of the page.
        runtime: transformers.js and ONNX Runtime Web, from `from_cdn` or `from_npm`.
        title: heading. Default: name of the exported checkpoint.
        examples: example images, as paths or URLs.
        top_k: number of classes shown.
        overwrite: replace files of an earlier page; other files, such as `.git`, stay.

    Returns:
        The ONNX file that the page runs.

    Raises:
        ModelError: the export or the folder cannot be used.
        DataError: an example is not an image.
    """
    from hfvit.models.image_text import HFViTFusionConfig  # imports torch

    file = browser_file(export)
    folder = check_page_folder(output, overwrite)
    artifact = find_artifact(file)
    head = read_head(artifact)
    steps = _preprocessing_steps(artifact)
    if isinstance(head.config, HFViTFusionConfig):
        raise ModelError(
            f"ARTIFACT: the demo does not support image and text models, got {export}. Use `hfvit predict`."
        )
    record = ExportRecord.load(file.parent)
    results = read_results(artifact)
    # The page classifies one view of an image.
    temperature = None if results.tta else results.temperature
    out_of_distribution = None if results.tta else results.out_of_distribution
    title = title or Path(record.source or file.parent.resolve().parent.name).name
    with _Staging(folder) as page:
        for source, name in (
            (artifact.beside(CONFIG_FILE), CONFIG_FILE),
            (artifact.beside(PREPROCESSOR_FILE), PREPROCESSOR_FILE),
            (file, f"onnx/{file.name}"),
        ):
            _refuse_link(source)
            _copy(source, page / "model" / name)
        for name, source in runtime.files.items():
            _copy(source, page / name)
        values = {
            "title": title,
            "labels": head.labels,
            "multi_label": head.multi_label,
            "examples": _write_examples(examples[:MAX_EXAMPLES], head.labels, page),
            "hosts": "".join(f" {host}" for host in runtime.hosts),
            "input": "{1} x {0}".format(*_input_size(steps)),
            "metadata": _metadata(artifact, file, record.files.get(file.name), _input_size(steps), results),
            "is_calibrated": temperature is not None,
        }
        _render(values, page)
        write_object(
            page / PAGE_FILE,
            {
                "library": runtime.library,
                "runtime": {"mjs": runtime.mjs, "wasm": runtime.wasm},
                "dtype": BROWSER_FILES[file.name],
                "bytes": file.stat().st_size + runtime.bytes,
                "labels": head.labels,
                "multi_label": head.multi_label,
                "thresholds": head.thresholds,
                "temperature": temperature or 1.0,
                "max_energy": out_of_distribution.threshold if out_of_distribution else None,
                "steps": steps,
                "top_k": top_k,
            },
        )
    return file


class _Staging:
    """Temporary folder that replaces the page in `folder` unless the block raises."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        place = self.folder if self.folder.exists() else self.folder.parent
        with wrap_write_errors(f"--static: {place}"):
            self.root = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=place))
            self.page = self.root / "page"
            self.page.mkdir()
        return self.page

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                with wrap_write_errors(f"--static: {self.folder}"):
                    self._move()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def _move(self) -> None:
        """Move the page to its folder; an error restores the earlier page."""
        sync_tree(self.page)
        if not self.folder.exists():
            self.page.replace(self.folder)
            sync(self.folder.parent)
            return
        earlier = self.root / "earlier"
        earlier.mkdir()
        with ExitStack() as undo:
            for name in sorted({*OWN_FOLDERS, *os.listdir(self.page)}):
                new, place, old = (folder / name for folder in (self.page, self.folder, earlier))
                for source, target in ((place, old), (new, place)):
                    if source.exists():
                        source.rename(target)
                        undo.callback(target.rename, source)
            undo.pop_all()
        sync(self.folder)


def _refuse_link(path: Path) -> None:
    """Raise `ModelError` for a symbolic link, whose target would be published."""
    if path.is_symlink():
        raise ModelError(
            f"--static: {path} is a symbolic link to {os.readlink(path)}. A page follows no links; replace it with the"
            " file."
        )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ModelError(f"{source}: cannot be copied into the page ({error.strerror or error}).") from None


def _preprocessing_steps(artifact: Artifact) -> dict:
    """Read the preprocessing for page.json from the artifact's image processor."""
    from hfvit.inference.classifier import load_processor  # imports torch

    file = artifact.beside(PREPROCESSOR_FILE)
    if file is None:
        raise ModelError(f"{artifact.file}: no {PREPROCESSOR_FILE} next to it. Export the checkpoint again.")
    steps = image_steps(load_processor(artifact, trust_remote_code=False))
    if steps.resize is None:
        raise ModelError(f"{file}: must resize images, since those of a page have any size. Set do_resize and size.")
    scale = 1.0 if steps.scale is None else steps.scale
    return {
        "resize": steps.resize,
        "resample": int(steps.resample),
        "crop": steps.crop,
        "rounds_crop_down": steps.rounds_crop_down,
        "scale": scale,
        "mean": steps.mean,
        "std": steps.std,
    }


def _input_size(steps: dict) -> tuple[int, int]:
    """Return the (height, width) of the model's input."""
    side = steps["resize"]
    return tuple(steps["crop"] or ((side, side) if isinstance(side, int) else side))


def _write_examples(names: list[str], labels: list[str], page: Path) -> list[dict[str, str]]:
    """Write small copies of the example images, without EXIF data such as the place.

    Args:
        names: example images, as paths or URLs.
        labels: class names.
        page: folder of the page.

    Returns:
        The `path` in the page and the `label` of each: its folder's name if that is a class, else empty.
    """
    written = []
    for number, name in enumerate(names, 1):
        image = read_image(name)
        image.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
        path = f"examples/{number}.webp"
        (page / "examples").mkdir(exist_ok=True)
        image.save(page / path, quality=92)
        folder = normalized(Path(name).parent.name)
        written.append({"path": path, "label": folder if folder in labels else ""})
    return written


def _metadata(
    artifact: Artifact, file: Path, known: ExportedFile | None, input_size: tuple[int, int], results: RunResults
) -> list[dict[str, str]]:
    """Return the known metadata of the model: entries of `name`, `value`, `note`.

    Args:
        artifact: the export.
        file: ONNX file that the page runs.
        known: its entry in export.json, if it has one.
        input_size: (height, width) in pixels.
        results: results of the run, which are shown if the file was not validated.
    """
    config = read_object(artifact.beside(CONFIG_FILE))
    classes = config.get("architectures")
    names = [config.get("timm_architecture"), *(classes if isinstance(classes, list) else ())]
    architecture = results.description or next((name for name in names if name and isinstance(name, str)), None)
    shown = [("Model", architecture, "{1} x {0} pixels".format(*input_size))] if architecture else []
    gate = known.gate if known else None
    if gate:
        score = gate.score
        low, high = (f"{100 * bound:.1f}" for bound in score.interval)
        images = f"{gate.data.images:,} images, {gate.finished[:10]}"
        shown.append((score.title, f"{100 * score.value:.1f} %", f"{low} to {high} % (95 % interval), {images}"))
    elif results.score:
        shown.append((results.score.title, results.score_text, f"{results.score_note}, before the export"))
    weights = "INT8 weights" if BROWSER_FILES[file.name] == "q8" else "float32 weights"
    shown.append(("Download", f"{file.stat().st_size / 1e6:.1f} MB", f"{weights}, without the runtime"))
    return [dict(zip(("name", "value", "note"), entry, strict=True)) for entry in shown]


def _render(values: dict, page: Path) -> None:
    source = Path(__file__).parent / "web"
    html = html_environment(source, undefined=StrictUndefined)
    markdown = markdown_environment(source, undefined=StrictUndefined)
    for templates, name, target in ((html, "index.html", "index.html"), (markdown, "space.md", "README.md")):
        text = templates.get_template(name).render(values)
        (page / target).write_text(text + "\n", encoding="utf-8")
    for name in COPIED_FILES:
        _copy(source / name, page / name)
