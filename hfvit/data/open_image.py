"""Open image files with a list of allowed formats and limits.

This is the only module that calls `PIL.Image.open`, since Pillow otherwise tries all formats, whatever the file name,
and starts Ghostscript for PostScript. Only the first frame of an animation is read.
"""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import (  # noqa: F401  (each registers its format)
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from hfvit.data.image_metadata import MAX_PROFILE, TIFF_HEADERS, excessive_metadata
from hfvit.errors import one_line

with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# These formats start no other program and open no other file. MPO is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
EXIF_ORIENTATION = 0x0112
START_OF_SCAN = b"\xff\xda"  # JPEG marker; it does not occur in image data, where 0xFF is followed by 0


class UnsupportedTiffError(UnidentifiedImageError):
    """Error for a TIFF file that Pillow does not read, such as a multispectral image."""


class ImageLimitError(ValueError):
    """Error for an image file that exceeds one of its `ImageLimits`."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image file, checked before its pixels are decoded.

    Args:
        max_bytes: file size in bytes. Default: no limit.
        max_pixels: width times height. Default: `PIL.Image.MAX_IMAGE_PIXELS` (89 million).
        max_aspect_ratio: longer side divided by shorter side, since resizing the shorter side of a long strip to the
            model's size creates a huge image.
        max_scans: number of scans of a progressive JPEG, each of which takes a pass over all pixels but as little as
            20 bytes. Default: no limit.
    """

    max_bytes: int | None = None
    max_pixels: int | None = None
    max_aspect_ratio: float = 1000.0
    max_scans: int | None = None

    def check_bytes(self, size: int) -> None:
        """Raise `ImageLimitError` for a file of more than `max_bytes`."""
        if self.max_bytes is not None and size > self.max_bytes:
            raise ImageLimitError(f"the file has more than the limit of {self.max_bytes:,} bytes")

    def check_size(self, width: int, height: int) -> None:
        """Raise `ImageLimitError` for too many pixels or too large an aspect ratio."""
        limit = self.max_pixels or Image.MAX_IMAGE_PIXELS or math.inf
        if width * height > limit:
            raise ImageLimitError(
                f"the image has {width} x {height} = {width * height:,} pixels, more than the limit of {limit:,}"
            )
        if max(width, height) > self.max_aspect_ratio * max(1, min(width, height)):
            raise ImageLimitError(
                f"the image has {width} x {height} pixels, an aspect ratio above the limit of"
                f" {self.max_aspect_ratio:g}"
            )


# For images of a data set, and of whoever starts the command.
DEFAULT_LIMITS = ImageLimits(max_bytes=512 * 2**20)
# For a server that accepts uploads.
UPLOAD_LIMITS = ImageLimits(max_bytes=20 * 2**20, max_pixels=32_000_000, max_aspect_ratio=50.0, max_scans=64)


def formats() -> tuple[str, ...]:
    """Return the formats of `FORMATS` that this installation of Pillow supports.

    AVIF is optional, HEIF needs pillow-heif.
    """
    return tuple(name for name in FORMATS if name in Image.OPEN)


def extensions() -> set[str]:
    """Return the file name extensions of `formats`, in lower case with a dot."""
    known = formats()
    # `Image.registered_extensions` would import the plugins of all other formats.
    return {extension for extension, name in Image.EXTENSION.items() if name in known}


@contextmanager
def open_image(source: bytes | str | Path, limits: ImageLimits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """Open an image file without decoding its pixels.

    Args:
        source: content of a file, or path of a regular file.
        limits: limits to check before the image is decoded.

    Raises:
        ImageLimitError: the file exceeds one of the limits.
        UnidentifiedImageError: the file is in none of `formats`.
        OSError: the file cannot be read, or is a device or a pipe.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else _open_regular(source) as file:
        limits.check_bytes(file.seek(0, os.SEEK_END))
        if problem := excessive_metadata(file):
            raise ImageLimitError(problem)
        file.seek(0)
        try:
            image = Image.open(file, formats=formats())
        except Image.DecompressionBombError as error:  # above twice Image.MAX_IMAGE_PIXELS
            raise ImageLimitError(one_line(error)) from None
        except UnidentifiedImageError:
            file.seek(0)
            if file.read(4) not in TIFF_HEADERS:
                raise
            raise UnsupportedTiffError(
                "a TIFF file with bands or values that Pillow does not read, such as a multispectral image. Convert it"
                " to RGB with 8 bits"
            ) from None
        with image:
            limits.check_size(image.width, image.height)
            if limits.max_scans is not None and image.format in ("JPEG", "MPO"):
                _check_scans(file, limits.max_scans)
            yield image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open image, 1 without one.

    Raises:
        ImageLimitError: it is in a profile of text, and this is too long.
    """
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # its metadata may follow the pixels
        if len(image.info.get("Raw profile type exif") or "") > MAX_PROFILE:
            raise ImageLimitError(f"its EXIF profile has more than {MAX_PROFILE:,} characters")
    return image.getexif().get(EXIF_ORIENTATION, 1)


def image_error_reason(error: Exception) -> str:
    """Describe an exception of `open_image` or of a decoder."""
    if isinstance(error, ImageLimitError | UnsupportedTiffError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable image ({type(error).__name__}: in none of the formats {', '.join(formats())})"
    return f"not a readable image ({type(error).__name__}: {one_line(error)})"


def _check_scans(file: BinaryIO, limit: int) -> None:
    position = file.tell()
    file.seek(0)
    scans = file.read().count(START_OF_SCAN)
    file.seek(position)
    if scans > limit:
        raise ImageLimitError(f"the JPEG file has {scans:,} scans, more than the limit of {limit}")


def _open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, and raise `OSError` for a device, socket or pipe."""
    # O_NONBLOCK, since opening a pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")
