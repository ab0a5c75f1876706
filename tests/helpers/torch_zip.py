"""Files as `torch.save` writes them, without PyTorch: a zip archive of a pickle, protocol 2, and of storages."""

import io
import struct
import zipfile
from typing import NamedTuple

import numpy as np

STORAGES = {
    "float64": b"DoubleStorage",
    "float32": b"FloatStorage",
    "float16": b"HalfStorage",
    "bfloat16": b"BFloat16Storage",
    "int64": b"LongStorage",
    "int32": b"IntStorage",
    "int16": b"ShortStorage",
    "int8": b"CharStorage",
    "uint8": b"ByteStorage",
    "bool": b"BoolStorage",
}


class View(NamedTuple):
    """A tensor that is a view of the storage of this key; offset and strides count numbers."""

    key: str
    shape: tuple
    strides: tuple
    offset: int = 0


class Parameter(NamedTuple):
    array: np.ndarray


class Raw(NamedTuple):
    """Instructions as they are."""

    program: bytes


def saved(value, storages=None, ordered=False, **kwargs) -> bytes:
    """The bytes of a file that holds `value`: dictionaries, lists, numbers, text, arrays, and views of `storages`."""
    storages = dict(storages or {})
    program = b"\x80\x02" + _of(value, storages, ordered) + b"."
    return archive(program, {key: numbers.tobytes() for key, numbers in storages.items()}, **kwargs)


def archive(program: bytes, storages: dict[str, bytes], root="net", byteorder=b"little", kind=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", kind) as file:
        file.writestr(f"{root}/data.pkl", program)
        file.writestr(f"{root}/byteorder", byteorder)
        for key, numbers in storages.items():
            file.writestr(f"{root}/data/{key}", numbers)
        file.writestr(f"{root}/version", b"3\n")
    return content.getvalue()


def _of(value, storages, ordered):
    def of(inner):
        return _of(inner, storages, ordered)

    match value:
        case Raw():
            return value.program
        case View():
            return _tensor(value, storages[value.key])
        case Parameter():
            return b"ctorch._utils\n_rebuild_parameter\n" + of(value.array) + b"\x88" + ORDERED + b"\x87R"
        case np.ndarray():
            key = f"{len(storages)}"
            storages[key] = value.ravel()
            strides = tuple(stride // value.itemsize for stride in np.empty(value.shape, value.dtype).strides)
            return _tensor(View(key, value.shape, strides), value)
        case dict():
            start = ORDERED if ordered else b"}"
            end = b"}" + _text("_metadata") + b"}sb" if ordered else b""
            return start + b"(" + b"".join(of(key) + of(item) for key, item in value.items()) + b"u" + end
        case list():
            return b"](" + b"".join(map(of, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(of, value)) + b"t"
        case str():
            return _text(value)
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case float():
            return b"G" + struct.pack(">d", value)
        case int():
            return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


ORDERED = b"ccollections\nOrderedDict\n)R"


def _text(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _tensor(view, numbers):
    kind = b"ctorch\n" + STORAGES[numbers.dtype.name] + b"\n"
    storage = b"(" + _text("storage") + kind + _text(view.key) + _text("cpu") + _of(numbers.size, {}, False) + b"tQ"
    numbers = b"".join(_of(part, {}, False) for part in (view.offset, view.shape, view.strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89" + ORDERED + b"tR"
