"""Arrays of 0 and 1, of signs and of small whole numbers as few bytes. NumPy only; `docs/format.md` tells the format.

A plane is an array of 0 and 1. It is coded in the shorter of two ways:

- "bits": one bit an element. Rows (the last axis) begin at whole bytes, the first element in the lowest bit.
- "gaps": the numbers of zeros before each one, as Golomb-Rice codes. All their low `k` bits come first, then what is
  left of each in unary. Of ones at random places, that takes at most about 3 % more than their entropy, and reading it
  needs no loop. Where ones are the majority, the zeros are coded.

Other arrays are several planes. Signs: which are not 0, and which of those are negative. Whole numbers: which are above
0, which of those are above 1, and so on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Code = list[Any]
"""["bits", bytes, row] or ["gaps", bytes, the value that is coded, how many there are, k]."""
KINDS = ("bits", "signs", "levels")
MOST_PLANES = 255


def encode(values: np.ndarray) -> tuple[str, list[Code], bytes]:
    """Returns (kind, the codes of its planes, their bytes) of an array.

    Args:
      values: whole numbers: 0 and 1 ("bits"), or -1, 0 and 1 ("signs"), or 0 to 255 ("levels").

    Raises:
      ValueError: other values.
    """
    values = np.asarray(values)
    with np.errstate(invalid="ignore"):  # NaN, which is refused below
        whole = values.astype(np.int16)
    low, high = (int(whole.min()), int(whole.max())) if whole.size else (0, 0)
    if not np.array_equal(whole, values) or low < -1 or high > MOST_PLANES or (low < 0 and high > 1):
        raise ValueError("values must be 0 and 1, or -1, 0 and 1, or whole numbers from 0 to 255")
    if low < 0:
        kind, planes = "signs", [whole != 0, whole[whole != 0] < 0]
    elif high > 1:
        kind, planes = "levels", [whole > 0, *(whole[whole >= level] > level for level in range(1, high))]
    else:
        kind, planes = "bits", [whole > 0]
    coded = [_encode_plane(plane) for plane in planes]
    return kind, [code for code, _ in coded], b"".join(payload for _, payload in coded)


class Stream:
    """Bytes that are taken from the front."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def take(self, codes: Sequence[Code]) -> bytes:
        """Returns the bytes of an array whose planes have these codes; fewer, where the stream ends."""
        begin, self._at = self._at, self._at + sum(code[1] for code in codes)
        return self._content[begin : self._at]

    def end(self) -> None:
        """Raises ValueError unless all has been taken, and no more."""
        if self._at != len(self._content):
            raise ValueError(f"the codes take {self._at} bytes, and there are {len(self._content)}")


def decode(kind: str, codes: Sequence[Code], payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array of `shape` that `encode` took: uint8, or int8 of signs.

    Raises:
      ValueError: codes and bytes that `encode` does not make. No more memory is taken than a small multiple of the
        bytes and of the shape.
    """
    parts = _parts(codes, payload)
    plane = _decode_plane(*next(parts), math.prod(shape))
    values = plane.astype(np.int8 if kind == "signs" else np.uint8)
    inside = np.flatnonzero(plane) if kind != "bits" else np.zeros(0, np.int64)
    for code, part in parts:
        if kind == "bits":
            raise ValueError("a mask of bits has one plane")
        plane = _decode_plane(code, part, inside.size)
        if kind == "signs":
            values[inside[plane]] = -1
        else:
            inside = inside[plane]
            values[inside] += 1
    return values.reshape(shape)


def _encode_plane(plane: np.ndarray) -> tuple[Code, bytes]:
    row = plane.shape[-1] if plane.ndim and plane.size else max(plane.size, 1)
    packed = np.packbits(plane.reshape(-1, row), axis=-1, bitorder="little")
    of = int(2 * np.count_nonzero(plane) <= plane.size)
    gaps = np.diff(np.flatnonzero(plane.ravel() == bool(of)), prepend=-1) - 1
    k, length = _best_k(gaps)
    if packed.size <= -(-length // 8):
        return ["bits", packed.size, row], packed.tobytes()
    low = (gaps[:, None] >> np.arange(k)) & 1
    ends = np.cumsum((gaps >> k) + 1)
    unary = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    unary[ends - 1] = 1
    payload = np.packbits(np.concatenate([low.ravel().astype(np.uint8), unary]), bitorder="little").tobytes()
    return ["gaps", len(payload), of, gaps.size, k], payload


def _best_k(gaps: np.ndarray) -> tuple[int, int]:
    """(k, bits) of the shortest Golomb-Rice code."""
    lengths = [gaps.size * (k + 1) + int((gaps >> k).sum()) for k in range(int(gaps.max(initial=0)).bit_length() + 1)]
    k = int(np.argmin(lengths))
    return k, lengths[k]


def _parts(codes: Sequence[Code], payload: bytes) -> Iterator[tuple[Code, bytes]]:
    """Each code with its bytes; ValueError where they do not fill the payload."""
    if not 1 <= len(codes) <= MOST_PLANES:
        raise ValueError(f"a mask has 1 to {MOST_PLANES} planes, not {len(codes)}")
    begin = 0
    for code in codes:
        name = code[0] if code else None
        if name not in _READERS or len(code) != _READERS[name][0] or not all(_is_count(part) for part in code[1:]):
            raise ValueError(f"{code!r} is no code of a plane")
        yield code, payload[begin : begin + code[1]]
        begin += code[1]
    if begin != len(payload):
        raise ValueError(f"the planes take {begin} bytes, and there are {len(payload)}")


def _decode_plane(code: Code, payload: bytes, size: int) -> np.ndarray:
    if len(payload) != code[1]:
        raise ValueError(f"a plane has {len(payload)} of {code[1]} bytes")
    return _READERS[code[0]][1](np.frombuffer(payload, np.uint8), size, *code[2:])


def _read_bits(payload: np.ndarray, size: int, row: int) -> np.ndarray:
    if row < 1 or size % row or row > max(size, 1) or payload.size != size // row * -(-row // 8):
        raise ValueError(f"{payload.size} bytes are not {size} bits in rows of {row}")
    rows = payload.reshape(size // row, -(-row // 8))
    return np.unpackbits(rows, axis=-1, count=row, bitorder="little").ravel().view(bool)


def _read_gaps(payload: np.ndarray, size: int, of: int, count: int, k: int) -> np.ndarray:
    bits = np.unpackbits(payload, bitorder="little")
    if of > 1 or k > 32 or count * (k + 1) > bits.size or bits.size << k >= 2**62:  # no place overflows
        raise ValueError(f"{payload.size} bytes do not hold {count} gaps of {k} low bits")
    low = bits[: count * k].reshape(count, k) @ (1 << np.arange(k))
    ends = np.flatnonzero(bits[count * k :])
    if ends.size != count:
        raise ValueError(f"there are {ends.size} gaps where {count} should be")
    places = np.cumsum(((np.diff(ends, prepend=-1) - 1) << k) + low + 1) - 1
    if count and places[-1] >= size:
        raise ValueError(f"gaps that reach element {places[-1]} of {size}")
    plane = np.full(size, not of)
    plane[places] = bool(of)
    return plane


_READERS: dict[Any, tuple[int, Callable[..., np.ndarray]]] = {"bits": (3, _read_bits), "gaps": (5, _read_gaps)}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40
