"""docs/format.md and its two readers: they know what the library writes, field by field and bit by bit."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import supermask_jax as sm
from supermask_jax import codes, container, contents, draws, header
from supermask_jax.artifact import Drawn
from supermask_jax.origins import arrays_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text()
NUMPY, TORCH = DOCS / "read_supermask.py", DOCS / "read_supermask_torch.py"

# Reads every file of a directory, and prints what each holds: dtype, shape and hash of every array.
READ = """
import hashlib, importlib.abc, importlib.util, json, sys
from pathlib import Path

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[3].split(","):
            raise ModuleNotFoundError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
spec = importlib.util.spec_from_file_location("reader", sys.argv[1])
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)

def told(array):
    if hasattr(array, "tobytes"):
        return [array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    array = array.contiguous()
    content = reader.ctypes.string_at(array.data_ptr(), array.nbytes) if array.nbytes else b""
    return [str(array.dtype)[6:], list(array.shape), hashlib.sha256(content).hexdigest()]

def all_told(arrays):
    return {path: told(array) for path, array in arrays.items()}

found = {}
for path in sorted(Path(sys.argv[2]).glob("*.safetensors")):
    # These masks are on the weights of another file.
    base = reader.read(path.with_name("dense.safetensors"))[0] if path.stem == "base" else None
    weights, masks, state, about = reader.read(path, base)
    masks = {name: all_told(leaves) for name, leaves in masks.items()}
    found[path.stem] = [all_told(weights), masks, None if state is None else all_told(state), about]
print(json.dumps(found))
"""
BLOCKED = "jax,jaxlib,flax,safetensors,supermask_jax,ml_dtypes,optax"


def read(reader, folder):
    """What a reader finds in a directory, in a process of its own that cannot import JAX or the library."""
    command = [sys.executable, "-I", "-W", "error", "-c", READ, str(reader), str(folder), BLOCKED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the directory of a file of every kind, {kind: the network that the library loads of it})."""
    folder, loaded = tmp_path_factory.mktemp("networks"), {}
    for kind in networks.KINDS:
        network = networks.network(kind)
        network.save(folder / f"{kind}.safetensors")
        loaded[kind] = sm.load_subnetwork(folder / f"{kind}.safetensors", base=network.base)
    return folder, loaded


def told(tree, widen):
    def one(array):
        if widen and array.dtype == jnp.bfloat16:  # NumPy has no such numbers
            array = array.astype(np.float32)
        return [array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]

    return {path: one(array) for path, array in arrays_of(tree).items()}


def expected(loaded, kind, widen):
    weights, masks, state, about = loaded[kind]
    masks = masks if kind in ("names", "two stored") else {"default": masks}
    masks = {name: told(tree, widen) for name, tree in masks.items()}
    return [told(weights, widen), masks, None if state is None else told(state, widen), about]


def test_the_numpy_reader_gives_the_same_bits_without_jax(written):
    folder, loaded = written
    found = read(NUMPY, folder)
    assert found.keys() == loaded.keys()
    for kind in loaded:
        assert found[kind] == expected(loaded, kind, widen=True), kind


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_torch_reader_gives_the_same_bits_without_jax(written):
    folder, loaded = written
    found = read(TORCH, folder)
    assert found.keys() == loaded.keys()
    for kind in loaded:
        assert found[kind] == expected(loaded, kind, widen=False), kind


@pytest.mark.parametrize("reader", (NUMPY, TORCH))
def test_a_reader_is_short_and_imports_little(reader):
    text = reader.read_text()
    assert len(text.splitlines()) < 150
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names <= {"numpy" if reader == NUMPY else "torch"}


def test_a_reader_refuses_other_files_and_other_networks(tmp_path):
    spec = importlib.util.spec_from_file_location("reader", NUMPY)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    path = tmp_path / "net.safetensors"
    weights = networks.drawn("signed_constant")
    networks.Network(sm.Subnet(weights, networks.masks(weights)), Drawn("signed_constant", 7)).save(path)
    whole = path.read_bytes()
    reader.read(path)
    with pytest.raises(ValueError, match="claims more than 100 weights"):
        reader.read(path, largest=100)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(ValueError, match="no supermask network of version 1"):
        reader.read(path)
    path.write_bytes(whole)
    told, arrays, _ = container.read(path)
    told["leaves"]["Conv_0/kernel"]["draw"][1] *= 2
    container.write(path, arrays, told)
    with pytest.raises(ValueError, match="does not hold the network that was saved"):
        reader.read(path)


# The page.


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_column(title):
    return re.findall(r"^\| `([^`]+)` ", section(title), re.MULTILINE)


def fields(told):
    """The fields of a header, as the page names them."""
    yield from (f"origin.{name}" for name in told["origin"])
    yield from (f"leaves.PATH.{name}" for entry in told["leaves"].values() for name in entry)
    for masks in told["masks"].values():
        yield from (f"masks.NAME.PATH.{name}" for entry in masks.values() for name in entry)
    yield from ("sha256.masks.NAME" if name == "masks" else f"sha256.{name}" for name in told["sha256"])
    yield from (name for name in told if name not in ("origin", "leaves", "masks", "sha256"))


def test_the_page_names_every_field_and_every_array_of_real_files_and_no_other(written):
    folder, loaded = written
    named, arrays = set(), {"header"}
    for kind in loaded:
        told, held, _ = container.read(folder / f"{kind}.safetensors")
        named |= set(fields(told))
        arrays |= {re.sub(r"/.*", "/NAME" if name.startswith("masks/") else "/PATH", name, flags=re.S) for name in held}
    assert set(first_column("Header")) == named
    assert set(first_column("Container")) == arrays
    for title, column in (("Header", first_column("Header")), ("Container", first_column("Container"))):
        assert len(column) == len(set(column)), title


def test_the_header_on_the_page_is_what_the_library_writes(tmp_path):
    shapes = {"Dense_0": {"kernel": jnp.zeros((300, 10)), "bias": jnp.zeros(10)}}
    weights = sm.initializers.signed_constant(jax.random.key(7), shapes)
    tenth = (np.arange(3000) % 10 == 9).reshape(300, 10).astype(np.float32)
    subnet = sm.Subnet(weights, {"Dense_0": {"kernel": tenth, "bias": None}})
    sm.save_subnetwork(tmp_path / "net", subnet, Drawn("signed_constant", 7), about={"model": "mlp"})
    told, _, _ = container.read(tmp_path / "net")
    [example] = re.findall(r"```json\n(.*?)```", section("Header"), re.DOTALL)
    assert json.loads(example) == told | {"sha256": {"weights": "...", "masks": {"default": "..."}, "state": None}}


def test_the_numbers_on_the_page_are_those_of_the_code():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", section("Draws"), re.MULTILINE)
    table = np.array([[float(number) for number in row.split(" | ")] for _, row in rows])
    np.testing.assert_array_equal(table.T, [*draws.CENTRE, *draws.TAIL])
    dtypes = re.findall(r"\b([A-Z]+\d*) ((?:b?float|u?int)\d+|bool)\b", " ".join(section("Container").split()))
    assert dict(dtypes) == container.DTYPES
    assert container.LARGEST_HEADER == 4 * 2**20 and "4 MiB" in section("Container")
    assert (contents.BOUND, contents.SMALLEST_BOUND) == (4096, 16 * 2**20)
    assert "4096 times the size of the file, and 16 MiB at least" in " ".join(PAGE.split())
    assert codes.MOST_PLANES == 255
    metadata = json.loads(re.search(r"`__metadata__` is `(.*?)`", PAGE)[1])
    assert metadata == {"format": container.FORMAT, "version": container.VERSION}
    assert set(re.findall(r"^\| `(\w+)` \|", section("Draws"), re.MULTILINE)) == draws.DRAWS.keys()
    kinds = re.search(r"masks.NAME.PATH.kind` \|(.*)\|", PAGE)[1]
    assert tuple(re.findall(r'"(\w+)"', kinds)) == codes.KINDS
    assert set(re.findall(r'"(\w+)"', re.search(r"origin.kind` \|(.*)\|", PAGE)[1])) == header.ORIGINS.keys()


def test_the_examples_on_the_page_are_what_the_library_draws():
    [example] = re.findall(r"```json\n(.*?)```", section("Draws"), re.DOTALL)
    example, seed = json.loads(example), jax.random.key(7, impl=draws.GENERATOR)
    assert zlib.crc32(b"Conv_0/kernel") == int(re.search(r"CRC-32 is (\d+)", PAGE)[1])
    key = sm.trees.leaf_key(seed, "Conv_0/kernel")
    assert jax.random.key_data(key).tolist() == example["key"]
    assert jax.random.key_data(sm.trees.leaf_key(seed, "weights")).tolist() == example["stream weights"]
    assert draws.bits(key, (4,)).tolist() == example["words"]
    for draw in ("sign", "uniform", "normal"):
        assert draws.DRAWS[draw](key, (4,), np.float32(0.5)).tolist() == example[f"{draw} 0.5"]
    zero = draws.threefry2x32_p.bind(*(jnp.zeros(1, jnp.uint32) for _ in range(4)))
    words = re.search(r"encrypts \(0, 0\) to \((\w+), (\w+)\)", PAGE).groups()
    assert [int(word[0]) for word in zero] == [int(word, 16) for word in words]


def test_the_page_links_only_what_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE)
    assert {NUMPY.name, TORCH.name} <= set(links)
    assert all(os.path.exists(DOCS / link) for link in links)
    anchors = {
        title.lower().replace(" ", "-").replace(",", "") for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
