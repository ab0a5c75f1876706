"""Reads a supermask network with NumPy alone; format.md explains every step."""

import hashlib
import io
import json
import zlib
from math import prod

import numpy as np

F4, U4 = np.dtype("<f4"), np.dtype("<u4")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
DTYPES |= {f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
AS241 = """2509.0809287301227 33430.57558358813 67265.7709270087 45921.95393154987 13731.69376550946
1971.5909503065513 133.14166789178438 3.3871328727963665 5226.495278852854 28729.085735721943 39307.89580009271
21213.794301586597 5394.196021424751 687.1870074920579 42.31333070160091 1.0 0.0007745450142783414 0.022723844989269184
0.2417807251774506 1.2704582524523684 3.6478483247632045 5.769497221460691 4.630337846156546 1.4234371107496835
1.0507500716444169e-09 0.0005475938084995345 0.015198666563616457 0.14810397642748008 0.6897673349851
1.6763848301838038 2.053191626637759 1.0"""  # of the centre, then of the tail: numerator and denominator
AS241 = np.array(AS241.split(), "f8").reshape(2, 2, 8)


def cipher(key, counter):  # threefry2x32 of (0, counter), with one key or a key for each counter
    k0, k1 = (np.broadcast_to(np.asarray(word, U4), counter.shape) for word in key)
    schedule, x, y = (k0, k1, k0 ^ k1 ^ U4.type(0x1BD11BDA)), k0.copy(), counter + k1
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = (y << U4.type(turn) | y >> U4.type(32 - turn)) ^ x
        x, y = x + schedule[(i + 1) % 3], y + schedule[(i + 2) % 3] + U4.type(i + 1)
    return x, y


def fold_in(key, number):
    return [word[0] for word in cipher(key, np.array([number], U4))]


def draw(name, scale, key, size):
    scale, words = F4.type(scale), np.bitwise_xor(*cipher(key, np.arange(size, dtype=U4)))
    if name in ("full", "sign"):
        return np.where((words >> 31 == 1) | (name == "full"), scale, -scale)
    if name == "uniform":
        return (2 * (words >> 8).astype("i4") + (1 - 2**24)).astype(F4) * (scale / F4.type(2**24))
    return standard_normal(words) * scale


def standard_normal(words):
    p = (words.astype("f8") + 0.5) / 2.0**32
    q, root2, log2 = p - 0.5, 1.4142135623730951, 0.6931471805599453
    mantissa, exponent = np.frexp(np.minimum(p, 1.0 - p))
    z = (mantissa * root2 - 1.0) / (mantissa * root2 + 1.0)
    log = 2.0 * z * np.polyval([1.0 / n for n in range(27, 0, -2)], z * z) + (exponent - 0.5) * log2
    centre, tail = 0.180625 - q * q, np.sqrt(-log) - 1.6
    inner, outer = (np.polyval(c[0], r) / np.polyval(c[1], r) for c, r in ((AS241[0], centre), (AS241[1], tail)))
    return np.where(centre >= 0, q * inner, np.copysign(outer, q)).astype(F4)


def cast(values, dtype):
    if dtype != "bfloat16":  # which is the upper half of a float32, rounded to the nearest, ties to even
        return values.astype(dtype)
    words = np.ascontiguousarray(values, F4).view(U4)
    return ((words + ((words >> 16 & 1) + 0x7FFF).astype(U4)) & U4.type(0xFFFF0000)).view(F4).reshape(values.shape)


def digest(arrays):  # {name: (array, dtype)}
    total = hashlib.sha256()
    for name, (array, dtype) in sorted(arrays.items()):
        total.update(f"{name}\0{dtype}\0{','.join(map(str, array.shape))}\0".encode())
        total.update((array.view(U4) >> 16).astype("<u2").tobytes() if dtype == "bfloat16" else array.tobytes())
    return total.hexdigest()


def decode(kind, planes, stream, size):
    values, inside = np.zeros(size, "i1" if kind == "signs" else "u1"), np.arange(size)
    for number, (name, length, *code) in enumerate(planes):
        stored = np.unpackbits(np.frombuffer(stream.read(length), "u1"), bitorder="little")
        if name == "bits":
            plane = stored.reshape(inside.size // code[0], -(-code[0] // 8) * 8)[:, : code[0]].ravel() == 1
        else:
            of, count, k = code
            low = stored[: count * k].reshape(count, k) @ (1 << np.arange(k))
            high = np.diff(np.flatnonzero(stored[count * k :]), prepend=-1) - 1
            plane = np.full(inside.size, not of)
            plane[np.cumsum((high << k) + low + 1) - 1] = of
        inside = inside[plane]
        values[inside] = -1 if kind == "signs" and number else number + 1
    return values


def read(path, base=None, largest=2**31):
    """(weights, {name: masks}, state, about); bfloat16, which NumPy lacks, as float32. `base`: {path: array}."""
    with open(path, "rb") as file:
        index = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        content, masks, hashes, kept, weights = file.read(), {}, {}, {}, {}
    if index.pop("__metadata__", None) != {"format": "supermask", "version": "1"}:
        raise ValueError(f"{path} holds no supermask network of version 1")
    arrays = {f"weights/{leaf}": (array, "") for leaf, array in (base or {}).items()}
    for name, entry in index.items():
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        array = np.frombuffer(content[begin:end], "<u2" if dtype == "bfloat16" else dtype).reshape(entry["shape"])
        arrays[name] = (array.astype(U4) << 16).view(F4) if dtype == "bfloat16" else array, dtype
    header = json.loads(zlib.decompress(arrays["header"][0].tobytes()))
    origin, leaves = header["origin"], header["leaves"]
    if sum(prod(leaf["shape"]) for leaf in leaves.values()) > largest:
        raise ValueError(f"{path} claims more than {largest} weights")
    for name, entries in header["masks"].items():
        stream, masks[name], hashed = io.BytesIO(arrays[f"masks/{name}"][0]), {}, {}
        for leaf, entry in entries.items():
            shape, dtype = leaves[leaf]["shape"], leaves[leaf]["dtype"]
            order, (pruned, locked) = np.arange(prod(shape)), entry.get("partition", (0, 0))
            if "partition" in entry:
                key = fold_in(fold_in(origin["key"], zlib.crc32(b"partition")), zlib.crc32(leaf.encode()))
                order = np.argsort(np.bitwise_xor(*cipher(key, order.astype(U4))) >> 9, kind="stable")
            coded = decode(entry["kind"], entry["planes"], stream, order.size - pruned - locked)
            values = np.zeros(shape, coded.dtype)
            values.flat[order[pruned:]], values.flat[np.sort(order[pruned + locked :])] = 1, coded
            kept |= {leaf: kept.get(leaf, False) | (values != 0)} if origin["kind"] == "stored" else {}
            gain = np.array(entry.get("gain", 1), F4)
            hashed |= {f"masks/{leaf}": (values, values.dtype.name)}
            hashed |= {f"gains/{leaf}": (gain, "float32")} if "gain" in entry else {}
            masks[name][leaf] = cast(cast(values, dtype) * cast(gain, dtype), dtype)
        hashes[name] = digest(hashed)
    stream = io.BytesIO(arrays.get("redraws", [b""])[0])
    for leaf, entry in leaves.items():
        shape, dtype = entry["shape"], entry["dtype"]
        if "draw" in entry:
            times = decode(*entry.get("redraws", ("bits", [])), stream, prod(shape))
            key = fold_in(origin["key"], zlib.crc32(leaf.encode()))
            keys = np.array([key, *(fold_in(key, n + 1) for n in range(times.max(initial=0)))])
            values = draw(*entry["draw"], keys[times].T, times.size)
        elif "fill" in entry:
            values = np.full(shape, entry["fill"])
        else:
            values = arrays[f"weights/{leaf}"][0]
            if f"scales/{leaf}" in arrays:
                if values.dtype == "u1":  # of 4 bits: two in a byte, the lower half first
                    pairs = np.stack([values & 15, values >> 4], 1).ravel()[: np.count_nonzero(kept[leaf])]
                    values = (pairs ^ 8).astype("i1") - 8
                values = values * np.broadcast_to(arrays[f"scales/{leaf}"][0], shape)[kept[leaf]]
            if leaf in kept:
                stored, values = values, np.zeros(shape, values.dtype)
                values[kept[leaf]] = stored
        weights[leaf] = cast(values.reshape(shape), dtype), dtype
    state = {name[6:]: array for name, array in arrays.items() if name.startswith("state/")}
    hashes = {"weights": digest(weights), "masks": hashes, "state": digest(state) if header["state"] else None}
    if hashes != header["sha256"]:
        raise ValueError(f"{path} does not hold the network that was saved, or `base` is another one")
    weights, state = ({name: array for name, (array, _) in pairs.items()} for pairs in (weights, state))
    return weights, masks, state if header["state"] else None, header["about"]
