"""Pickles of byte arrays in plain containers, read without running anything that they name.

A pickle is a program, and may name any function to be called. The reader here is Python's own, of fewer instructions;
NumPy's names stand for functions of this file, a few containers are themselves, and every other name is refused.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run.errors import DataError, brief

# Missing are those that make instances, read registries of classes, or take memory that the file does not fill.
INSTRUCTIONS = (
    *("PROTO", "FRAME", "MARK", "STOP", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT"),
    *("BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "TUPLE"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT"),
    *("SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT"),
    *("LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)


def read_pickle(path: Path | str, content: bytes) -> dict[Any, Any]:
    """The dictionary in the pickle `content` of the file `path`; its arrays are uint8 and cannot be written to.

    What Python 2 calls a string is bytes. Raises DataError, with the path, for anything else: another array or value, a
    name that is not among `NAMES`, a pickle that is damaged or followed by more.
    """
    stream = io.BytesIO(content)
    try:
        value = _Reader(stream, encoding="bytes").load()
        if stream.read(1):
            raise ValueError("bytes follow after its end")
        if not isinstance(value, dict):
            raise TypeError(f"it holds {type(value).__name__}, not a dictionary")
    except Exception as error:  # a damaged pickle raises exceptions of almost any type
        raise DataError(
            f"{path} is truncated or damaged, or no pickle of byte arrays in plain containers ({brief(error)}); fetch "
            f"or copy this file again"
        ) from error
    return {key: item.values if isinstance(item, _Array) else item for key, item in value.items()}


class _Array:
    """An array that a pickle makes, and then fills."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, content = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array has no type")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Dtype:
    """The type uint8, whatever more a pickle says of it."""

    def __init__(self, code: str | bytes, align: bool = False, copy: bool = False):
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of uint8")

    def __setstate__(self, state: Any) -> None:
        pass


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _kind(*arguments: Any) -> None:
    raise pickle.UnpicklingError("it calls numpy.ndarray")


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _Named:
    """A function that a pickle may call, and can do nothing else to."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


CONTAINERS = (dict, list, tuple, set, frozenset)
NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Named(_kind),
    ("numpy", "dtype"): _Named(_Dtype),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Named(_array) for core in ("core", "_core")},
    ("_codecs", "encode"): _Named(_encoded),
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in CONTAINERS},
}


class _Reader(pickle._Unpickler):
    """Python's reader of pickles that is written in Python: that in C makes room for as many objects as a file says."""

    dispatch = {  # noqa: RUF012 - as in its parent
        code: run
        for name in INSTRUCTIONS
        for code, run in pickle._Unpickler.dispatch.items()
        if code == getattr(pickle, name)[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return NAMES[module, name]
