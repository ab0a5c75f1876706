"""Image files by Pillow: opened with errors that name them, by many threads."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.run.errors import DataError, brief

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # the content of a file decides, not its name


def opened(file: str | BytesIO, use: Callable, name: str = "", cure: str = "copy it again, or remove it"):
    """`use` of an image.

    Args:
      file: its path, or its bytes.
      use: (image of Pillow, not decoded yet) -> what is returned.
      name: what an error calls the image, if not by its path.
      cure: what an error says can be done about an image that is corrupt.

    Raises:
      DataError: the image cannot be read.
    """
    Image = _pillow()
    try:
        with Image.open(file, formats=FORMATS) as image:
            return use(image)
    except Exception as error:  # Pillow raises exceptions of many types on damaged files
        raise DataError(f"cannot read the image {name or file} ({brief(error)}); {cure}") from error


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading images needs Pillow ({error}): pip install 'supermask-jax[experiments]'") from error
    Image.init()  # all formats, before threads ask for them
    return Image


def in_threads(function: Callable, items: Sequence) -> list:
    """[function(item) for item in items], by threads. Raises the error of the first item that has one."""
    if multiprocessing.parent_process() is not None:  # a worker beside others, which are as many as there are cores
        return [function(item) for item in items]
    size = max(1, min(100, len(items) // 64))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor() as pool:  # its own each time: threads of a shared one would be missing after a fork
        results = pool.map(lambda part: [function(item) for item in part], parts)
        return [result for part in results for result in part]


def rgb(image: "Image") -> "Image":
    """The image in red, green and blue, without transparency. Of 16 bits of grey, the upper 8 are taken."""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if "transparency" in image.info:  # Pillow warns of a palette with transparency that becomes RGB at once
        image = image.convert("RGBA")
    return image.convert("RGB")


def visible(directory: Path | os.DirEntry) -> list[os.DirEntry]:
    """What is in a directory and is not hidden, sorted by name."""
    with os.scandir(directory) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
