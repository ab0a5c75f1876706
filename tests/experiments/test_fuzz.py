"""Selection, counts and files on whatever hypothesis thinks of: a slow oracle's answer, or an error that names it."""

import contextlib
import gzip
import io
import json
import math
import pickle
import tarfile
import tempfile
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from unittest import mock

import cifar_pickles
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.io
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import supermask_jax as sm
from experiments.data import cifar, svhn, tfds
from experiments.data.idx import FILES
from experiments.data.load import load
from experiments.run import files
from experiments.run.errors import DataError, UserError
from supermask_jax.selection import keep_highest_of_all


def fuzz(examples):
    """The same examples at each run, and no limit to the time that one takes: the first of a shape compiles."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


# Scores.

SIGN, INFINITY, SMALLEST_NORMAL = 0x80000000, 0x7F800000, 0x00800000  # bits of a float32
SPECIAL = [
    *np.array([0, 1, 3, SMALLEST_NORMAL - 1, SMALLEST_NORMAL, INFINITY - 1, INFINITY], np.uint32).view(np.float32)
]
SPECIAL = [float(value) for value in (*SPECIAL, *np.negative(SPECIAL), 1, np.nextafter(np.float32(1), np.float32(2)))]
SHAPES = ((0,), (1,), (2,), (3,), (7,), (64,), (1000,), (3, 0, 2), (5, 8), (3, 3, 2, 5))  # each one compiles


def words(size, dtype=np.uint32):
    length = size * np.dtype(dtype).itemsize
    return st.binary(min_size=length, max_size=length).map(lambda drawn: np.frombuffer(drawn, dtype))


def from_bits(bits, dtype=np.float32):
    """Floats of these bits; NaN becomes the infinity of its sign."""
    floats = bits.astype({2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]).view(dtype)
    nan = np.isnan(floats.astype(np.float32))
    signed = np.where(np.signbit(floats.astype(np.float32)), -np.inf, np.inf).astype(dtype)
    return np.where(nan, signed, floats)


@st.composite
def score_arrays(draw, shape):
    """float32 without NaN: any bits, few values, neighbours of one value, powers of two, subnormals."""
    bits = draw(words(math.prod(shape)))
    kind = draw(st.sampled_from(("any", "few", "neighbours", "powers", "subnormal", "lowest")))
    if kind == "few":
        value = st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False)
        pool = np.array(draw(st.lists(value, min_size=1, max_size=4)), np.float32)
        scores = pool[bits % len(pool)]
    elif kind == "neighbours":
        centres = st.sampled_from((0, SMALLEST_NORMAL, INFINITY)) | st.integers(0, INFINITY)
        steps = draw(centres) * draw(st.sampled_from((1, -1))) + (bits % 9).astype(np.int64) - 4  # from zero, in floats
        steps = np.clip(steps, -INFINITY, INFINITY)
        scores = from_bits(np.abs(steps) | np.where(steps < 0, SIGN, 0))
    else:
        scores = from_bits(
            bits & {"any": 0xFFFFFFFF, "powers": SIGN | INFINITY, "subnormal": 0x807FFFFF, "lowest": 0x80000003}[kind]
        )
    return scores.reshape(shape)


def masks_of(shape):
    size = math.prod(shape)
    return (words(size, np.uint8).map(lambda drawn: drawn % 2) | st.just(np.ones(size, np.uint8))).map(
        lambda drawn: drawn.reshape(shape).astype(np.float32)
    )


DENSITIES = (
    st.floats(0, 1)
    | st.fractions(0, 1)
    | st.integers(0, 10**6).map(lambda millionths: millionths / 10**6)
    | st.sampled_from((0, 1, 0.1, 0.3, 0.7))
)


def assert_equal(masks, expected):
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        np.testing.assert_array_equal(np.asarray(mask), expected[name], err_msg=name, strict=True)


keep_highest = jax.jit(lambda scores, counts, within=None: sm.keep_highest(scores, counts, within))
keep_highest_together = jax.jit(keep_highest_of_all)


@pytest.mark.slow
@fuzz(400)
@given(st.data())
def test_any_count_of_any_scores_is_kept_as_a_stable_sort_keeps_it(drawn):
    shape = drawn.draw(st.sampled_from(SHAPES))
    scores, within = drawn.draw(score_arrays(shape)), drawn.draw(masks_of(shape))
    count = drawn.draw(st.integers(0, int(within.sum())))
    masks = keep_highest({"layer": scores}, {"layer": np.int32(count)}, {"layer": within})
    assert_equal(masks, {"layer": oracles.highest(scores, count, within)})


@pytest.mark.slow
@fuzz(150)
@given(st.data())
@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16), ids=("float16", "bfloat16"))
def test_any_half_precision_scores_are_ranked_and_masks_keep_their_dtype(dtype, drawn):
    shape = drawn.draw(st.sampled_from(((7,), (3, 0, 2), (64,), (5, 8))))
    bits = drawn.draw(words(math.prod(shape), np.uint16)).astype(np.int64)
    first, few = (drawn.draw(st.integers(0, 2**16 - 1)) for _ in range(2))
    bits = {"any": bits, "few": np.where(bits % 2, first, few), "neighbours": first + bits % 9}[
        drawn.draw(st.sampled_from(("any", "few", "neighbours")))
    ]
    scores = from_bits(bits % 2**16, dtype).reshape(shape)
    count = drawn.draw(st.integers(0, scores.size))
    mask = keep_highest({"layer": scores}, {"layer": np.int32(count)})["layer"]
    assert mask.dtype == dtype
    assert_equal({"layer": np.asarray(mask, np.float32)}, {"layer": oracles.highest(scores, count)})


LAYERS = {"a": (64,), "empty": (0,), "c": (5, 8), "one": (1,), "e": (3, 3, 2, 5)}
TREES = st.fixed_dictionaries({name: score_arrays(shape) for name, shape in LAYERS.items()})
WITHIN = st.fixed_dictionaries({name: masks_of(shape) for name, shape in LAYERS.items()})
TOTAL = sum(math.prod(shape) for shape in LAYERS.values())


def highest_of_all(scores, count, within):
    """The oracle's mask of all leaves joined in the tree's order, in parts again."""
    joined = [np.concatenate([np.ravel(tree[name]) for name in sorted(scores)]) for tree in (scores, within)]
    mask, parts = oracles.highest(joined[0], count, joined[1]), {}
    for name in sorted(scores):
        parts[name], mask = mask[: scores[name].size].reshape(scores[name].shape), mask[scores[name].size :]
    return parts


@fuzz(200)
@given(TREES, st.data())
def test_layers_searched_together_get_the_masks_of_a_sort_of_each(scores, drawn):
    counts = {name: drawn.draw(st.integers(0, score.size), label=name) for name, score in scores.items()}
    masks = keep_highest({**scores, "not prunable": None}, {name: np.int32(count) for name, count in counts.items()})
    assert masks.pop("not prunable") is None
    assert_equal(masks, oracles.highest_in_each(scores, counts))


@fuzz(200)
@given(TREES, WITHIN, st.data())
def test_layers_ranked_as_one_get_the_mask_of_a_sort_of_all(scores, within, drawn):
    count = drawn.draw(st.integers(0, int(sum(mask.sum() for mask in within.values()))))
    masks = keep_highest_together(scores, np.int32(count), within)
    assert_equal(masks, highest_of_all(scores, count, within))


@pytest.mark.filterwarnings("ignore:no weight is kept")
@pytest.mark.slow
@fuzz(100)
@given(TREES, st.fixed_dictionaries(dict.fromkeys(LAYERS, DENSITIES)))
def test_densities_keep_their_exact_counts_in_each_layer(scores, densities):
    counts = {name: sm.keep_count(densities[name], score.size) for name, score in scores.items()}
    assert_equal(sm.layerwise_masks(scores, densities), oracles.highest_in_each(scores, counts))
    for name, score in scores.items():
        mask = sm.top_k_mask(jnp.asarray(score), densities[name])
        assert_equal({name: mask}, {name: oracles.highest(score, counts[name])})


@pytest.mark.filterwarnings("ignore:no weight is kept")
@fuzz(100)
@given(TREES, WITHIN, DENSITIES)
def test_a_density_of_all_layers_keeps_its_exact_count_or_more_than_there_is_raises(scores, within, density):
    count, whole = sm.keep_count(density, TOTAL), {name: np.ones(shape) for name, shape in LAYERS.items()}
    assert_equal(sm.global_masks(scores, density), highest_of_all(scores, count, whole))
    if count > (room := int(sum(mask.sum() for mask in within.values()))):
        with pytest.raises(ValueError, match=f"cannot keep {count} of the {room} weights"):
            sm.global_masks(scores, density, within)
    else:
        assert_equal(sm.global_masks(scores, density, within), highest_of_all(scores, count, within))


@fuzz(100)
@given(TREES, st.data())
def test_any_nan_anywhere_raises_outside_jit_whatever_the_density(scores, drawn):
    name = drawn.draw(st.sampled_from([name for name, score in scores.items() if score.size]))
    bits = drawn.draw(st.integers(INFINITY + 1, SIGN - 1)) | drawn.draw(st.sampled_from((0, SIGN)))
    score = scores[name].copy()
    score.view(np.uint32).ravel()[drawn.draw(st.integers(0, score.size - 1))] = bits
    scores = {**scores, name: score}
    density = drawn.draw(DENSITIES)
    counts = {layer: sm.keep_count(density, score.size) for layer, score in scores.items()}
    for select in (
        lambda: sm.keep_highest(scores, counts),
        lambda: sm.layerwise_masks(scores, density),
        lambda: sm.global_masks(scores, density),
    ):
        with pytest.raises(ValueError, match=rf"{name!r} hold NaN"):
            select()
    with pytest.raises(ValueError, match="hold NaN"):
        sm.top_k_mask(jnp.asarray(scores[name]), density)


HUGE = 20_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "shape", "count"),
    [
        # In one axis and in two: heavy ties, with an odd number above the cut, to which no float32 can count; and
        # infinities on both sides, tied as well.
        ((-1.0, *(0.0, -0.0, 1.0) * 5), (HUGE,), 19_234_567),
        ((-np.inf, -1e-45, 2.0, np.inf), (4000, HUGE // 4000), 4_999_999),
    ],
    ids=("ties", "infinities"),
)
def test_twenty_million_tied_scores_are_cut_at_exactly_the_count(values, shape, count):
    scores = np.array(values, np.float32)[np.random.default_rng(1).integers(0, len(values), HUGE, np.uint8)]
    mask = np.asarray(keep_highest({"": scores.reshape(shape)}, {"": np.int32(count)})[""]).ravel()
    threshold = np.partition(scores, HUGE - count)[HUGE - count]
    expected = scores > threshold
    tied = np.flatnonzero(scores == threshold)
    above = np.count_nonzero(expected)
    missing = count - above
    assert 0 < missing < len(tied) and (above < 2**24 or above % 2)  # so this is a test of ties, and of counts
    expected[tied[len(tied) - missing :]] = True
    np.testing.assert_array_equal(mask, expected.astype(np.float32))


# Counts.


@fuzz(500)
@given(st.data())
def test_a_density_written_as_a_decimal_keeps_the_ceiling_of_its_exact_product(drawn):
    places = drawn.draw(st.integers(0, 15))
    digits = drawn.draw(st.integers(0, 10**places))
    n = drawn.draw(st.integers(0, 10**12) | st.integers(0, 100))
    expected = -(-Fraction(digits, 10**places) * n // 1)
    assert expected == -(-digits * n // 10**places)
    written = f"{digits // 10**places}.{digits % 10**places:0{places}d}" if places else str(digits)
    forms = [written, float(written), np.float64(written), Fraction(written), f"{digits}e-{places}"]
    forms += [np.float32(written)] if places <= 6 else []  # what a float32 tells apart
    for density in forms:
        assert sm.keep_count(density, n) == expected, density
    assert sm.keep_count(float(written), np.int64(n)) == expected


@fuzz(200)
@given(st.floats() | st.fractions() | st.text(max_size=5), st.integers(0, 10**9))
def test_keep_count_takes_what_lies_in_0_to_1_and_nothing_else(density, n):
    try:
        exact = Fraction(str(density))
    except (ValueError, ZeroDivisionError):
        exact = None
    if exact is not None and 0 <= exact <= 1:
        assert 0 <= sm.keep_count(density, n) - exact * n < 1
    else:
        with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\]"):
            sm.keep_count(density, n)


# Files.


def places_in(content):
    """Where to damage: anywhere, and more often near either end, where headers and checksums are."""
    size = len(content)
    ends = st.integers(0, min(size, 40)) | st.integers(max(size - 40, 0), size)
    return ends | st.integers(max(size - 300, 0), size) | st.integers(0, size)


@st.composite
def damaged(draw, content, most=3):
    """`content` after up to `most` changes."""
    for _ in range(draw(st.integers(0, most))):
        at = draw(places_in(content))
        match draw(st.sampled_from(("flip", "number", "drop", "insert", "append", "cut", "repeat", "empty"))):
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
            case "number":  # what a header promises
                number = draw(st.sampled_from((0, 1, 2, 3, 4, 27, 28, 29, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
                at, order = at // 4 * 4, draw(st.sampled_from(("big", "big", "little")))
                content = content[:at] + number.to_bytes(4, order) + content[at + 4 :]
            case "drop":
                content = content[:at] + content[at + draw(st.integers(1, 5) | st.sampled_from((784, 3073))) :]
            case "insert":
                content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
            case "append":
                content += draw(st.binary(max_size=8) | st.integers(1, 9).map(bytes))
            case "cut":
                content = content[:at]
            case "repeat":
                content += content[at : at + draw(st.sampled_from((1, 784, 3073, len(content))))]
            case "empty":
                content = b""
    return content


@contextlib.contextmanager
def folder_of(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def gunzipped(stored):
    """What is in a gzip file by RFC 1952, or None where it is not whole."""
    content = b""
    while stored:
        if len(stored) < 10 or stored[:3] != b"\x1f\x8b\x08":
            return None
        flags, at = stored[3], 10
        if flags & 4:  # extra
            at += 2 + int.from_bytes(stored[at : at + 2], "little")
        for flag in (8, 16):  # name, comment
            if flags & flag:
                end = stored.find(b"\0", at)
                at = end + 1 if end >= 0 else len(stored)
        at += 2 if flags & 2 else 0  # a checksum of the header, which nobody compares
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            part = inflate.decompress(stored[at:])
        except zlib.error:
            return None
        end = inflate.unused_data
        if not inflate.eof or len(end) < 8:
            return None
        if zlib.crc32(part).to_bytes(4, "little") + len(part).to_bytes(4, "little") != end[:8]:
            return None
        content, stored = content + part, end[8:].lstrip(b"\0")  # padding is allowed
    return content


def parsed_idx(stored, axes):
    """(sizes, bytes) of what an IDX file says, or None where it is not whole."""
    content = gunzipped(stored) if stored[:2] == b"\x1f\x8b" else stored
    start = 4 + 4 * axes
    if content is None or len(content) < start or content[:4] != bytes([0, 0, 8, axes]):
        return None
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    return (sizes, content[start:]) if len(content) - start == math.prod(sizes) else None


def parsed_split(images, labels):
    """(images, labels), each sizes and bytes, of two IDX files that fit each other and MNIST, or None."""
    images, labels = parsed_idx(images, 3), parsed_idx(labels, 1)
    if images is None or labels is None or not images[0][0] or images[0][1:] != [28, 28]:
        return None
    return (images, labels) if images[0][:1] == labels[0] and max(labels[1]) <= 9 else None


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files():
    """{official name: bytes} of three training and two test images of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    arrays = (noise[:3], np.array([4, 0, 9], np.uint8), noise[3:], np.array([1, 2], np.uint8))
    return {name: idx(array) for name, array in zip(FILES, arrays, strict=True)}


IDX_FILES = idx_files()


@st.composite
def damaged_idx_files(draw):
    """The four files as stored: compressed or not, damaged before or after that, some in others' places."""
    names = list(IDX_FILES)
    if draw(st.integers(0, 4)) == 0:
        names = draw(st.permutations(names))
    hurt = draw(st.sets(st.sampled_from(names), max_size=2))
    files = []
    for name in names:
        content, how = IDX_FILES[name], draw(st.sampled_from(("before", "after", "label"))) if name in hurt else None
        if how == "label" and "labels" in name:
            content = content[:-1] + bytes([draw(st.sampled_from((0, 9, 10, 255)))])
        elif how == "before":
            content = draw(damaged(content))
        if draw(st.booleans()):
            content = gzip.compress(content, mtime=0)
        files.append(draw(damaged(content)) if how == "after" else content)
    return files


@fuzz(500)
@given(damaged_idx_files(), st.lists(st.booleans(), min_size=4, max_size=4))
@example([content[:7] for content in IDX_FILES.values()], [False] * 4)  # cut within the header
def test_idx_files_give_exactly_what_they_say_or_a_data_error(stored, named_gz):
    files = {name + ".gz" * gz: content for name, gz, content in zip(IDX_FILES, named_gz, stored, strict=True)}
    expected = [parsed_split(*stored[:2]), parsed_split(*stored[2:])]
    with folder_of(files) as folder:
        if None in expected or len(set(expected[0][0][1])) == 1:
            with pytest.raises(DataError) as caught:
                load("idx", folder)
            assert str(folder) in str(caught.value)
            return
        got = load("idx", folder)
    for images, labels, said in (
        (got.train.images, got.train.labels, expected[0]),
        (got.test.images, got.test.labels, expected[1]),
    ):
        assert list(images.shape) == [*said[0][0], 1] and list(labels.shape) == said[1][0]
        assert images.tobytes() == said[0][1] and labels.tolist() == list(said[1][1])


@pytest.mark.parametrize("compressed", (False, True))
@pytest.mark.parametrize("file", IDX_FILES)
def test_an_idx_header_that_promises_four_billion_is_refused_before_anything_is_allocated(file, compressed):
    for axis in range(IDX_FILES[file][3]):
        at = 4 + 4 * axis
        content = IDX_FILES[file][:at] + b"\xff" * 4 + IDX_FILES[file][at + 4 :]
        with folder_of({**IDX_FILES, file: gzip.compress(content) if compressed else content}) as folder:
            with contextlib.suppress(DataError):
                load("idx", folder)  # what is imported on the way is none of the reader's
            tracemalloc.start()
            try:
                with pytest.raises(DataError, match=rf"{file} is truncated: .*4294967295"):
                    load("idx", folder)
                assert tracemalloc.get_traced_memory()[1] < 10**6
            finally:
                tracemalloc.stop()


RECORD, RECORDS = 3073, 10


def cifar_files():
    """{official name: bytes} of ten images of noise in each file, one of each class."""
    rng, files = np.random.default_rng(0), {}
    for name in cifar.FILES:
        records = rng.integers(0, 256, (RECORDS, RECORD), np.uint8)
        records[:, 0] = rng.permutation(10)
        files[name] = records.tobytes()
    return files


def parsed_cifar(contents):
    """(images, labels) of what some files say, or None where one is not whole or the classes are not balanced."""
    if any(len(content) != RECORDS * RECORD for content in contents):
        return None
    records = [content[at : at + RECORD] for content in contents for at in range(0, len(content), RECORD)]
    labels = [record[0] for record in records]
    if [labels.count(label) for label in range(10)] != [len(labels) // 10] * 10:
        return None
    return [[record[1 + 1024 * c : 1025 + 1024 * c] for c in range(3)] for record in records], labels


def assert_holds(images, labels, said):
    assert images.shape == (len(said[1]), 32, 32, 3) and labels.tolist() == said[1]
    assert [[image[..., c].tobytes() for c in range(3)] for image in images] == said[0]


CIFAR_FILES = cifar_files()


def in_tar(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


CIFAR_ARCHIVE = in_tar(CIFAR_FILES)


@st.composite
def hostile(draw, content):
    """A pickle in which a call of os.getpid stands somewhere, or in which it has the place of a name of NumPy's."""
    if draw(st.booleans()):
        name = draw(
            st.sampled_from((b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"))
        )
        return content.replace(name, b"cos\ngetpid\n")
    at = draw(places_in(content))
    return (
        content[:at] + draw(st.sampled_from((b"cos\ngetpid\n)R", b"(ios\ngetpid\n", b"(cos\ngetpid\no"))) + content[at:]
    )


@st.composite
def damaged_cifar_files(draw):
    names = list(CIFAR_FILES)
    if draw(st.integers(0, 4)) == 0:
        names = [draw(st.sampled_from(names)) for _ in names]
    hurt = draw(st.sampled_from(names))
    files = []
    for name in names:
        content = draw(damaged(CIFAR_FILES[name], most=2)) if name == hurt else CIFAR_FILES[name]
        if name == hurt and content and draw(st.booleans()):  # a label, or a byte close to one
            at = draw(st.integers(0, RECORDS)) * RECORD + draw(st.integers(0, 1))
            content = content[:at] + bytes([draw(st.integers(0, 12))]) + content[at + 1 :]
        files.append(content)
    return files


@fuzz(200)
@given(damaged_cifar_files())
def test_cifar_files_give_exactly_what_they_say_or_a_data_error(contents):
    expected = parsed_cifar(contents[:5]), parsed_cifar(contents[5:])
    files = dict(zip(CIFAR_FILES, contents, strict=True))
    with folder_of(files) as folder, mock.patch.object(cifar, "RECORDS", RECORDS):
        if None in expected:
            with pytest.raises(DataError) as caught:
                load("cifar10", folder)
            assert str(folder) in str(caught.value)
            return
        got = load("cifar10", folder)
    assert_holds(got.train.images, got.train.labels, expected[0])
    assert_holds(got.test.images, got.test.labels, expected[1])


@fuzz(150)
@given(damaged(CIFAR_ARCHIVE))
def test_a_damaged_archive_of_cifar_gives_exactly_the_images_put_in_or_a_data_error(stored):
    contents = list(CIFAR_FILES.values())
    with folder_of({"cifar-10-binary.tar.gz": stored}) as folder, mock.patch.object(cifar, "RECORDS", RECORDS):
        try:
            got = load("cifar10", folder)
        except DataError as error:
            assert stored != CIFAR_ARCHIVE and str(folder) in str(error)
            return
    assert_holds(got.train.images, got.train.labels, parsed_cifar(contents[:5]))
    assert_holds(got.test.images, got.test.labels, parsed_cifar(contents[5:]))


PICKLES = cifar_pickles.pickled(CIFAR_FILES)
BY_PYTHON_3 = cifar_pickles.pickled(CIFAR_FILES, dumps=pickle.dumps)


@fuzz(200)
@given(
    st.sampled_from(sorted(PICKLES)).flatmap(
        lambda name: st.tuples(
            st.just(name), damaged(PICKLES[name]) | damaged(BY_PYTHON_3[name]) | hostile(PICKLES[name])
        )
    )
)
def test_a_damaged_python_version_of_cifar_gives_what_it_says_or_a_data_error_and_runs_nothing(hurt):
    name, content = hurt
    at = 10 * list(PICKLES).index(name)
    run = mock.patch("os.getpid", side_effect=AssertionError("it was run"))
    with folder_of(PICKLES | {name: content}) as folder, mock.patch.object(cifar, "RECORDS", RECORDS), run as called:
        try:
            got = load("cifar10", folder)
        except DataError as error:
            assert str(folder) in str(error)
            return
        finally:
            assert not called.called
    images = np.concatenate([got.train.images, got.test.images])
    labels = np.concatenate([got.train.labels, got.test.labels])
    planes = images.transpose(0, 3, 1, 2).reshape(60, -1)
    assert any(planes[at : at + 10].tobytes(order) in content for order in "CF"), "the pixels are those in the file"
    assert sorted(labels[at : at + 10]) == list(range(10))
    records = np.frombuffer(b"".join(CIFAR_FILES.values()), np.uint8).reshape(60, RECORD)
    others = np.r_[:at, at + 10 : 60]
    np.testing.assert_array_equal(planes[others], records[others, 1:])
    np.testing.assert_array_equal(labels[others], records[others, 0])


def svhn_file(count, compressed):
    rng, stream = np.random.default_rng(count), io.BytesIO()
    images, labels = rng.integers(0, 256, (32, 32, 3, count), np.uint8), rng.integers(1, 11, (count, 1), np.uint8)
    scipy.io.savemat(stream, {"X": images, "y": labels}, do_compression=compressed)
    return stream.getvalue()


SVHN_SIZES = (3, 2)
SVHN_FILES = {compressed: [svhn_file(count, compressed) for count in SVHN_SIZES] for compressed in (False, True)}


@fuzz(200)
@given(st.booleans().flatmap(lambda compressed: st.tuples(st.just(compressed), damaged(SVHN_FILES[compressed][1]))))
def test_a_damaged_file_of_svhn_gives_images_of_its_shape_and_classes_or_a_data_error(hurt):
    compressed, content = hurt
    stored = dict(zip(svhn.FILES, (SVHN_FILES[compressed][0], content), strict=True))
    with folder_of(stored) as folder, mock.patch.object(svhn, "SIZES", SVHN_SIZES):
        try:
            got = load("svhn", folder)
        except DataError as error:
            assert svhn.FILES[1] in str(error) and "\n" not in str(error) and content != SVHN_FILES[compressed][1]
            return
    assert got.test.images.shape == (2, 32, 32, 3) and got.test.images.dtype == np.uint8
    assert all(0 <= label <= 9 for label in got.test.labels)
    assert compressed or got.test.images.transpose(1, 2, 3, 0).tobytes("F") in content


ARRAYS = {  # one of them longer than the first piece that is read of it
    "layer/kernel": np.arange(2400, dtype=np.float32).reshape(60, 40),
    "mask": np.array([True, False, True]),
    "step": np.array(7),
}


def stored_arrays():
    with folder_of({}) as folder:
        files.write_arrays(folder / "a.npz", ARRAYS)
        return (folder / "a.npz").read_bytes()


def assert_same_arrays(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, strict=True)


STORED_ARRAYS = stored_arrays()
SHORTENED = STORED_ARRAYS.replace(b"(60, 40)", b"(20, 40)")  # a header that promises less, by one bit
LISTED = STORED_ARRAYS.index(b"PK\1\2")  # where the list of arrays begins


def with_byte(content, at, byte):
    assert content[at] != byte
    return content[:at] + bytes([byte]) + content[at + 1 :]


@fuzz(500)
@given(damaged(STORED_ARRAYS))
@example(b"")
@example(SHORTENED)
@example(with_byte(STORED_ARRAYS, LISTED + 32, 128))  # a comment so long that it holds the other entries of the list
@example(with_byte(STORED_ARRAYS, LISTED + 10, 1))  # a compression that nobody knows
@example(with_byte(STORED_ARRAYS, LISTED + 8, 1))  # encrypted
@example(with_byte(STORED_ARRAYS, STORED_ARRAYS.index(b"{'descr"), ord("[")))
def test_arrays_of_a_run_come_back_exactly_or_as_a_user_error(stored):
    with folder_of({"a.npz": stored}) as folder:
        try:
            got = files.read_arrays(folder / "a.npz")
        except UserError as error:
            assert stored != STORED_ARRAYS and str(folder / "a.npz") in str(error)
            return
    assert_same_arrays(got, ARRAYS)


FINGERPRINT = np.array("of what the cache was made from")


def stored_cache():
    with folder_of({}) as folder:
        tfds.write_cache(folder / "c.npz", FINGERPRINT, CACHED)
        return (folder / "c.npz").read_bytes()


CACHED = tuple(np.arange(4800).astype(dtype).reshape(60, 80) for dtype in (np.uint8, np.int32, np.uint8, np.int32))
STORED_CACHE = stored_cache()


@fuzz(300)
@given(damaged(STORED_CACHE))
@example(b"")
@example(STORED_CACHE.replace(b"(60, 80)", b"(20, 80)"))  # as above: it would be fewer images
def test_a_damaged_cache_of_images_gives_exactly_what_was_written_or_nothing(stored):
    with folder_of({"c.npz": stored}) as folder:
        got = tfds.read_cache(folder / "c.npz", FINGERPRINT)
    if got is None:
        assert stored != STORED_CACHE
    else:
        assert_same_arrays(dict(enumerate(got)), dict(enumerate(CACHED)))


RECORD_OF_A_RUN = {"method": "edge-popup", "density": 0.3, "seed": 0, "layers": {"Dense_0/kernel": 1e-05}, "sizes": [1]}
STORED_JSON = (json.dumps(RECORD_OF_A_RUN, indent=2) + "\n").encode()


@fuzz(500)
@given(damaged(STORED_JSON))
@example(STORED_JSON)
@example(b"[]")
@example(b"{}")
@example(b'{"a": "\xff"}')
@example(b'{"a": ' + b"9" * 5000 + b"}")
def test_a_json_file_gives_the_object_that_is_in_it_or_a_user_error(stored):
    """JSON has no checksum: a changed digit is another number. But what is cut short is never taken for whole."""
    try:
        expected = json.loads(stored.decode())
    except ValueError:
        expected = None
    with folder_of({"a.json": stored}) as folder:
        if isinstance(expected, dict):
            assert repr(files.read_json(folder / "a.json")) == repr(expected)  # by repr: NaN is no NaN's equal
        else:
            with pytest.raises(UserError, match=r"a\.json is damaged"):
                files.read_json(folder / "a.json")
    if STORED_JSON.startswith(stored.rstrip()) and len(stored) < len(STORED_JSON) - 1:
        assert expected is None
