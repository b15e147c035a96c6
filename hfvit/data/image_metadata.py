"""Find metadata of an image file that Pillow would copy to many times its size."""

import io
import itertools
import os
import re
import struct
from typing import BinaryIO

# Bytes of a value by its type in a TIFF directory; Pillow ignores other types.
UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SPARE_BYTES = 2**20
EXIF_HEADER = re.compile(rb"II\*\0|MM\0\*")  # Pillow reads no BigTIFF there
EXIF = b"Exif\0\0"
MAX_EXIF_SEGMENTS = 64  # of a JPEG, of 64 KiB each; Pillow copies the earlier ones for each further one
MAX_EXIF_HEADERS = 16  # in other files, each before up to 65,535 values; photographs have one or two
MAX_COMMENT_BLOCKS = 4096  # of a GIF, of 255 bytes each; likewise
MAX_PROFILE = 256 * 1024  # characters of a hexadecimal EXIF profile in a PNG


def excessive_metadata(file: BinaryIO) -> str | None:
    """Describe metadata that would take much more memory than its bytes, or None.

    The values of a TIFF directory, which EXIF is, too, can all be the same bytes of the file, of which Pillow makes a
    copy for each (12.3): 700 KB become 46 GB.

    Args:
        file: image file, at any position.
    """
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"\xff\xd8"):
        return _check_jpeg(file)
    if head.startswith(TIFF_HEADERS):
        return _check_directory(file, 0)
    if head.startswith(b"GIF8"):
        return _check_gif(file)
    is_png = head.startswith(b"\x89PNG")
    is_heif = head[4:8] == b"ftyp"  # or AVIF
    if not is_png and not is_heif and head[8:12] != b"WEBP":
        return None
    file.seek(0)
    content = file.read()
    if not is_heif and (b"eXIf" if is_png else b"EXIF") not in content:
        return None
    starts = [match.start() for match in itertools.islice(EXIF_HEADER.finditer(content), MAX_EXIF_HEADERS + 1)]
    if len(starts) > MAX_EXIF_HEADERS:
        return f"it has more than {MAX_EXIF_HEADERS} headers of EXIF"
    problems = (_check_directory(io.BytesIO(content), start) for start in starts)
    return next(filter(None, problems), None)


def _check_directory(file: BinaryIO, start: int) -> str | None:
    """Check the values of the first directory of a TIFF structure.

    Args:
        file: file with the structure.
        start: position of its header, which offsets are relative to.
    """
    available = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    head = file.read(16)
    order = ">" if head.startswith(b"MM") else "<"
    is_big = b"+" in head[2:4]
    entry = struct.Struct(f"{order}HHQQ" if is_big else f"{order}HHLL")
    inline = 8 if is_big else 4
    try:
        (offset,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}L", head, 8 if is_big else 4)
        file.seek(start + min(offset, available))
        (count,) = struct.unpack(f"{order}Q" if is_big else f"{order}H", file.read(8 if is_big else 2))
    except struct.error:  # truncated
        return None
    content = file.read(min(count, available // entry.size) * entry.size)
    total = 0
    for _, kind, values, where in entry.iter_unpack(content[: len(content) // entry.size * entry.size]):
        size = values * UNITS.get(kind, 0)
        if size > inline and where + size <= available:
            total += size
    if total > 2 * available + SPARE_BYTES:
        return f"the values of its metadata take {total:,} bytes, more than the file has"
    return None


def _check_jpeg(file: BinaryIO) -> str | None:
    file.seek(2)
    parts = []
    while True:
        byte = file.read(1)
        while byte not in (b"\xff", b""):
            byte = file.read(1)
        while byte == b"\xff":  # also fill bytes
            byte = file.read(1)
        if byte in (b"", b"\xd9", b"\xda"):  # end of the file or image, start of the scan
            break
        if byte == b"\0" or byte == b"\x01" or b"\xd0" <= byte <= b"\xd8":  # markers without content
            continue
        length = int.from_bytes(file.read(2), "big") - 2
        if length <= 0:
            continue
        content = file.read(length) if byte == b"\xe1" else b""
        file.seek(length - len(content), os.SEEK_CUR)
        if content.startswith(EXIF):
            parts.append(content[len(EXIF) :])
        if len(parts) > MAX_EXIF_SEGMENTS:
            return f"it has more than {MAX_EXIF_SEGMENTS} segments of EXIF"
    blob = b"".join(parts)
    while blob.startswith(EXIF):
        blob = blob[len(EXIF) :]
    return _check_directory(io.BytesIO(blob), 0)


def _check_gif(file: BinaryIO) -> str | None:
    file.seek(10)
    flags = file.read(3)[:1]
    if flags and flags[0] & 128:
        file.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)  # colors
    blocks = 0
    while file.read(1) == b"!":
        is_comment = file.read(1) == b"\xfe"
        while size := file.read(1)[:1].strip(b"\0"):
            file.seek(size[0], os.SEEK_CUR)
            blocks += is_comment
        blocks += is_comment
        if blocks > MAX_COMMENT_BLOCKS:
            return f"it has more than {MAX_COMMENT_BLOCKS:,} blocks of comments"
    return None
