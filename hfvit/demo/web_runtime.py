"""transformers.js and ONNX Runtime Web for the static page."""

import json
from dataclasses import dataclass
from pathlib import Path

from hfvit.errors import ModelError, one_line
from hfvit.utils.files import expand_user

PACKAGE, RUNTIME = "@huggingface/transformers", "onnxruntime-web"
CDN = "https://cdn.jsdelivr.net"
# What the tests run in Chromium. A CDN never gives other bytes for these names.
TESTED, TESTED_RUNTIME, TESTED_BYTES = "4.3.1", "1.31.0-dev.20260914-8d85527a0", 14_264_838
LIBRARY = "transformers.min.js"
# By itself the library takes a build with WebGPU in it, of twice the bytes.
BUILD = "ort-wasm-simd-threaded"


@dataclass(frozen=True)
class WebRuntime:
    """The library and the runtime as the page names them.

    `files` (name in the page's folder -> file) are to be copied, `hosts` are the other servers that the page
    needs, `bytes` is the size of the runtime.
    """

    library: str
    mjs: str
    wasm: str
    bytes: int
    files: dict[str, Path]
    hosts: tuple[str, ...] = ()


def from_cdn() -> WebRuntime:
    """The tested versions, from jsDelivr."""
    runtime = f"{CDN}/npm/{RUNTIME}@{TESTED_RUNTIME}/dist/{BUILD}"
    library = f"{CDN}/npm/{PACKAGE}@{TESTED}/dist/{LIBRARY}"
    return WebRuntime(library, f"{runtime}.mjs", f"{runtime}.wasm", TESTED_BYTES, {}, (CDN,))


def from_npm(folder: str | Path) -> WebRuntime:
    """Copies of what lies in a package folder of transformers.js, or in a folder in which npm installed it.

    Raises `ModelError` when it is not there, is of another major version, or has another ONNX Runtime beside it than
    the one that it was built with.
    """
    start = expand_user(folder)
    places = (start, start / PACKAGE, start / "node_modules" / PACKAGE)
    package = next((place for place in places if _facts(place).get("name") == PACKAGE), None)
    install = f"npm install {PACKAGE}@{TESTED}"
    if package is None:
        raise ModelError(f"--vendor: {folder} holds no {PACKAGE}; run `{install}` there.")
    facts = _facts(package)
    wanted = facts.get("dependencies", {}).get(RUNTIME)
    if facts.get("version", "").split(".")[0] != TESTED.split(".")[0]:
        raise ModelError(
            f"--vendor: {package} is version {facts.get('version')}; the page needs {TESTED}: `{install}`."
        )
    homes = (package / "node_modules" / RUNTIME, package.parent.parent / RUNTIME)
    runtime = next((home for home in homes if wanted and _facts(home).get("version") == wanted), None)
    if runtime is None:
        raise ModelError(f"--vendor: {RUNTIME} {wanted} does not lie beside {package}; run `{install}`.")
    files = {
        f"vendor/{LIBRARY}": package / "dist" / LIBRARY,
        f"vendor/{BUILD}.mjs": runtime / "dist" / f"{BUILD}.mjs",
        f"vendor/{BUILD}.wasm": runtime / "dist" / f"{BUILD}.wasm",
    }
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ModelError(f"--vendor: there is no {missing[0]}; run `{install}` again.")
    library, mjs, wasm = files
    licenses = {f"vendor/LICENSE.{home.name}": home / "LICENSE" for home in (package, runtime)}
    files |= {name: file for name, file in licenses.items() if file.is_file()}
    return WebRuntime(library, mjs, wasm, files[wasm].stat().st_size, files)


def _facts(package: Path) -> dict:
    file = package / "package.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--vendor: {file} cannot be read: {one_line(error)}") from error
