"""Reads a supermask network with PyTorch alone; format.md explains every step."""

import ctypes
import hashlib
import io
import json
import zlib
from functools import reduce
from math import prod

import torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
DTYPES |= {f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
AS241 = """2509.0809287301227 33430.57558358813 67265.7709270087 45921.95393154987 13731.69376550946
1971.5909503065513 133.14166789178438 3.3871328727963665 5226.495278852854 28729.085735721943 39307.89580009271
21213.794301586597 5394.196021424751 687.1870074920579 42.31333070160091 1.0 0.0007745450142783414 0.022723844989269184
0.2417807251774506 1.2704582524523684 3.6478483247632045 5.769497221460691 4.630337846156546 1.4234371107496835
1.0507500716444169e-09 0.0005475938084995345 0.015198666563616457 0.14810397642748008 0.6897673349851
1.6763848301838038 2.053191626637759 1.0"""  # of the centre, then of the tail: numerator and denominator
AS241 = [[float(number) for number in AS241.split()[begin : begin + 8]] for begin in range(0, 32, 8)]
WORD = 2**32 - 1


def cipher(key, counter):  # threefry2x32 of (0, counter), with one key or a key for each counter; words as int64
    k0, k1 = (torch.as_tensor(word).expand(counter.shape) for word in key)
    schedule, x, y = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA), k0, counter + k1 & WORD
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y & WORD
            y = (y << turn & WORD | y >> (32 - turn)) ^ x
        x, y = x + schedule[(i + 1) % 3] & WORD, y + schedule[(i + 2) % 3] + i + 1 & WORD
    return x, y


def fold_in(key, number):
    return [int(word) for word in cipher(key, torch.tensor([number]))]


def draw(name, scale, key, size):
    words, scale = torch.bitwise_xor(*cipher(key, torch.arange(size))), torch.tensor(scale, dtype=torch.float32)
    if name in ("full", "sign"):
        return torch.where((words >> 31 == 1) | (name == "full"), scale, -scale)
    if name == "uniform":
        return (2 * (words >> 8) + (1 - 2**24)).float() * (scale / 2**24)
    return standard_normal(words) * scale


def polynomial(coefficients, x):
    return reduce(lambda total, number: total * x + number, coefficients, torch.zeros_like(x))


def standard_normal(words):
    p = (words.double() + 0.5) / 2.0**32
    q, root2, log2 = p - 0.5, 1.4142135623730951, 0.6931471805599453
    mantissa, exponent = torch.frexp(torch.minimum(p, 1.0 - p))
    z = (mantissa * root2 - 1.0) / (mantissa * root2 + 1.0)
    log = 2.0 * z * polynomial([1.0 / n for n in range(27, 0, -2)], z * z) + (exponent.double() - 0.5) * log2
    centre, tail = 0.180625 - q * q, torch.sqrt(-log) - 1.6
    inner = polynomial(AS241[0], centre) / polynomial(AS241[1], centre)
    outer = polynomial(AS241[2], tail) / polynomial(AS241[3], tail)
    return torch.where(centre >= 0, q * inner, torch.copysign(outer, q)).float()


def digest(tensors):
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape, tensor = ",".join(map(str, tensor.shape)), tensor.contiguous()
        total.update(f"{name}\0{str(tensor.dtype)[6:]}\0{shape}\0".encode())
        total.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b"")
    return total.hexdigest()


def decode(kind, planes, stream, size):
    values, inside = torch.zeros(size, dtype=torch.int8 if kind == "signs" else torch.uint8), torch.arange(size)
    for number, (name, length, *code) in enumerate(planes):
        packed = torch.frombuffer(bytearray(stream.read(length) + b"\0"), dtype=torch.uint8)[:-1]  # never empty
        stored = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).ravel()
        if name == "bits":
            plane = stored.reshape(inside.numel() // code[0], -(-code[0] // 8) * 8)[:, : code[0]].ravel() == 1
        else:
            of, count, k = code
            low = (stored[: count * k].reshape(count, k).long() << torch.arange(k)).sum(1)
            high = torch.diff(torch.nonzero(stored[count * k :]).ravel(), prepend=torch.tensor([-1])) - 1
            plane = torch.full((inside.numel(),), not of)
            plane[torch.cumsum((high << k) + low + 1, 0) - 1] = bool(of)
        inside = inside[plane]
        values[inside] = -1 if kind == "signs" and number else number + 1
    return values


def read(path, base=None, largest=2**31):
    """(weights, {name: masks}, state, about). `base`: {path: tensor}."""
    with open(path, "rb") as file:
        index = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        content, masks, hashes, kept, weights = file.read(), {}, {}, {}, {}
    if index.pop("__metadata__", None) != {"format": "supermask", "version": "1"}:
        raise ValueError(f"{path} holds no supermask network of version 1")
    tensors = {f"weights/{leaf}": tensor for leaf, tensor in (base or {}).items()}
    for name, entry in index.items():
        dtype, (begin, end) = getattr(torch, DTYPES[entry["dtype"]]), entry["data_offsets"]
        tensors[name] = torch.frombuffer(bytearray(content[begin:end] or b"\0" * 8), dtype=dtype)
        tensors[name] = tensors[name][: prod(entry["shape"])].reshape(entry["shape"])
    header = json.loads(zlib.decompress(bytes(tensors["header"].tolist())))
    origin, leaves = header["origin"], header["leaves"]
    if sum(prod(leaf["shape"]) for leaf in leaves.values()) > largest:
        raise ValueError(f"{path} claims more than {largest} weights")
    for name, entries in header["masks"].items():
        stream, masks[name], hashed = io.BytesIO(bytes(tensors[f"masks/{name}"].tolist())), {}, {}
        for leaf, entry in entries.items():
            shape, dtype = leaves[leaf]["shape"], getattr(torch, leaves[leaf]["dtype"])
            order, (pruned, locked) = torch.arange(prod(shape)), entry.get("partition", (0, 0))
            if "partition" in entry:
                key = fold_in(fold_in(origin["key"], zlib.crc32(b"partition")), zlib.crc32(leaf.encode()))
                order = torch.argsort(torch.bitwise_xor(*cipher(key, order)) >> 9, stable=True)
            free = order[pruned + locked :].sort().values
            coded = decode(entry["kind"], entry["planes"], stream, free.numel())
            values = torch.zeros(prod(shape), dtype=coded.dtype)
            values[order[pruned:]], values[free] = 1, coded
            values, gain = values.reshape(shape), torch.tensor(entry.get("gain", 1), dtype=torch.float32)
            kept |= {leaf: kept.get(leaf, False) | (values != 0)} if origin["kind"] == "stored" else {}
            hashed |= {f"masks/{leaf}": values} | ({f"gains/{leaf}": gain} if "gain" in entry else {})
            masks[name][leaf] = values.to(dtype) * gain.to(dtype)
        hashes[name] = digest(hashed)
    stream = io.BytesIO(bytes(tensors["redraws"].tolist()) if "redraws" in tensors else b"")
    for leaf, entry in leaves.items():
        shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
        if "draw" in entry:
            times = decode(*entry.get("redraws", ("bits", [])), stream, prod(shape)).long()
            key = fold_in(origin["key"], zlib.crc32(leaf.encode()))
            keys = torch.tensor([key, *(fold_in(key, n + 1) for n in range(int(times.max()) if len(times) else 0))])
            values = draw(*entry["draw"], keys[times].T, times.numel())
        elif "fill" in entry:
            values = torch.full(shape, entry["fill"], dtype=torch.float64)
        else:
            values = tensors[f"weights/{leaf}"]
            if f"scales/{leaf}" in tensors:
                if values.dtype == torch.uint8:  # of 4 bits: two in a byte, the lower half first
                    pairs = torch.stack([values & 15, values >> 4], 1).flatten()[: int(kept[leaf].sum())]
                    values = (pairs ^ 8).to(torch.int8) - 8
                values = values * tensors[f"scales/{leaf}"].expand(shape)[kept[leaf]]
            if leaf in kept:
                values = torch.zeros(shape, dtype=values.dtype).masked_scatter(kept[leaf], values)
        weights[leaf] = values.reshape(shape).to(dtype)
    state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state/")}
    hashes = {"weights": digest(weights), "masks": hashes, "state": digest(state) if header["state"] else None}
    if hashes != header["sha256"]:
        raise ValueError(f"{path} does not hold the network that was saved, or `base` is another one")
    return weights, masks, state if header["state"] else None, header["about"]
