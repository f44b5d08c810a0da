"""Opens the images that a data file names, without trusting that file.

A path is opened only after a check that it lies below the image root. A file reaches a decoder only after a
check of its type, its size in bytes and its size in pixels.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

MAX_BYTES = 64 * 2**20
"""Largest image file, in bytes."""
MAX_PIXELS = 89_478_485
"""Largest image, in pixels: Pillow's own warning level (a quarter of a gigabyte in RGB)."""

# Other formats are refused: EPS starts Ghostscript, and rare decoders have most of the security bugs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")

_MAX_NAME = 1024
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# The transposition that undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DatasetError(ValueError):
    """The data cannot be used: the message names file, record and field, and the remedy."""


def normal_path(relative: str) -> str:
    """Normalise an image path: components joined by "/", without "." and empty ones.

    This reads nothing from the disk. Raises `DatasetError` for everything that is not a plain path below the
    image root: absolute paths, "..", URLs, data: URIs, base64, backslashes, control characters.
    """
    label = repr(relative if len(relative) <= 80 else relative[:77] + "...")
    if len(relative) > _MAX_NAME:
        raise DatasetError(
            f"image {label} is {len(relative)} characters long: give the path of a file, not its bytes"
        )
    if _CONTROL.search(relative):
        raise DatasetError(f"image {label} holds a control character or broken Unicode")
    if "\\" in relative:
        raise DatasetError(f"image {label} holds a backslash: write paths with /")
    if _SCHEME.match(relative):
        raise DatasetError(f"image {label} is a URL or a drive, not a path below the image root")
    if relative.startswith("/"):
        raise DatasetError(f"image {label} is absolute: give a path relative to the image root")
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DatasetError(f"image {label} climbs with '..': give a path below the image root")
    if not parts:
        raise DatasetError(f"image {label} is empty")
    return "/".join(parts)


def check_image(
    root: Path, relative: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> None:
    """Check cheaply that `root`/`relative` is a small enough image with a readable header.

    Pixels are not decoded, so a truncated file passes here and fails in `open_image`.

    Args:
        root: The image root.
        relative: Path of the image below `root`.
        max_bytes: Largest file, in bytes.
        max_pixels: Largest image, in pixels.

    Raises:
        DatasetError: The image fails the check.
    """
    with _open_header(root, relative, max_bytes, max_pixels):
        pass


def open_image(
    root: Path, relative: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode the image at `root`/`relative` to RGB, upright by its EXIF orientation.

    Transparent pixels are laid on white, 16-bit grey is scaled to 8 bits, and animations give their first
    frame.

    Args:
        root: The image root.
        relative: Path of the image below `root`.
        max_bytes: Largest file, in bytes.
        max_pixels: Largest image, in pixels.

    Raises:
        DatasetError: `relative` leads out of `root` (also through a link), is no regular file, is larger than
            allowed, or cannot be decoded completely.
    """
    with _open_header(root, relative, max_bytes, max_pixels) as image:
        return _decode(image, relative)


def decode_image(
    data: bytes, name: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file's content to RGB, in the same way and within the same limits as `open_image`.

    Args:
        data: Content of the image file.
        name: Name of the image in errors.
        max_bytes: Largest file, in bytes.
        max_pixels: Largest image, in pixels.

    Raises:
        DatasetError: The image is larger than allowed or cannot be decoded completely.
    """
    with _read_header(BytesIO(data), len(data), name, max_bytes, max_pixels) as image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # Decoders raise exceptions of any kind on broken bytes.
        raise DatasetError(f"image {name!r} is broken: {_reason(error)}") from error


@contextmanager
def _open_header(root: Path, relative: str, max_bytes: int, max_pixels: int) -> Iterator[Image.Image]:
    """Open the image below `root`, read its header and check its size, without decoding it."""
    with _open_below(root, relative) as file:
        size = os.fstat(file.fileno()).st_size
        with _read_header(file, size, relative, max_bytes, max_pixels) as image:
            yield image


@contextmanager
def _read_header(
    file: BinaryIO, size: int, name: str, max_bytes: int, max_pixels: int
) -> Iterator[Image.Image]:
    """Read the header of the image in `file` (`size` bytes) and check its size, without decoding it."""
    if size > max_bytes:
        raise DatasetError(f"image {name!r} has {size:,} bytes, more than the {max_bytes:,} allowed")
    try:
        with warnings.catch_warnings():
            # Pillow warns at a fixed number of pixels; `max_pixels` is checked below instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Exception as error:
        raise DatasetError(
            f"image {name!r} cannot be read as {', '.join(FORMATS)}: {_reason(error)}"
        ) from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise DatasetError(
                f"image {name!r} is {width}x{height}, more than the {max_pixels:,} pixels allowed"
            )
        if image.mode == "F":
            raise DatasetError(f"image {name!r} has floating-point pixels: save it with 8 or 16 bits")
        yield image


def _open_below(root: Path, relative: str) -> BinaryIO:
    """Open `root`/`relative` for reading where it is a regular file below `root`.

    Links are resolved first and must stay below `root`. Then every component is opened without following
    links, so that a file swapped for a link in between is refused, too. Only folders and regular files are
    opened, since opening a FIFO blocks and opening a device may have effects.
    """
    relative = normal_path(relative)
    try:
        real_root = os.path.realpath(root, strict=True)
        real = os.path.realpath(os.path.join(real_root, relative), strict=True)
        if os.path.commonpath([real_root, real]) != real_root:
            raise DatasetError(f"image {relative!r} is a link that leads out of the image root {str(root)!r}")
        *folders, name = os.path.relpath(real, real_root).split(os.sep)
        folder = os.open(real_root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            for part in folders:
                inner = os.open(part, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            _refuse_irregular(os.stat(name, dir_fd=folder, follow_symlinks=False), relative)
            handle = os.open(name, _OPEN_FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            _refuse_irregular(os.fstat(handle), relative)
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        reason = error.strerror or _reason(error)
        raise DatasetError(f"image {relative!r} below {str(root)!r}: {reason}") from error


def _refuse_irregular(status: os.stat_result, relative: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"image {relative!r} is not a regular file (a folder, FIFO, socket or device)")


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation undone."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        orientation = 1  # The pixels are usable despite broken EXIF data.
    transposition = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in any mode but "F" to 8-bit RGB; the result does not refer to the file."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # `convert` would clip 16-bit values to white instead of scaling them to 8 bits.
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
