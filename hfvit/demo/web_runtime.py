"""transformers.js and ONNX Runtime Web for the static page."""

import json
from dataclasses import dataclass
from pathlib import Path

from hfvit.errors import ModelError, one_line
from hfvit.utils.files import expand_user

PACKAGE = "@huggingface/transformers"
RUNTIME = "onnxruntime-web"
CDN = "https://cdn.jsdelivr.net"
# Versions that the tests run in Chromium. Files of a version never change on the CDN.
TESTED = "4.3.1"
TESTED_RUNTIME = "1.31.0-dev.20260914-8d85527a0"
TESTED_BYTES = 14_264_838
LIBRARY = "transformers.min.js"
# The default build of transformers.js includes WebGPU and is twice as large.
BUILD = "ort-wasm-simd-threaded"


@dataclass(frozen=True)
class WebRuntime:
    """transformers.js and ONNX Runtime Web, as the page loads them.

    Attributes:
        library: path or URL of transformers.js.
        mjs: path or URL of the runtime's JavaScript.
        wasm: path or URL of the runtime's WebAssembly.
        bytes: size of the WebAssembly file.
        files: files to copy, by their path in the page.
        hosts: other servers that the page loads from.
    """

    library: str
    mjs: str
    wasm: str
    bytes: int
    files: dict[str, Path]
    hosts: tuple[str, ...] = ()


def from_cdn() -> WebRuntime:
    """Load the tested versions from jsDelivr."""
    runtime = f"{CDN}/npm/{RUNTIME}@{TESTED_RUNTIME}/dist/{BUILD}"
    library = f"{CDN}/npm/{PACKAGE}@{TESTED}/dist/{LIBRARY}"
    return WebRuntime(library, f"{runtime}.mjs", f"{runtime}.wasm", TESTED_BYTES, {}, (CDN,))


def from_npm(folder: str | Path) -> WebRuntime:
    """Copy the files that npm has installed.

    Args:
        folder: package folder of transformers.js, `node_modules`, or the folder that contains `node_modules`.

    Raises:
        ModelError: the package is missing, has another major version, or its ONNX Runtime Web is missing or of
            another version than the package requires.
    """
    start = expand_user(folder)
    candidates = (start, start / PACKAGE, start / "node_modules" / PACKAGE)
    package = next((path for path in candidates if _read_package_json(path).get("name") == PACKAGE), None)
    install = f"npm install {PACKAGE}@{TESTED}"
    if package is None:
        raise ModelError(f"--vendor: no {PACKAGE} in {folder}. Run `{install}` there.")
    description = _read_package_json(package)
    required = description.get("dependencies", {}).get(RUNTIME)
    version = description.get("version", "")
    if version.split(".")[0] != TESTED.split(".")[0]:
        raise ModelError(f"--vendor: {package} must have version {TESTED}, got {version}. Run `{install}`.")
    candidates = (package / "node_modules" / RUNTIME, package.parent.parent / RUNTIME)
    runtime = next(
        (path for path in candidates if required and _read_package_json(path).get("version") == required), None
    )
    if runtime is None:
        raise ModelError(f"--vendor: no {RUNTIME} {required} next to {package}. Run `{install}`.")
    files = {
        f"vendor/{LIBRARY}": package / "dist" / LIBRARY,
        f"vendor/{BUILD}.mjs": runtime / "dist" / f"{BUILD}.mjs",
        f"vendor/{BUILD}.wasm": runtime / "dist" / f"{BUILD}.wasm",
    }
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ModelError(f"--vendor: no file {missing[0]}. Run `{install}` again.")
    library, mjs, wasm = files
    licenses = {f"vendor/LICENSE.{path.name}": path / "LICENSE" for path in (package, runtime)}
    files |= {name: file for name, file in licenses.items() if file.is_file()}
    return WebRuntime(library, mjs, wasm, files[wasm].stat().st_size, files)


def _read_package_json(package: Path) -> dict:
    """Read package.json of a folder, empty if it has none."""
    file = package / "package.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--vendor: cannot read {file} ({one_line(error)}).") from error
