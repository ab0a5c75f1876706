"""Images to classify, from IDX files and from files of images, and labels."""

import contextlib
import gzip
import math
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from supermask_jax.commands import files
from supermask_jax.commands.answers import USAGE, Failure, by

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # others start other programs, as EPS does
LARGEST = 2**32  # bytes of an IDX file


class Images(NamedTuple):
    """Images that are read when they are needed.

    Fields:
      names: of the images, in order.
      source: uint8 [n, h, w, c], or the files of the images.
      image_shape: (h, w, c).
    """

    names: list[str]
    source: np.ndarray | list[Path]
    image_shape: tuple[int, int, int]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yields uint8 [n, h, w, c] with n = `size`; the last may be smaller.

        Raises:
          Failure: an image is damaged, or of another size.
          OSError: a file cannot be read.
        """
        for begin in range(0, len(self.source), size):
            some = self.source[begin : begin + size]
            yield some if isinstance(some, np.ndarray) else np.stack([_read(path, self.image_shape) for path in some])


def images(argument: str, image_shape: tuple[int, int, int]) -> Images:
    """Returns the images of a directory, of an image file or of an IDX file.

    Args:
      argument: a directory with .png and .jpg files, which are taken in the order of their names; one such file; or an
        IDX file, which may be compressed by gzip.
      image_shape: (h, w, c) that the network takes. Images of another size are refused; they become grey for one
        channel, and coloured for three.

    Raises:
      Failure: there are no images, or they are of another size; a file is damaged; Pillow is missing.
      OSError: a file cannot be read.
    """
    path = Path(argument).expanduser()
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        array = _of_shape(idx(path), path, image_shape)
        return Images([f"{path.name}[{i}]" for i in range(len(array))], array, image_shape)
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not paths:
        raise Failure(f"{path} holds no images: no file of it ends in {', '.join(SUFFIXES)}", USAGE)
    files.module("PIL", "reading image files")
    for file in paths:  # before any work
        with _opened(file, image_shape):
            pass
    return Images([str(file) for file in paths], paths, image_shape)


def labels(argument: str, count: int, classes: int) -> np.ndarray:
    """Returns int [count] labels from an IDX file, which may be compressed by gzip.

    Raises:
      Failure: the file is damaged, or holds other numbers of labels, or labels of classes that there are not.
      OSError: the file cannot be read.
    """
    path = Path(argument).expanduser()
    array = idx(path)
    if array.ndim != 1 or len(array) != count:
        raise Failure(f"{path} holds {by(array.shape)} numbers, and there are {count} images to label", USAGE)
    if array.max(initial=0) >= classes:
        raise Failure(f"{path} holds the label {array.max()}, and the network has {classes} classes", USAGE)
    return array.astype(int)


def idx(path: Path) -> np.ndarray:
    """Returns the uint8 array of an IDX file, which may be compressed by gzip.

    Raises:
      Failure: the file is no whole IDX file of bytes.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        try:
            return _idx(gzip.GzipFile(fileobj=file) if packed else file, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Failure(f"{path} is a damaged gzip file ({error})") from error


def _idx(stream: IO[bytes] | gzip.GzipFile, path: Path) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:3] != bytes([0, 0, 8]) or not 1 <= magic[3] <= 4:
        raise Failure(f"{path} is no directory of images, no image and no IDX file of bytes")
    shape = np.frombuffer(stream.read(4 * magic[3]).ljust(4 * magic[3], b"\0"), ">u4").tolist()
    promised = math.prod(shape)
    if promised > LARGEST:
        raise Failure(f"{path} is an IDX file of {promised:,} bytes; at most {LARGEST:,} are read")
    content = stream.read(promised + 1)
    if len(content) != promised:
        fault = "is truncated" if len(content) < promised else "is too long"
        raise Failure(f"{path} {fault}: its {by(shape)} numbers take {promised:,} bytes")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _of_shape(array: np.ndarray, path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[1:] != image_shape:
        raise Failure(f"{path} holds {by(array.shape)} numbers; the network takes images of {by(image_shape)}", USAGE)
    if not len(array):
        raise Failure(f"{path} holds no images", USAGE)
    return array


@contextlib.contextmanager
def _opened(path: Path, image_shape: tuple[int, int, int]) -> Iterator["Image.Image"]:
    """Gives the image of a file, whose size is right and whose pixels are not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    h, w, channels = image_shape
    if channels not in MODES:
        raise Failure(f"image files have 1 or 3 channels, and the network takes {channels}", USAGE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.size != (w, h):
                got = f"{image.size[1]} x {image.size[0]}"
                raise Failure(f"{path} has {got} pixels; the network takes {h} x {w} (height x width)", USAGE)
            if image.mode[0] in "IF":
                raise Failure(f"{path} has more than 8 bits a channel (mode {image.mode})", USAGE)
            yield image
    except (UnidentifiedImageError, *bombs, ValueError, SyntaxError) as error:
        raise Failure(f"{path} is no image that can be read ({error})") from error


def _read(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The image of a file, uint8 [h, w, c]."""
    with _opened(path, image_shape) as image:
        try:
            return np.asarray(image.convert(MODES[image_shape[2]])).reshape(image_shape)
        except OSError as error:  # of the decoder
            raise Failure(f"{path} is damaged ({error})") from error
