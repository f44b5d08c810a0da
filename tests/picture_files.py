"""Writes and encodes real image files for the data readers' tests."""

import base64
import io

from PIL import Image


def save_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def image_bytes(size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, "blue").save(file, "PNG")
    return file.getvalue()


def image_base64(size=(8, 6)):
    return base64.b64encode(image_bytes(size)).decode()
