"""Names as a user types them (files, folders, patterns, URLs) -> pictures, or one error that names the bad one."""

import glob
import io
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

import hfvit
from hfvit.decode import refuse_bomb, to_rgb
from hfvit.errors import DataError, one_line

DOWNLOAD_SECONDS = 30  # without an answer


def is_url(name: str | Path) -> bool:
    return str(name).lower().startswith(("http://", "https://"))


def find_pictures(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files and URLs that `names` stand for, in order and each once, and what is wrong with the other names.

    A folder stands for the picture files in it and below it, by the extensions that Pillow can read; a pattern with
    `*`, `?` or `[...]` for the files and folders that it matches (`**` for any depth).
    """
    found, wrong = [], []
    for name in names:
        path = Path(name).expanduser()
        if is_url(name) or path.is_file():
            found.append(name if is_url(name) else str(path))
        elif path.is_dir():
            inside = _in_folder(path)
            found += inside
            wrong += [] if inside else [f"{name}: no picture in this folder"]
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
            files = [file for match in matches for file in (_in_folder(match) if Path(match).is_dir() else [match])]
            found += files
            what = "no picture matches this pattern" if glob.has_magic(name) else "there is no such file or folder"
            wrong += [] if files else [f"{name}: {what}"]
    return list(dict.fromkeys(found)), wrong


def _in_folder(folder: str | Path) -> list[str]:
    readable = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in readable and path.is_file())


def read_picture(name: str | Path) -> Image.Image:
    """The file or URL as RGB, upright, read as training reads it; raises `DataError` for what is no picture."""
    try:
        with Image.open(_download(str(name)) if is_url(name) else Path(name).expanduser()) as image:
            refuse_bomb(image)
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except Exception as error:
        raise DataError(f"{name}: not a readable picture ({type(error).__name__}: {one_line(error)}).") from error


def from_array(pixels: np.ndarray) -> Image.Image:
    """uint8 as RGB; `DataError` for anything else.

    Shapes are `(height, width, 3)`, `(height, width, 4)` whose alpha is left out, and for grey `(height, width, 1)` or
    `(height, width)`.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise DataError(
            f"An array of shape {pixels.shape} and {pixels.dtype} is no picture; give uint8, 0 to 255, of shape"
            " (height, width, 3), or (height, width) for grey."
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels).convert("RGB")


def _download(url: str) -> io.BytesIO:
    # Some servers refuse the name that Python's own client gives.
    request = Request(url, headers={"User-Agent": f"hfvit/{hfvit.__version__}"})
    with urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
        return io.BytesIO(answer.read())
