"""Files that were mutated, by accident or on purpose, are a ValueError, or exactly the network that was saved."""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import networks
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import supermask_jax as sm
from supermask_jax.origins import arrays_of

KINDS = (
    *(
        "kaiming_normal 0.3",
        "seed",
        "redraws 3",
        "partition",
        "some stored",
        "levels",
        "gain float32",
        "names",
        "method",
    ),
    *("stored int8 of bfloat16", "base", "odd leaves", "odd leaves drawn"),
)
MOST_SECONDS, MOST_BYTES = 30, 2**28  # of one file of a few hundred bytes: CPU time, so that a hang is told, and memory


@pytest.fixture(autouse=True)
def little_memory():
    with networks.limited_memory():
        yield


def fuzz(examples):
    """The same examples at each run, and no limit to the time that one takes: the first of a shape compiles."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


@functools.cache
def folder():
    kept = tempfile.TemporaryDirectory()
    return kept, Path(kept.name)


def loaded(content):
    """The network that a file of these bytes holds, as {tree and path: (dtype, shape, bytes)}."""
    path = folder()[1] / "net.safetensors"
    path.write_bytes(content)
    net = sm.load_subnetwork(path, base=networks.network("base").base)
    trees = {"weights": net.weights, "masks": net.masks, "state": net.model_state}
    return {
        f"{name} {leaf}": (array.dtype.name, array.shape, array.tobytes())
        for name, tree in trees.items()
        for leaf, array in arrays_of(tree).items()
    }


@functools.cache
def file_of(kind):
    path = folder()[1] / f"{kind}.safetensors"
    networks.network(kind).save(path)
    return path.read_bytes()


@functools.cache
def right_of(kind):
    return loaded(file_of(kind))


def check(mutation):
    """A file is refused in little time and memory, or it holds the network of its kind."""
    kind, content = mutation
    right = [right_of(kind), *(right_of(other) for other in KINDS if content == file_of(other))]  # joined as a whole
    tracemalloc.start()
    began = time.process_time()
    try:
        found = loaded(content)
    except (ValueError, OSError):
        found = None
    taken, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < MOST_SECONDS and peak < MOST_BYTES, (taken, peak)
    assert found is None or found in right, "another network"


# Bytes.

PLACES = st.floats(0, 1, exclude_max=True)


@st.composite
def mutated(draw):
    """(kind, bytes): flipped, cut, repeated, or joined with another file."""
    kind = draw(st.sampled_from(KINDS))
    content = bytearray(file_of(kind))
    for _ in range(draw(st.integers(1, 3))):
        at = int(draw(PLACES) * len(content)) if draw(st.booleans()) else int(draw(PLACES) * min(len(content), 900))
        match draw(st.integers(0, 5)):
            case 0 | 1:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 2:
                content[at : at + draw(st.integers(1, 8))] = draw(st.binary(max_size=8))
            case 3:
                del content[at:]
            case 4:
                content += draw(st.binary(min_size=1, max_size=9))
            case 5:
                content[at:] = file_of(draw(st.sampled_from(KINDS)))[at:]
        if not content:
            break
    return kind, bytes(content)


# The header, and the index of the arrays. Whoever knows the format can write any.

HOSTILE = (
    *(None, True, False, 0, 1, -1, 255, 256, 2**31, 2**32 - 1, 2**32, 2**39, 2**40, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 3.0, 1e300, -1e300, 1e-320, 3.4028235e38, 3.5e38, float("inf"), float("nan")),
    *("", "a", "a" * 9999, "\ud800", "../../etc/passwd", "/etc/passwd", "a/b", "a/", "/", "\0", "Dense_0/kernel/x"),
    *("float64", "int8", "bool", "complex64", "float8_e4m3fn", "object", "F64", "BF16", "F8_E4M3", "C64"),
    *("normal", "uniform", "full", "sign", "bits", "signs", "levels", "gaps", "drawn", "stored", "base", "threefry"),
    *([], {}, [0], [[]], [{}], [-1], [None], [0.5], [2**39], [2**20, 2**20], [2**31, 2**31, 2**31], [0, 2**39]),
    *([2**16, 0, 2**16], [1] * 40, [45, 10, 1], [10, 45], [450], [1000, 1000], [10**30]),
    *(["bits", 0, 1], ["bits", 1, 2**39], ["bits", 2**39, 1], ["bits", 57, 0], [["bits"], 1, 1], ["gaps", 0, 1, 0, 0]),
    *(["gaps", 0, 0, 0, 0], ["gaps", 0, 1, 0, 2**39], ["gaps", 0, 1, 2**39, 1], ["gaps", 0, 2, 0, 0]),
    *([["gaps", 0, 0, 0, 0]] * 2, [["gaps", 0, 0, 0, 0]] * 255, [["gaps", 0, 0, 0, 0]] * 256, [["gaps", 0, 1, 0, 0]]),
    *(["normal", 1.0], ["normal", 1], ["foo", 1.0], [["normal"], 1.0], [{}, 1.0], ["full", 1e39], ["sign", -1.0]),
    *(functools.reduce(lambda inside, _: [inside], range(900), []), {"a": {"a": {"a": 1}}}),
)  # fmt: skip


def places(node, at=()):
    """Of every value in JSON, the keys on the way to it."""
    if at:
        yield at
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*at, key))


def inside(node, at):
    for key in at:
        node = node[key]
    return node


class Twice(str):
    """A key that equals no other, so that a dictionary can have it twice."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


@st.composite
def hostile(draw, tree):
    """JSON in which one or two values are replaced, moved, renamed, removed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        every = list(places(tree))
        at = draw(st.sampled_from(every))
        parent, key = inside(tree, at[:-1]), at[-1]
        match draw(st.integers(0, 7)):
            case 0 | 1:
                parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case 2 | 3:
                alike = [value for value in HOSTILE if type(value) is type(parent[key])]
                parent[key] = copy.deepcopy(draw(st.sampled_from(alike)))
            case 4:
                parent[key] = copy.deepcopy(inside(tree, draw(st.sampled_from(every))))
            case 5:
                del parent[key]
            case 6 if isinstance(parent, dict):
                parent[draw(st.sampled_from(("", "a", "a/b", "\ud800", "Dense_0", "state", *parent)))] = parent.pop(key)
            case 7 if isinstance(parent, dict):
                parent[Twice(key)] = copy.deepcopy(draw(st.sampled_from((*parent.values(), *HOSTILE))))
    return tree


def unpacked(content):
    """(index, bytes of the arrays, header) of a file."""
    length = int.from_bytes(content[:8], "little")
    index, arrays = json.loads(content[8 : 8 + length]), content[8 + length :]
    begin, end = index["header"]["data_offsets"]
    return index, arrays, json.loads(zlib.decompress(arrays[begin:end]))


def packed(index, arrays):
    text = json.dumps(index).encode()
    return len(text).to_bytes(8, "little") + text + arrays


def with_header(content, text):
    """The file with another header: the arrays after it move."""
    index, arrays, _ = unpacked(content)
    begin, end = index["header"]["data_offsets"]
    header = zlib.compress(text)
    moved = len(header) - (end - begin)
    for name, entry in index.items():
        if name == "header":
            entry.update(shape=[len(header)], data_offsets=[begin, begin + len(header)])
        elif name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [place + moved for place in entry["data_offsets"]]
    return packed(index, arrays[:begin] + header + arrays[end:])


@st.composite
def headers(draw):
    """(kind, bytes) with hostile values in the header, or with its text mutated byte by byte."""
    kind = draw(st.sampled_from(KINDS))
    header = unpacked(file_of(kind))[2]
    if draw(st.integers(0, 4)):
        return kind, with_header(file_of(kind), json.dumps(draw(hostile(header))).encode())
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = int(draw(PLACES) * len(text))
        text[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from((b"", b"9", b"-", b"0", b"e9", b'"', b"[", b"\\", b"\xff"))
        )
    return kind, with_header(file_of(kind), bytes(text))


@st.composite
def indices(draw):
    """(kind, bytes) with hostile values in the index of the arrays."""
    kind = draw(st.sampled_from(KINDS))
    index, arrays, _ = unpacked(file_of(kind))
    return kind, packed(draw(hostile(index)), arrays)


def changed(kind, at, value):
    """(kind, bytes) with one other value in the header."""
    header = unpacked(file_of(kind))[2]
    inside(header, at[:-1])[at[-1]] = value
    return kind, with_header(file_of(kind), json.dumps(header).encode())


def every_fourth_value_everywhere():
    """Each value of each header is replaced by a quarter of the hostile values; the next one by another quarter."""
    for kind in KINDS:
        for number, at in enumerate(places(unpacked(file_of(kind))[2])):
            for value in HOSTILE[number % 4 :: 4]:
                yield changed(kind, at, value)


LEAF, MASK = ("leaves", "Dense_0/kernel"), ("masks", "default", "Dense_0/kernel")


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    (
        ("gain float32", (*MASK, "gain"), 1.0),  # weights and masks stay: the product would be another
        ("gain float32", (*MASK, "gain"), 1e300),
        ("kaiming_normal 0.3", (*MASK, "gain"), 2.0),
        ("kaiming_normal 0.3", (*LEAF, "draw"), ["uniform", 0.2]),
        ("kaiming_normal 0.3", (*LEAF, "draw"), [["normal"], 1.0]),
        ("kaiming_normal 0.3", (*LEAF, "draw", 1), 1e39),
        ("kaiming_normal 0.3", (*LEAF, "draw", 1), float("nan")),
        ("kaiming_normal 0.3", (*LEAF, "dtype"), "float16"),
        ("kaiming_normal 0.3", (*LEAF, "shape"), [10, 45]),
        ("kaiming_normal 0.3", (*LEAF, "fill"), 0.0),
        ("kaiming_normal 0.3", ("leaves", "Dense_0/bias", "shape"), [2**20, 2**20]),
        ("kaiming_normal 0.3", ("leaves", "Dense_0/bias", "shape"), [0, 2**39]),
        ("kaiming_normal 0.3", ("leaves", "Dense_0/bias", "fill"), -0.0),
        ("kaiming_normal 0.3", ("leaves", "Dense_0/bias", "dtype"), "int32"),
        ("kaiming_normal 0.3", ("leaves", "Dense_0"), {"shape": [], "dtype": "float32", "fill": 0.0}),
        ("kaiming_normal 0.3", ("origin", "key", 1), 8),
        ("kaiming_normal 0.3", ("state",), True),
        ("kaiming_normal 0.3", (*MASK, "planes"), [[["bits"], 90, 10]]),
        ("kaiming_normal 0.3", (*MASK, "planes"), [["gaps", 51, 1, 2**39, 1]]),
        ("kaiming_normal 0.3", (*MASK, "kind"), "signs"),
        ("odd leaves drawn", ("leaves", "kernel", "shape"), [0, 2**39]),
        ("odd leaves drawn", ("leaves", "kernel", "redraws"), ["signs", [["bits", 3, 7]]]),
        ("odd leaves drawn", ("state",), False),  # an empty state is not the same as none
        ("partition", (*MASK, "partition"), [1, 449]),
        ("partition", (*MASK, "partition"), [2**39, 2**39]),
        ("redraws 3", (*LEAF, "redraws", 0), "bits"),
        ("stored int8 of bfloat16", (*LEAF, "dtype"), "float32"),
        ("base", (*LEAF, "shape"), [10, 45]),
        ("names", ("masks", "task 1", "Dense_0/kernel"), {"kind": "bits", "planes": [["gaps", 0, 1, 0, 0]]}),
    ),
)
def test_a_value_that_would_change_the_network_is_refused(kind, at, value):
    with pytest.raises(ValueError):
        loaded(changed(kind, at, value)[1])


QUICK, LONG = 1, 8  # times the examples of each test


@pytest.mark.slow
def test_mutated_bytes_are_refused_or_do_not_matter(times=QUICK):
    fuzz(120 * times)(given(mutated())(check))()


def test_hostile_headers_are_refused_or_do_not_matter(times=QUICK):
    fuzz(240 * times)(given(headers())(check))()


def test_hostile_indices_of_the_arrays_are_refused_or_do_not_matter(times=QUICK):
    fuzz(80 * times)(given(indices())(check))()


WITHIN_LIMITS = """
import test_fuzz_artifact as fuzz

for kind in fuzz.KINDS:
    fuzz.right_of(kind)
limit = fuzz.networks.limited_memory(2**30)
limit.__enter__()
fuzz.test_mutated_bytes_are_refused_or_do_not_matter(fuzz.LONG)
fuzz.test_hostile_headers_are_refused_or_do_not_matter(fuzz.LONG)
fuzz.test_hostile_indices_of_the_arrays_are_refused_or_do_not_matter(fuzz.LONG)
print(sum(fuzz.check(mutation) is None for mutation in fuzz.every_fourth_value_everywhere()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell a process its size")
@pytest.mark.usefixtures("quick_processes")
def test_thousands_of_mutations_stay_within_a_gibibyte():
    """In a process of its own, whose memory is limited: what XLA takes counts, too."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-W", "error", "-c", WITHIN_LIMITS]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-3000:]
