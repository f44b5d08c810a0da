"""Images from untrusted paths and bytes: good ones open in RGB, others are refused with a reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepinsert.envs.data.media import DatasetError, check_image, decode_image, normal_path, open_image
from deepinsert.envs.prompts import EncodedImage, Prompt
from deepinsert.envs.rewards.keys import prompt_keys


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root with one red image, and a secret image outside of it."""
    inside = tmp_path / "root"
    (inside / "coco").mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(inside / "coco" / "red.png")
    Image.new("RGB", (6, 4), "blue").save(tmp_path / "secret.png")
    return inside


def colour(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


def test_a_plain_image_opens(root: Path) -> None:
    image = open_image(root, "./coco//red.png")
    assert image.size == (6, 4)
    assert colour(image) == (255, 0, 0)


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert colour(open_image(tmp_path / "link", "coco/red.png")) == (255, 0, 0)


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "other").symlink_to("coco")
    (root / "same.png").symlink_to(root / "coco" / "red.png")
    assert colour(open_image(root, "other/red.png")) == (255, 0, 0)
    assert colour(open_image(root, "same.png")) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        (".", "empty"),
        ("./", "empty"),
        ("/etc/hostname", "absolute"),
        ("//etc/hostname", "absolute"),
        ("..", "climbs"),
        ("../secret.png", "climbs"),
        ("coco/../../secret.png", "climbs"),
        ("coco/../coco/red.png", "climbs"),
        ("https://example.org/cat.png", "URL"),
        ("file:///etc/hostname", "URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "URL"),
        ("C:/windows/cat.png", "drive"),
        ("..\\secret.png", "backslash"),
        ("coco\\red.png", "backslash"),
        ("coco/red.png\0.jpg", "control"),
        ("coco/red\n.png", "control"),
        ("coco/\ud800.png", "broken Unicode"),
        ("iVBORw0KGgoAAAANSUhEUgAA" * 100, "characters long"),
    ],
)
def test_bad_paths_are_refused(root: Path, name: str, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        normal_path(name)
    for use in (check_image, open_image):
        with pytest.raises(DatasetError, match=reason):
            use(root, name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("coco/none.png", "No such file"),
        ("coco/red.png/more", "Not a directory"),
        ("coco", "not a regular file"),
        ("n" * 300, "too long"),
        ("~/secret.png", "No such file"),
        ("$HOME/secret.png", "No such file"),
    ],
)
def test_paths_without_an_image_file_are_refused(root: Path, name: str, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        open_image(root, name)


@pytest.mark.parametrize("target", ["../secret.png", "/etc/hostname", "loop", "/dev/zero"])
def test_links_out_of_the_root_are_refused(root: Path, target: str) -> None:
    (root / "loop").symlink_to(target)
    with pytest.raises(DatasetError, match=r"leads out|symbolic links"):
        open_image(root, "loop")


def test_folders_that_link_out_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "up").symlink_to("..")
    (root / "coco" / "deep").symlink_to(tmp_path)
    for name in ("up/secret.png", "coco/deep/secret.png"):
        with pytest.raises(DatasetError, match="leads out"):
            open_image(root, name)
    # A folder whose name only begins like the root's is outside, too.
    (tmp_path / "root2").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "root2" / "a.png")
    (root / "near").symlink_to("../root2/a.png")
    with pytest.raises(DatasetError, match="leads out"):
        open_image(root, "near")


def test_a_file_swapped_for_a_link_after_it_was_resolved_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def swapping_open(path, flags, *args, **kwargs):
        if path == "red.png":
            (root / "coco" / "red.png").unlink()
            (root / "coco" / "red.png").symlink_to(tmp_path / "secret.png")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", swapping_open)
    with pytest.raises(DatasetError, match="symbolic link"):
        open_image(root, "coco/red.png")


def test_fifos_sockets_and_devices_are_refused_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "fifo")
    monkeypatch.chdir(root)  # A socket's path must be short.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("fifo", "socket"):
            with pytest.raises(DatasetError, match="not a regular file"):
                open_image(root, name)
    with pytest.raises(DatasetError, match="not a regular file"):
        open_image(Path("/dev"), "zero")


def test_size_in_bytes_is_capped(root: Path) -> None:
    size = (root / "coco" / "red.png").stat().st_size
    check_image(root, "coco/red.png", max_bytes=size)
    for use in (check_image, open_image):
        with pytest.raises(DatasetError, match=f"{size} bytes, more than the {size - 1} allowed"):
            use(root, "coco/red.png", max_bytes=size - 1)


def test_size_in_pixels_is_capped(root: Path) -> None:
    check_image(root, "coco/red.png", max_pixels=24)
    for use in (check_image, open_image):
        with pytest.raises(DatasetError, match="6x4, more than the 23 pixels"):
            use(root, "coco/red.png", max_pixels=23)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(root: Path, side: int) -> None:
    (root / "bomb.png").write_bytes(png_header(side, side))
    for use in (check_image, open_image):
        with pytest.raises(DatasetError, match=r"pixels|bomb"):
            use(root, "bomb.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused_when_decoded(root: Path, format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format)
    (root / "whole").write_bytes(whole.getvalue())
    assert open_image(root, "whole").size == (64, 64)
    (root / "cut").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(DatasetError, match="'cut'"):
        open_image(root, "cut")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not an image", b"\x89PNG\r\n\x1a\n", b"\0" * 1000])
def test_files_that_are_no_images_are_refused_by_the_header(root: Path, content: bytes) -> None:
    (root / "odd.png").write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read as"):
        check_image(root, "odd.png")


def test_formats_with_risky_decoders_are_refused(root: Path) -> None:
    Image.new("RGB", (4, 4)).save(root / "picture.eps")  # Decoding it would start Ghostscript.
    with pytest.raises(DatasetError, match="cannot be read as"):
        check_image(root, "picture.eps")


def test_every_mode_becomes_rgb(root: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "RGBA"):
        name = "mode.tif" if mode in ("CMYK", "YCbCr") else "mode.png"
        Image.new("RGB", (2, 2), "white").convert(mode).save(root / name)
        assert colour(open_image(root, name)) == (255, 255, 255), mode


def test_transparent_pixels_lie_on_white(root: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(root / "clear.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    palette.save(root / "palette.png", transparency=0)
    assert colour(open_image(root, "clear.png")) == (255, 255, 255)
    assert colour(open_image(root, "palette.png")) == (255, 255, 255)
    assert colour(open_image(root, "palette.png"), (1, 1)) == (255, 0, 0)


def test_sixteen_bits_are_scaled_and_floats_refused(root: Path) -> None:
    Image.fromarray(np.full((2, 2), 0x8000, np.uint16)).save(root / "grey.png")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(root / "float.tif")
    assert colour(open_image(root, "grey.png")) == (128, 128, 128)
    with pytest.raises(DatasetError, match="floating-point"):
        check_image(root, "float.tif")


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (3, 0)), (3, (3, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 3)), (8, (0, 3))],
)
def test_exif_orientation_is_undone(root: Path, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(root / "turned.png", exif=exif)
    upright = open_image(root, "turned.png")
    assert upright.size == ((4, 2) if orientation < 5 else (2, 4))
    assert colour(upright, corner) == (255, 255, 255)


def test_an_image_with_broken_exif_opens(root: Path) -> None:
    Image.new("RGB", (4, 2), "green").save(root / "exif.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    assert open_image(root, "exif.png").size == (4, 2)


def test_bytes_within_a_data_file_have_the_same_limits(root: Path) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(file, "PNG")
    data = file.getvalue()
    assert colour(decode_image(data, "a#1")) == (255, 255, 255)
    with pytest.raises(DatasetError, match=f"'a#1' has {len(data)} bytes, more than"):
        decode_image(data, "a#1", max_bytes=len(data) - 1)
    with pytest.raises(DatasetError, match="6x4, more than the 23 pixels"):
        decode_image(data, "a#1", max_pixels=23)
    with pytest.raises(DatasetError, match="'a#1' is broken"):
        decode_image(data[: data.index(b"IDAT") + 6], "a#1")
    with pytest.raises(DatasetError, match="'a#1' cannot be read as"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0", "a#1")
    one, other_name, other_bytes = prompt_keys(
        [_about(data, "a"), _about(data, "b"), _about(data + b" ", "a")]
    )
    assert one == other_name != other_bytes


def _about(data: bytes, name: str) -> Prompt:
    return Prompt("", "", "", [], (EncodedImage(Path("."), name, "", data),), "")


def test_no_descriptor_is_left_open(root: Path) -> None:
    (root / "broken.png").write_bytes(b"broken")
    os.mkfifo(root / "fifo")
    before = len(os.listdir("/dev/fd"))
    for name in ("coco/red.png", "broken.png", "fifo", "coco", "coco/none.png", "coco/red.png/x"):
        try:
            open_image(root, name)
        except DatasetError:
            continue
    assert len(os.listdir("/dev/fd")) == before
