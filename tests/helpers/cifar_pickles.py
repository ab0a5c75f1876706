"""The Python versions of CIFAR-10 and CIFAR-100, written as Python 2 and NumPy wrote the official files."""

import struct

import numpy as np


def python_2(value) -> bytes:
    """The pickle, protocol 2, of a dictionary, list, whole number, string of bytes or array of bytes."""
    return b"\x80\x02" + _of(value) + b"."


def _of(value) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_of(key) + _of(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_of, value)) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, np.ndarray):
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"(" + b"".join(map(_of, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + _of(value.tobytes()) + b"tb"
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def batches(binary: dict[str, bytes], labels: int = 1) -> dict[str, dict]:
    """{file of the Python version: its dictionary} of the files of a binary version, with so many labels a record."""
    training, found = len(binary) - 1, {}
    for place, (name, content) in enumerate(binary.items(), 1):
        records = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
        title = f"training batch {place} of {training}" if place <= training else "testing batch 1 of 1"
        keys = (b"labels",) if labels == 1 else (b"coarse_labels", b"fine_labels")
        found[name.removesuffix(".bin")] = {
            b"batch_label": title.encode(),
            **{key: records[:, at].tolist() for at, key in enumerate(keys)},
            b"data": np.ascontiguousarray(records[:, labels:]),
            b"filenames": [b"image_%d.png" % n for n in range(len(records))],
        }
    return found


def pickled(binary: dict[str, bytes], labels: int = 1, dumps=python_2) -> dict[str, bytes]:
    """{file of the Python version: its bytes}; see `batches`."""
    return {name: dumps(batch) for name, batch in batches(binary, labels).items()}
