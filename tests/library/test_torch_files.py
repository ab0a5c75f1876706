"""Files of `torch.save` without PyTorch: the same arrays, or one clear error, and nothing in them is run."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_zip import Parameter, Raw, View, archive, saved

from supermask_jax import torch_files

RNG = np.random.default_rng(0)
DTYPES = [*torch_zip.STORAGES]


def read(tmp_path, content):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    return torch_files.read(path)


def refused(tmp_path, content, match):
    with pytest.raises(ValueError, match=match) as raised:
        read(tmp_path, content)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / "net.pth")) and "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_type_are_read_as_they_are(tmp_path, dtype):
    array = RNG.integers(0, 2, (3, 4)).astype(jnp.dtype(dtype))
    found = read(tmp_path, saved({"a": array}))
    assert found.keys() == {"a"} and found["a"].dtype == array.dtype
    np.testing.assert_array_equal(found["a"], array)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1


def test_views_of_shared_storages_are_read_by_offset_and_strides(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    views = {
        "whole": View("s", (2, 3, 4), (12, 4, 1)),
        "transposed": View("s", (4, 6), (1, 4)),
        "part": View("s", (3,), (2,), 7),
        "last": View("s", (), (), 23),
        "empty": View("s", (0, 5), (5, 1), 24),
        "repeated": View("s", (2, 3), (0, 1), 1),
    }
    found = read(tmp_path, saved({**views, "other": np.ones(2, np.float32)}, {"s": numbers}))
    expected = {
        "whole": numbers.reshape(2, 3, 4),
        "transposed": numbers.reshape(6, 4).T,
        "part": numbers[[7, 9, 11]],
        "last": np.float32(23),
        "empty": np.zeros((0, 5), np.float32),
        "repeated": numbers[[[1, 2, 3]] * 2],
        "other": np.ones(2, np.float32),
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == np.shape(array), name
        np.testing.assert_array_equal(found[name], array)
    assert np.shares_memory(found["whole"], found["part"])


ARRAYS = {"a": RNG.normal(size=(2, 3)).astype(np.float32), "b": np.arange(3)}
TRAINING = {"epoch": 3, "best": 71.5, "arch": "resnet", "optimizer": {"state": {0: None}, "groups": [{"on": True}]}}


@pytest.mark.parametrize(
    "value",
    [
        ARRAYS,
        {"state_dict": ARRAYS, **TRAINING},
        {**TRAINING, "model": ARRAYS},
        {"a": Parameter(ARRAYS["a"]), "b": ARRAYS["b"]},
    ],
    ids=("bare", "under state_dict", "under model", "with a parameter"),
)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_dictionary_of_tensors_is_found_where_training_programs_put_it(tmp_path, value, ordered):
    found = read(tmp_path, saved(value, ordered=ordered))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


# Errors.


def program(value):
    return zipfile.ZipFile(io.BytesIO(saved(value))).read("net/data.pkl")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_that_names_anything_but_tensors_is_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    content = archive(pickle.dumps({"state_dict": Evil(marker)}, protocol), {})
    message = refused(tmp_path, content, "names '(posix|nt).system', and only tensors are read")
    assert "load it in PyTorch, and save the tensors alone" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker), protocol))
    assert marker.exists(), "the pickle would have run"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"cbuiltins\neval\n", "builtins.eval"),
        (b"ctorch\nload\n", "torch.load"),
        (b"cnumpy.core.multiarray\nscalar\n", "numpy.core.multiarray.scalar"),
        (b"cargparse\nNamespace\n", "argparse.Namespace"),
        (b"ccollections\nOrderedDict.fromkeys\n", "collections.OrderedDict.fromkeys"),
        (b"\x8c\x08builtins\x8c\x04exec\x93", "builtins.exec"),
    ],
)
def test_the_refused_name_is_shown(tmp_path, name, shown):
    refused(tmp_path, saved({"state_dict": ARRAYS, "args": Raw(name)}), f"names '{shown}'")


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (b"(ios\nsystem\n", "the instruction INST"),
        (b"N\x81", "the instruction NEWOBJ"),
        (b"\x8f", "the instruction EMPTY_SET"),
        (b"I1\n", "the instruction INT"),
        (b"\x82\x01", "the instruction EXT1"),
        (b"R", "takes a mark for a value"),
        (b"e", "fills what is no list"),
        (b"h\x07", "is truncated or damaged"),
        (b"ctorch\nFloatStorage\n)R", "calls a name with arguments"),
        (b"NNb", "fills what is no dict"),
        (b"NQ", "refers to what is no storage"),
        (b"K\x01K\x02\x93", "names what is no text"),
    ],
)
def test_other_instructions_are_refused(tmp_path, instructions, match):
    refused(tmp_path, saved({"a": Raw(instructions)}), match)


def test_keys_that_would_take_forever_to_hash_are_refused(tmp_path):
    doubled = b")" + b"q\x00h\x00\x86" * 20  # each a pair of the one before
    refused(tmp_path, saved({"a": {Raw(doubled): 1}}), "a key that is a tuple")


NUMBERS = np.zeros(12, np.float32)


@pytest.mark.parametrize(
    "view",
    [
        View("s", (13,), (1,)),
        View("s", (12,), (1,), 1),
        View("s", (3, 4), (5, 1)),
        View("s", (2,), (2**40,)),
        View("s", (2**20, 2**20), (0, 0)),
        View("s", (13,), (0,)),
        View("s", (2**47, 2**47, 0), (1, 1, 1), 13),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused_without_memory(tmp_path, view):
    content = saved({"a": view}, {"s": NUMBERS})
    tracemalloc.start()
    refused(tmp_path, content, "'a' has the shape .* which reach beyond the 12 numbers of its storage")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "view",
    [
        View("s", (-1,), (1,)),
        View("s", (2,), (-1,), 5),
        View("s", (2,), (1,), -1),
        View("s", (2**50,), (0,)),
        View("s", (2, 2), (1,)),
        View("s", (1.0,), (1,)),
        View("s", (True,), (1,)),
        View("s", [2], [1]),
        View("s", (1,) * 33, (1,) * 33),
    ],
)
def test_shapes_and_strides_are_whole_numbers(tmp_path, view):
    refused(tmp_path, saved({"a": view}, {"s": NUMBERS}), "a tensor('s| has no) shape")


def claiming(content, size, *claims):
    """The file with other sizes, in the archive and unpacked, of a record in its list."""
    at = content.rindex(struct.pack("<II", size, size))
    return content[:at] + struct.pack("<II", *claims) + content[at + 8 :]


def renamed(content, old, new):
    assert content.count(old) and len(old) == len(new)
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "format before 1.6.*save it again with torch.save"),
        (pickle.dumps({"a": 1}), "format before 1.6, or another pickle"),
        (b"", "not a zip archive"),
        (b"<html>", "not a zip archive; give a .pth or a .safetensors file"),
        (saved(ARRAYS, kind=zipfile.ZIP_DEFLATED), "is a compressed archive"),
        (saved(ARRAYS, byteorder=b"big"), "big-endian machine"),
        (saved(ARRAYS, root="net/inner"), "not of torch.save: it has no data.pkl"),
        (archive(program({"a": NUMBERS}), {"0": b"1234"}), "has 4 bytes for 12 float32"),
        (archive(program({"a": NUMBERS}), {"0": bytes(52)}), "has 52 bytes for 12 float32"),
        (claiming(saved({"a": NUMBERS}), 48, 2**31, 2**31), "list of records does not fit its size"),
        (claiming(saved({"a": NUMBERS}), 48, 2**31, 48), "two sizes for one record"),
        (archive(program({"a": NUMBERS}), {}), "no item named 'net/data/0'"),
        (archive(bytes(2**22 + 1), {}), "has a pickle of 4194305 bytes, more than 4194304"),
        (archive(program({"a": NUMBERS})[:-1], {}), "truncated or damaged"),
        (archive(program({"a": NUMBERS}) + b".", {}), "does not end where it should"),
        (saved(3), "holds one int, and no dictionary of tensors"),
        (saved({}), "holds an empty dictionary"),
        (saved(TRAINING), "has at 'epoch' no tensor but a int"),
        (saved({3: NUMBERS}), "a key that is a number"),
        (saved({"a": [NUMBERS]}), "has at 'a' no tensor but a list"),
        (renamed(saved(ARRAYS), b"net/data/1", b"net/data/0"), "list of records does not fit"),
        (saved(ARRAYS).replace(ARRAYS["a"].tobytes(), bytes(24)), "Bad CRC-32"),
    ],
)
def test_every_other_file_is_one_clear_error(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_files.read(tmp_path / "none.pth")


# Mutations.

SOUND = saved({"state_dict": {**ARRAYS, "t": View("s", (2, 2), (1, 2))}, **TRAINING}, {"s": NUMBERS}, ordered=True)
PROGRAM = zipfile.ZipFile(io.BytesIO(SOUND)).read("net/data.pkl")
STORED = {"s": NUMBERS.tobytes(), "1": ARRAYS["a"].tobytes(), "2": ARRAYS["b"].tobytes()}
FUZZ = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mutated(draw, content):
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0 | 1:
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 2:
                content[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
            case 3:
                del content[at:]
            case 4:
                other = draw(st.integers(0, max(len(content) - 1, 0)))
                content[at:at] = content[other : other + draw(st.integers(1, 40))]
    return bytes(content)


def outcome(tmp_path, content):
    tracemalloc.start()
    try:
        return read(tmp_path, content)
    except ValueError as error:
        assert str(error).startswith(str(tmp_path / "net.pth"))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22
    return None


def test_what_is_mutated_is_read_as_it_stands(tmp_path):
    found = outcome(tmp_path, archive(PROGRAM, STORED))
    np.testing.assert_array_equal(found["a"], ARRAYS["a"])


@FUZZ
@given(content=mutated(SOUND))
def test_a_mutated_file_is_an_error_or_holds_the_same_arrays(tmp_path, content):
    found = outcome(tmp_path, content)
    if found is not None:
        assert found.keys() == {*ARRAYS, "t"}
        for name, array in {**ARRAYS, "t": np.zeros((2, 2), np.float32)}.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


@FUZZ
@given(program=mutated(PROGRAM))
def test_a_mutated_pickle_in_a_sound_archive_is_an_error_or_holds_arrays_of_the_file(tmp_path, program):
    found = outcome(tmp_path, archive(program, STORED))
    assert found is None or sum(array.nbytes for array in found.values()) <= len(found) * 48


def test_a_file_that_is_cut_anywhere_is_an_error(tmp_path):
    for length in range(0, len(SOUND), 7):
        assert outcome(tmp_path, SOUND[:length]) is None


# What PyTorch itself writes.


def test_files_of_pytorch_are_read_like_pytorch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.randn(4, 6)
    tensors = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[1:3, ::2],
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "number": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / "net.pth"
    for value in (tensors, {"state_dict": tensors, "shape": whole.shape}, network.state_dict()):
        torch.save(value, path)
        expected, found = value.get("state_dict", value), torch_files.read(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[name].astype(np.float64), tensor.detach().double().numpy())
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"format before 1\.6"):
        torch_files.read(path)
    torch.save(network, path)
    with pytest.raises(ValueError, match="names 'torch"):
        torch_files.read(path)
