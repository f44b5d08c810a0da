"""Opening images that a data file names, without trusting that file.

A name reaches the disk only after it is shown to lie below the image root; a file reaches a decoder only
after its kind, its size in bytes and its size in pixels are known.
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

# Others are refused: EPS starts Ghostscript, and rare decoders are where the holes are.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")

_MAX_NAME = 1024
_UNWANTED = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_NO_BLOCK = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# EXIF orientation to what undoes it.
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
    """The data cannot be used; the message names file, record and field, and says what to do."""


def normal_path(relative: str) -> str:
    """The one spelling of an image path: components joined by "/", without "." and empty ones.

    Raises `DatasetError` for everything that is not a plain path below the image root: absolute paths, "..",
    URLs, data: URIs, base64, backslashes, control characters. Nothing is read from the disk.
    """
    shown = repr(relative if len(relative) <= 80 else relative[:77] + "...")
    if len(relative) > _MAX_NAME:
        raise DatasetError(
            f"image {shown} is {len(relative)} characters long: give a file's path, not its bytes"
        )
    if _UNWANTED.search(relative):
        raise DatasetError(f"image {shown} holds a control character or broken Unicode")
    if "\\" in relative:
        raise DatasetError(f"image {shown} holds a backslash: write paths with /")
    if _SCHEME.match(relative):
        raise DatasetError(f"image {shown} is a URL or a drive, not a path below the image root")
    if relative.startswith("/"):
        raise DatasetError(f"image {shown} is absolute: give a path relative to the image root")
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DatasetError(f"image {shown} climbs with '..': give a path below the image root")
    if not parts:
        raise DatasetError(f"image {shown} is empty")
    return "/".join(parts)


def check_image(
    root: Path, relative: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> None:
    """Cheap check that `relative` names an image below `root`: it exists, is small enough, its header opens.

    Pixels are not decoded, so a truncated file passes here and fails in `open_image`. Raises `DatasetError`.
    """
    with _opened(root, relative, max_bytes, max_pixels):
        pass


def open_image(
    root: Path, relative: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image at `root`/`relative`, decoded, upright by its EXIF orientation, in RGB.

    Transparent pixels are laid on white, 16-bit grey is scaled to 8 bits, animations give their first frame.
    Raises `DatasetError` where `relative` leads out of `root` (also through a link), is no regular file,
    has more than `max_bytes` bytes or `max_pixels` pixels, or cannot be decoded whole.
    """
    with _opened(root, relative, max_bytes, max_pixels) as image:
        return _decoded(image, relative)


def decode_image(
    data: bytes, name: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image whose file's bytes are `data`, as `open_image` gives it and within the same limits.

    `name` stands for it in errors. Raises `DatasetError`.
    """
    with _header(BytesIO(data), len(data), name, max_bytes, max_pixels) as image:
        return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # Decoders raise anything on broken bytes.
        raise DatasetError(f"image {name!r} is broken: {_reason(error)}") from error


@contextmanager
def _opened(root: Path, relative: str, max_bytes: int, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size checked, not decoded yet."""
    with _open_below(root, relative) as file:
        size = os.fstat(file.fileno()).st_size
        with _header(file, size, relative, max_bytes, max_pixels) as image:
            yield image


@contextmanager
def _header(file: BinaryIO, size: int, name: str, max_bytes: int, max_pixels: int) -> Iterator[Image.Image]:
    """The image that `file` of `size` bytes holds, its header read and its limits checked."""
    if size > max_bytes:
        raise DatasetError(f"image {name!r} has {size:,} bytes, more than the {max_bytes:,} allowed")
    try:
        with warnings.catch_warnings():
            # Pillow's warning comes at a fixed size; the limit that counts is checked below.
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
    """`root`/`relative` open for reading, when it is a regular file that lies below `root`.

    Links are resolved first and must stay below `root`; then every component is opened without following
    links, so that a file swapped for a link in between is refused too. Nothing but folders and regular files
    is ever opened, since opening a FIFO blocks and opening a device may act.
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
                inner = os.open(part, _NO_BLOCK | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            _refuse_irregular(os.stat(name, dir_fd=folder, follow_symlinks=False), relative)
            handle = os.open(name, _NO_BLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            _refuse_irregular(os.fstat(handle), relative)
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        why = error.strerror or _reason(error)
        raise DatasetError(f"image {relative!r} below {str(root)!r}: {why}") from error


def _refuse_irregular(status: os.stat_result, relative: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"image {relative!r} is not a regular file (a folder, FIFO, socket or device)")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        orientation = 1  # Broken EXIF does not make the pixels less usable.
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in any mode but "F"; the result shares nothing with the file."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # `convert` would clip 16-bit values to white instead of scaling them.
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
