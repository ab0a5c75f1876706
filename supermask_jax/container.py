"""Reads and writes the .safetensors file that a network is stored in: arrays by name, and a header of JSON.

Nothing here executes or imports what a file says. `docs/format.md` tells the format.
"""

import contextlib
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

FORMAT, VERSION, HEADER = "supermask", "1", "header"
METADATA = (("format", FORMAT), ("version", VERSION))
LARGEST_HEADER = 2**22  # bytes of text; parsed, JSON can take some 25 times as much
DEEPEST = 100  # levels of lists and objects in the header
DTYPES = {  # by their name in the file
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def write(path: str | Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> int:
    """Writes a file atomically; returns its size in bytes.

    Args:
      path: of the file; an older one is replaced.
      arrays: {name: array}.
      header: what JSON can hold.

    Raises:
      ValueError: the header holds what JSON cannot, or more than `LARGEST_HEADER`, or is nested deeper than `DEEPEST`;
        an array has a dtype that is not in `DTYPES`.
      OSError: the file cannot be written; an older one is then unchanged.
    """
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES.values():
            raise ValueError(
                f"{name!r} has {array.dtype}, which a file cannot hold; it can: {', '.join(DTYPES.values())}"
            )
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        _parsed(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header holds what JSON cannot ({error})") from None
    if len(text) > LARGEST_HEADER:
        raise ValueError(f"the header takes {len(text)} bytes of text, more than {LARGEST_HEADER}: shorten `about`")
    whole = {HEADER: np.frombuffer(zlib.compress(text, 9), np.uint8), **arrays}
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in whole.items()}
    content = safetensors.numpy.save(whole, dict(METADATA))
    # Its metadata come first, in either order; the same network is the same file.
    right, wrong = (json.dumps(dict(order), separators=(",", ":")).encode() for order in (METADATA, METADATA[::-1]))
    content = content[:100].replace(wrong, right) + content[100:]
    replace(Path(path), content)
    return len(content)


def replace(path: Path, content: bytes) -> None:
    """Writes a file atomically, and to the disk: an interruption leaves the old one.

    Raises:
      OSError: the file cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(new, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)
        sync_names(path.parent)
    finally:
        new.unlink(missing_ok=True)


def sync_names(folder: Path) -> None:
    """Brings the names in a directory to the disk, where the system has a way to."""
    with contextlib.suppress(OSError):  # Windows, and some file systems, have none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray], int]:
    """Returns (header, {name: array}, size in bytes) of a file.

    Raises:
      ValueError: the file is no such file, of another version, or damaged. The message names the file.
      OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        stored = safetensors.deserialize(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no supermask network, but other .safetensors data")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {metadata.get('version')!r} of the format, and this library reads {VERSION!r}: "
            "install a newer supermask-jax"
        )
    try:
        arrays = {name: array(tensor) for name, tensor in stored}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: an array cannot be read ({error})") from None
    try:
        header = _parsed(_inflated(arrays.pop(HEADER)))
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (KeyError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from None
    return header, arrays, len(content)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of {path: array}: for each path in order, its name, dtype and shape, and its little-endian
    bytes, first axis outermost."""
    total = hashlib.sha256()
    for path in sorted(arrays):
        array = arrays[path]
        shape = ",".join(map(str, array.shape))
        total.update(f"{path}\0{array.dtype.name}\0{shape}\0".encode())
        total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return total.hexdigest()


def array(tensor: Mapping[str, Any]) -> np.ndarray:
    """Returns an array as `safetensors.deserialize` gives it: with dtype, shape and data.

    Raises:
      ValueError: it has a dtype that is not in `DTYPES`.
    """
    if tensor["dtype"] not in DTYPES:
        raise ValueError(f"numbers of {tensor['dtype']} are not read here")
    return np.frombuffer(tensor["data"], jnp.dtype(DTYPES[tensor["dtype"]])).reshape(tensor["shape"])


def _parsed(text: bytes) -> Any:
    decoded = text.decode("utf-8")
    parsed = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    level, depth = [parsed], 0  # Pythons differ in how deep they go, so the format has a bound of its own
    while level := [
        inside
        for value in level
        if isinstance(value, dict | list)
        for inside in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return parsed


def _inflated(packed: np.ndarray) -> bytes:
    """The text of a header, checked by the checksum of its zlib stream; no more than `LARGEST_HEADER` is unpacked."""
    reader = zlib.decompressobj()
    text = reader.decompress(packed.tobytes(), LARGEST_HEADER)
    if not reader.eof or reader.unused_data:
        raise ValueError("it is cut, or too long")
    return text


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no number that can be held")
    return float(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
