"""Names as a user types them (files, folders, patterns, URLs) -> pictures, or one error that names the bad one."""

import glob
import io
import math
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image

import hfvit
from hfvit.decode import to_rgb
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
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow itself only warns
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except Exception as error:
        raise DataError(f"{name}: not a readable picture ({type(error).__name__}: {one_line(error)}).") from error


def _download(url: str) -> io.BytesIO:
    # Some servers refuse the name that Python's own client gives.
    request = Request(url, headers={"User-Agent": f"hfvit/{hfvit.__version__}"})
    with urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
        return io.BytesIO(answer.read())
