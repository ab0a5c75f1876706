"""Reads the tensors of a file that `torch.save` wrote, without PyTorch, and without running anything that it names.

Such a file is a zip archive. Its `data.pkl` is a pickle, a program that builds dictionaries and lists of tensors; its
`data/0`, `data/1` and so on are the numbers. The pickle is followed here step by step, by the few instructions that
tensors need. Each name in it stands for a fixed step of this file, and every other name is refused.
"""

import io
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

ALONE = 'torch.save(torch.load(FILE)["state_dict"], NEW)'
STATES = ("state_dict", "model")  # where training programs put it
LARGEST_PICKLE = 2**22  # bytes; followed, they can take some 100 times as much. That of a ResNet-101 has 0.1 MB
MOST_AXES, LARGEST = 32, 2**48  # of a tensor; the second also bounds what is multiplied
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
NAMES = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {storage}" for storage in STORAGES),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {  # instructions that push what they carry
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
}


class Storage(NamedTuple):
    """Numbers in a row: the record `data/<key>` of the archive."""

    dtype: str
    key: str
    size: int  # how many


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """What a pickle asks for by module and name."""

    text: str


class _Mark:
    """Where a run of values begins on the stack."""


_MARK = _Mark()


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of the tensors of a `.pth` file, which is also called `.pt`, `.bin` or `.tar`.

    The file holds a dictionary of tensors, or a dictionary with one under "state_dict" or "model". Tensors may share
    a storage, and may be any view of it. Nothing is allocated that is larger than the file.

    Args:
      path: of a file that PyTorch 1.6 or newer wrote with `torch.save`.

    Returns:
      Arrays that cannot be written to. Several may be views of the same numbers.

    Raises:
      ValueError: the file is damaged or cut off; it is of the format before PyTorch 1.6; its pickle names anything but
        tensors; a tensor reaches beyond its storage. The message names the file and says what to do.
      OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as stream:
        start = stream.read(2)
        if not start.startswith(b"PK"):
            raise ValueError(_no_archive(path, start))
        stream.seek(0)
        try:
            return _arrays(path.stat().st_size, zipfile.ZipFile(stream))
        except _Refused as error:
            raise ValueError(f"{path} {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive or pickle raises exceptions of almost any type
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is truncated or damaged ({reason}); fetch or copy this file again") from error


class _Refused(ValueError):
    """The file is whole, and holds what is not read here. The message goes on after the name of the file."""


def _no_archive(path: Path, start: bytes) -> str:
    if start.startswith(b"\x80"):
        return (
            f"{path} is of PyTorch's format before 1.6, or another pickle, and not a zip archive: load it in PyTorch "
            "with torch.load, and save it again with torch.save"
        )
    return f"{path} is no file that torch.save wrote: it is not a zip archive; give a .pth or a .safetensors file"


def _arrays(size: int, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """{name: array} of the state_dict in an archive of so many bytes."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()) or sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("its list of records does not fit its size")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise _Refused("is a compressed archive, which torch.save does not write: save the tensors with torch.save")
    if any(entry.compress_size != entry.file_size for entry in entries.values()):  # so much would be allocated
        raise ValueError("its list of records has two sizes for one record")
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused("is a zip archive, but not of torch.save: it has no data.pkl in a folder")
    [root] = roots
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise _Refused("was written on a big-endian machine: load it in PyTorch, and save it as .safetensors")
    if (length := entries[f"{root}data.pkl"].file_size) > LARGEST_PICKLE:
        raise _Refused(f"has a pickle of {length} bytes, more than {LARGEST_PICKLE}: save the tensors alone: {ALONE}")
    contents: dict[str, bytes] = {}
    found = {}
    for name, tensor in _state_dict(_unpickled(archive.read(f"{root}data.pkl"))).items():
        storage = tensor.storage
        if storage.key not in contents:
            contents[storage.key] = archive.read(f"{root}data/{storage.key}")
        content, dtype = contents[storage.key], jnp.dtype(STORAGES[storage.dtype])
        if len(content) != storage.size * dtype.itemsize:
            raise ValueError(f"the storage of {name[:100]!r} has {len(content)} bytes for {storage.size} {dtype}")
        found[name] = _view(name, tensor, np.frombuffer(content, dtype))
    return found


def _view(name: str, tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """The array that a tensor is, without a copy."""
    count = math.prod(tensor.shape)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count > numbers.size or tensor.offset + (last if count else -1) >= numbers.size:
        raise ValueError(
            f"{name[:100]!r} has the shape {tensor.shape}, the strides {tensor.strides} and the offset {tensor.offset}"
            f", which reach beyond the {numbers.size} numbers of its storage"
        )
    strides = tuple(stride * numbers.itemsize for stride in tensor.strides)
    start = tensor.offset if count else 0
    return np.lib.stride_tricks.as_strided(numbers[start:], tensor.shape, strides, writeable=False)


def _state_dict(value: Any) -> dict[str, Tensor]:
    """The tensors by name in what a pickle holds."""
    if isinstance(value, dict):
        inside = [value[name] for name in STATES if isinstance(value.get(name), dict)]
        value = inside[0] if inside else value
    if not isinstance(value, dict) or not value:
        what = "an empty dictionary" if isinstance(value, dict) else f"one {type(value).__name__}"
        raise _Refused(f"holds {what}, and no dictionary of tensors: save the state_dict of the network")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            shown = repr(name[:100]) if isinstance(name, str) else "a key that is a number"
            raise _Refused(f"has at {shown} no tensor but a {kind}: save the state_dict of the network alone: {ALONE}")
    return value


# The pickle.


def _unpickled(program: bytes) -> Any:
    """What a pickle of dictionaries, lists, numbers, text and tensors builds."""
    return _Machine().run(program)


class _Machine:
    """The stack, and the values that the pickle has put aside."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        stream = io.BytesIO(program)
        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            if name == "STOP":
                if len(self.stack) != 1 or stream.read(1):
                    raise ValueError("its pickle does not end where it should")
                return self.stack[0]
            if name in VALUES:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise ValueError("its pickle does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if name == "EMPTY_TUPLE" else int(name[-1])
                stack.append(tuple(self._taken(count)))
            case "TUPLE":
                stack.append(tuple(self._run()))
            case "APPEND" | "APPENDS":
                items = self._taken(1) if name == "APPEND" else self._run()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set(self._taken(2) if name == "SETITEM" else self._run())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                stack.append(_named(" ".join(map(str, _all_text(self._taken(2))))))
            case "REDUCE":
                stack.append(_called(*self._taken(2)))
            case "BINPERSID":
                stack.append(_storage(*self._taken(1)))
            case "BUILD":  # what state_dict() notes of versions, as an attribute of its dictionary
                self._taken(1)
                self._top(dict)
            case _:
                raise _Refused(
                    f"has a pickle with the instruction {name}, which no tensor needs: save the tensors alone: {ALONE}"
                )

    def _taken(self, count: int) -> list[Any]:
        """The last values, which leave the stack."""
        if count > len(self.stack):
            raise ValueError("its pickle takes a value that is not there")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        if any(value is _MARK for value in values):
            raise ValueError("its pickle takes a mark for a value")
        return values

    def _run(self) -> list[Any]:
        """The values since the last mark, which leave the stack with it."""
        start = len(self.stack)
        while self.stack[start - 1] is not _MARK:
            start -= 1
            if not start:
                raise ValueError("its pickle has no mark")
        values = self.stack[start:]
        del self.stack[start - 1 :]
        return values

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"its pickle fills what is no {kind.__name__}")
        return self.stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # hashing others can take forever
                raise _Refused(f"has a dictionary with a key that is a {type(key).__name__}, not text: {ALONE}")
            target[key] = value


def _named(text: str) -> _Name:
    if text not in NAMES:
        shown = text[:100].replace(" ", ".")
        raise _Refused(
            f"has a pickle that names {shown!r}, and only tensors are read: nothing else is looked up or run. If you "
            f"trust the file, load it in PyTorch, and save the tensors alone: {ALONE}"
        )
    return _Name(text)


def _all_text(values: list[Any]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError("its pickle names what is no text")
    return values


def _called(name: Any, arguments: Any) -> Any:
    """What a name that a pickle calls stands for."""
    match name, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch Size"), (tuple() as sizes,):
            return sizes
        case _Name("torch._utils _rebuild_parameter"), (Tensor() as tensor, _, _):
            return tensor
        case _Name("torch._utils _rebuild_tensor_v2"), (Storage() as storage, offset, shape, strides, _, _, *_):
            if not all(isinstance(axes, tuple) and len(axes) <= MOST_AXES for axes in (shape, strides)):
                raise ValueError("a tensor has no shape")
            if len(shape) != len(strides) or not all(_is_count(number) for number in (offset, *shape, *strides)):
                raise ValueError("a tensor's shape and strides are not whole numbers")
            return Tensor(storage, offset, shape, strides)
    raise ValueError("its pickle calls a name with arguments that it does not take")


def _storage(told: Any) -> Storage:
    match told:
        case ("storage", _Name(text), str() as key, str(), size) if _is_count(size):
            dtype = text.removeprefix("torch ")
            if dtype in STORAGES:
                return Storage(dtype, key, size)
    raise ValueError("its pickle refers to what is no storage")


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= LARGEST
