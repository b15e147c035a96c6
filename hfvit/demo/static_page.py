"""Static page that runs an export in the browser."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hfvit.artifacts.artifact import Artifact, find_artifact, read_head
from hfvit.artifacts.constants import CONFIG_FILE, EXPORT_FILE, PREPROCESSOR_FILE
from hfvit.artifacts.export_folder import file_name
from hfvit.artifacts.export_record import ExportedFile, ExportRecord
from hfvit.data.decode import read_image
from hfvit.demo.web_runtime import WebRuntime
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.export.processor_steps import image_steps
from hfvit.utils.files import check_writable, expand_user, sync, sync_tree, write_object

PAGE_FILE = "page.json"
OWN_FOLDERS = ("model", "vendor", "examples")
# What a browser can run, the best first, with transformers.js' name for it.
BROWSER_FILES = {file_name(quantize="int8"): "q8", file_name(): "fp32"}
MOST_EXAMPLES, EXAMPLE_PIXELS = 12, 768


def browser_file(export: str | Path) -> Path:
    """The ONNX file of an export that a page can run: the 8-bit one, else float32, or the very file that was named.

    Raises `ModelError` with the command that makes one.
    """
    given = expand_user(export)
    if given.suffix == ".onnx":
        find_artifact(given)
        found = [given] if given.name in BROWSER_FILES else []
    else:
        folders = (given, given / "onnx")
        found = [folder / name for name in BROWSER_FILES for folder in folders if (folder / name).is_file()]
    if not found:
        what = "is no file" if given.suffix == ".onnx" else "holds no file" if given.is_dir() else "is no folder"
        raise ModelError(
            f"{export} {what} that a browser can run ({' or '.join(BROWSER_FILES)}). Make one with: optimum-cli export"
            " onnx --model CHECKPOINT --quantize int8 EXPORT"
        )
    return found[0]


def check_page_folder(output: str | Path, overwrite: bool) -> Path:
    """The folder for a page; raises `ModelError` where one cannot be written, or would replace something."""
    folder = expand_user(output)
    if (folder / EXPORT_FILE).exists() or any(folder.glob("*.onnx")):
        raise ModelError(f"--static: {output} cannot be both an export and a page; name another folder.")
    check_writable(folder if folder.exists() else folder.parent, "--static", ModelError)
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if held and not overwrite:
        raise ModelError(f"--static: {output} is not empty ({held[0]}); name another folder, or add --overwrite.")
    foreign = [name for name in OWN_FOLDERS if name in held and PAGE_FILE not in held]
    if foreign:
        raise ModelError(f"--static: {output} holds a {foreign[0]}/ that is no page's; name another folder.")
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
    """Write the page of `export` into `output`; the file that it runs.

    It is put together beside its place and moved there at the end. With `overwrite`, files of the page replace those
    of their names, and others (`.git`, say) stay. `examples` are pictures (paths or URLs) that visitors can click.
    Raises `ModelError` for what no page can be made of, `DataError` for an example that is no picture.
    """
    from hfvit.models.image_text import HFViTFusionConfig  # here: a wrong name is told before torch is imported

    file = browser_file(export)
    folder = check_page_folder(output, overwrite)
    artifact = find_artifact(file)
    head, steps = read_head(artifact), _steps(artifact)
    if isinstance(head.config, HFViTFusionConfig):
        raise ModelError(
            f"{export} classifies images with texts, for which the page has no field; use `hfvit predict`."
        )
    record = ExportRecord.load(file.parent)
    title = title or Path(record.source or file.parent.resolve().parent.name).name
    with _staged(folder) as page:
        _copy(artifact.beside(CONFIG_FILE), page / "model" / CONFIG_FILE)
        _copy(artifact.beside(PREPROCESSOR_FILE), page / "model" / PREPROCESSOR_FILE)
        _copy(file, page / "model" / "onnx" / file.name)
        for name, source in runtime.files.items():
            _copy(source, page / name)
        shown = _write_examples(examples[:MOST_EXAMPLES], page)
        values = {
            "title": title,
            "labels": head.labels,
            "examples": shown,
            "hosts": "".join(f" {host}" for host in runtime.hosts),
            "input": "{1} x {0}".format(*_input_size(steps)),
            "facts": _shown_facts(artifact, file, record.files.get(file.name), _input_size(steps)),
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
                "steps": steps,
                "top_k": top_k,
            },
        )
    return file


class _staged:
    """A folder that becomes `folder` if the block ends without an error, else is deleted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Path:
        self.page = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        return self.page

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._move()
        finally:
            shutil.rmtree(self.page, ignore_errors=True)

    def _move(self) -> None:
        sync_tree(self.page)
        self.page.chmod(0o777 & ~_umask())  # mkdtemp's folders are their owner's alone
        if not self.folder.exists() or not any(self.folder.iterdir()):
            self.page.replace(self.folder)
            sync(self.folder.parent)
            return
        for name in OWN_FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for part in self.page.iterdir():
            part.replace(self.folder / part.name)
        sync(self.folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ModelError(f"{source} cannot be copied into the page: {error.strerror or error}.") from None


def _steps(artifact: Artifact) -> dict:
    """What page.json tells of the preprocessing: `ImageSteps` of a processor that the page can follow."""
    from transformers import AutoImageProcessor

    file = artifact.beside(PREPROCESSOR_FILE)
    if file is None:
        raise ModelError(f"{artifact.file} has no {PREPROCESSOR_FILE} beside it; export the checkpoint again.")
    with wrap_library_errors(ModelError, f"{file} cannot be read"):
        processor = AutoImageProcessor.from_pretrained(file.parent, trust_remote_code=False)
    steps = image_steps(processor)
    if steps.resize is None:
        raise ModelError(f"{file} does not resize pictures, but a page gets them in any size; set do_resize and size.")
    scale = 1.0 if steps.scale is None else steps.scale
    return {
        "resize": steps.resize,
        "resample": int(steps.resample),
        "crop": steps.crop,
        "scale": scale,
        "mean": steps.mean,
        "std": steps.std,
    }


def _input_size(steps: dict) -> tuple[int, int]:
    """(height, width) of the model's input."""
    side = steps["resize"]
    return tuple(steps["crop"] or ((side, side) if isinstance(side, int) else side))


def _write_examples(names: list[str], page: Path) -> list[str]:
    """Small upright copies without the EXIF data, which may hold where a photo was taken; their names in the page."""
    written = []
    for number, name in enumerate(names, 1):
        picture = read_image(name)
        picture.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
        written.append(f"examples/{number}.webp")
        (page / "examples").mkdir(exist_ok=True)
        picture.save(page / written[-1], quality=92)
    return written


def _shown_facts(
    artifact: Artifact, file: Path, known: ExportedFile | None, input_size: tuple[int, int]
) -> list[dict[str, str]]:
    """The figures of the page: `name`, `value`, and a `note` that may be empty. What is unknown is left out."""
    config = json.loads(artifact.beside(CONFIG_FILE).read_text(encoding="utf-8"))
    architecture = config.get("timm_architecture") or next(iter(config.get("architectures") or []), None)
    shown = [("Model", architecture, "{1} x {0} pixels".format(*input_size))] if architecture else []
    gate = known.gate if known else None
    if gate:
        low, high = (f"{100 * bound:.1f}" for bound in gate.accuracy_interval)
        images = f"{gate.data.images:,} pictures"
        shown.append(("Accuracy", f"{100 * gate.accuracy:.1f} %", f"{low} to {high} % (95 % interval), {images}"))
    numbers = "8-bit integers" if BROWSER_FILES[file.name] == "q8" else "32-bit floats"
    shown.append(("Download", f"{file.stat().st_size / 1e6:.1f} MB", f"{numbers}; the runtime comes on top"))
    return [dict(zip(("name", "value", "note"), fact, strict=True)) for fact in shown]


def _render(values: dict, page: Path) -> None:
    source = Path(__file__).parent / "web"
    templates = Environment(
        loader=FileSystemLoader(source), autoescape=lambda name: name.endswith(".html"), undefined=StrictUndefined
    )
    for name, target in (("index.html", "index.html"), ("space.md", "README.md")):
        text = templates.get_template(name).render(values)
        (page / target).write_text(text + "\n", encoding="utf-8")
    for name in ("style.css", "page.js", "worker.js", "pixels.js", "icon.svg"):
        _copy(source / name, page / name)
