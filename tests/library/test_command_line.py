"""The command line, `python -m supermask_jax`: on small files, and on damaged and hostile ones."""

import gzip
import inspect
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import supermask_jax as sm
from supermask_jax import artifact, container, origins
from supermask_jax.__main__ import main
from supermask_jax.commands import classify, networks
from supermask_jax.models import zoo

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
ABOUT = {
    "model": "mlp",
    "architecture": "mlp",
    "arguments": {"width": 5, "depth": 1},
    "classes": 4,
    "image_shape": [2, 3, 3],
    "mean": MEAN,
    "std": STD,
    "test_accuracy": 0.25,
}
SHAPES = {"Dense_0": (18, 5), "Dense_1": (5, 4)}


@pytest.fixture
def command(capsys):
    """Runs the command line in this process: (exit status, what it prints); its errors are one paragraph."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, errors = capsys.readouterr()
        if errors:
            assert errors.startswith("error: ") and "\n\n" not in errors and "Traceback" not in errors, errors
            assert all(len(line) <= 100 or " " not in line for line in errors.splitlines()), errors
        assert bool(errors) == (status != 0 and not out), "an error is told, and nothing else is an error"
        return status, out + errors

    return run


def weights(seed=0):
    zeros = {layer: {"kernel": jnp.zeros(shape)} for layer, shape in SHAPES.items()}
    return sm.initializers.signed_constant(jax.random.key(seed), zeros)


def random_mask(seed, shape, density):
    size = np.prod(shape)
    places = np.random.default_rng(seed).permutation(size)
    return (places < sm.keep_count(density, size)).reshape(shape).astype(np.float32)


def masks(seed):
    return {layer: {"kernel": random_mask(seed, shape, 0.3)} for layer, shape in SHAPES.items()}


def save(path, found=None, origin=None, **more):
    """Writes frozen weights and their masks."""
    found = sm.Subnet(weights(), masks(1)) if found is None else found
    more = {"about": ABOUT, **more}
    sm.save_subnetwork(path, found, artifact.Drawn("signed_constant", 0) if origin is None else origin, **more)
    return path


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "net.safetensors")


@pytest.fixture
def two(tmp_path):
    """Two masks by name, a bias that is stored, and a state."""
    whole = {**weights(), "Dense_1": {**weights()["Dense_1"], "bias": jnp.arange(4.0)}}
    named = {}
    for name, seed in (("early", 1), ("late", 2)):
        kept = masks(seed)
        named[name] = sm.Subnet(whole, {**kept, "Dense_1": {**kept["Dense_1"], "bias": None}})
    return save(tmp_path / "two.safetensors", named, model_state={"batch_stats": {"mean": jnp.arange(3.0)}})


def idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# info


def test_info_as_json_tells_what_was_saved(command, file):
    status, out = command("info", file, "--json", "--gzip")
    told, kept = json.loads(out), masks(1)
    assert status == 0
    assert told["about"] == ABOUT
    assert {layer["path"]: (tuple(layer["shape"]), layer["kept"]) for layer in told["masks"]["default"]["layers"]} == {
        f"{name}/kernel": (shape, int(kept[name]["kernel"].sum())) for name, shape in SHAPES.items()
    }
    total = told["masks"]["default"]
    assert (total["size"], total["density"]) == (110, sm.density(kept))
    assert told["sizes"]["file"] == file.stat().st_size
    assert told["sizes"]["dense_float32"] == 4 * 110
    assert told["sizes"]["dense_int8"] == 110 + 4 * (5 + 4)  # a scale for each unit
    product = [np.asarray(leaf) for leaf in jax.tree.leaves(sm.subnetwork(sm.identity, sm.Subnet(weights(), kept)))]
    assert total["gzip_bytes"] == len(gzip.compress(b"".join(leaf.tobytes() for leaf in product), 6, mtime=0))
    assert (told["origin"]["seed"], told["unmasked"], told["state"]) == (0, {}, {})


def test_info_as_text_has_a_line_for_each_layer_and_entry(command, file):
    status, out = command("info", file)
    assert status == 0
    assert "weights drawn by signed_constant with seed 0" in out
    assert out.count("/kernel") == 2 and "18 x 5" in out and "0.3000" in out
    assert all(key in out for key in ABOUT)
    assert "gzip" not in out


def test_info_lists_several_masks_or_the_one_that_is_named(command, two):
    told = json.loads(command("info", two, "--json")[1])
    assert list(told["masks"]) == ["early", "late"]
    assert told["unmasked"] == {"Dense_1/bias": [4]} and told["state"] == {"batch_stats/mean": [3]}
    assert list(json.loads(command("info", f"{two}:late", "--json")[1])["masks"]) == ["late"]
    text = command("info", two)[1]
    assert "masks 'early'" in text and "masks 'late'" in text and "without a mask: Dense_1/bias (4)" in text


def test_info_and_diff_draw_no_weights(command, file, monkeypatch):
    monkeypatch.setattr(origins, "restore", None)
    assert command("info", file)[0] == 0
    assert command("diff", file, file)[0] == 0


# verify


def test_verify_tells_what_it_checked(command, two):
    status, out = command("verify", two)
    assert status == 0
    for what in ("masks 'early'", "masks 'late'", "weights drawn by signed_constant with seed 0", "state of the model"):
        assert what in out
    assert out.count("sha256") == 4 and out.splitlines()[-1].endswith("it holds the network that was saved")


def test_verify_finds_a_changed_byte_in_every_region(command, two, tmp_path):
    content = two.read_bytes()
    length = int.from_bytes(content[:8], "little")
    regions = {"length": (0, 8), "names": (8, 8 + length)}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            regions[name] = 8 + length + begin, 8 + length + end
    assert {"header", "masks/early", "masks/late", "weights/Dense_1/bias", "state/batch_stats/mean"} < regions.keys()
    assert max(end for _, end in regions.values()) == len(content)
    damaged = tmp_path / "damaged.safetensors"
    for name, (begin, end) in regions.items():
        for at in {begin, (begin + end) // 2, end - 1}:
            damaged.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
            status, told = command("verify", damaged)
            assert status == 1 and damaged.name in told, (name, at)
    for cut in (0, 4, 100, len(content) - 1):
        damaged.write_bytes(content[:cut])
        assert command("verify", damaged)[0] == 1


def test_verify_finds_another_seed(command, file):
    header, arrays, _ = container.read(file)
    header["origin"]["key"] = [0, 1]
    container.write(file, arrays, header)
    status, told = command("verify", file)
    assert status == 1 and "its weights are not those that it was saved with" in told.replace("\n", " ")


def test_verify_of_masks_on_other_weights_needs_those_weights(command, tmp_path):
    file = save(tmp_path / "net.safetensors", origin=artifact.Base("https://example.org/net"))
    right = {f"{layer}/kernel": np.asarray(leaf["kernel"]) for layer, leaf in weights().items()}
    safetensors.numpy.save_file({**right, "other": np.zeros(3)}, tmp_path / "right.safetensors")
    np.savez(tmp_path / "right.npz", **right)
    np.savez(tmp_path / "wrong.npz", **{path: -leaf for path, leaf in right.items()})
    np.savez(tmp_path / "less.npz", **{"Dense_0/kernel": right["Dense_0/kernel"]})
    np.savez(tmp_path / "pickled.npz", **{path: leaf.astype(object) for path, leaf in right.items()})
    for base, expected in (
        ("right.safetensors", 0),
        ("right.npz", 0),
        ("wrong.npz", 1),
        ("less.npz", 1),
        ("pickled.npz", 1),
        ("net.safetensors", 1),
        ("none.npz", 2),
    ):
        assert command("verify", file, "--base", tmp_path / base)[0] == expected, base
    assert command("verify", file)[0] == 2
    assert command("info", file)[0] == 0
    assert command("verify", save(tmp_path / "drawn.safetensors"), "--base", tmp_path / "right.npz")[0] == 2


def test_a_network_of_64_bit_numbers_is_verified(command, tmp_path):
    with jax.enable_x64(True):
        wide = {"kernel": np.arange(6, dtype=np.float64).reshape(2, 3) / 7}
        found = sm.Subnet(wide, {"kernel": np.eye(2, 3)})
        file = save(tmp_path / "net.safetensors", found, artifact.Stored(), model_state={"count": np.int64(2**40)})
    assert command("verify", file)[0] == 0
    assert command("export", file, "--to", "npz", "--output", tmp_path / "net.npz")[0] == 0
    with np.load(tmp_path / "net.npz") as arrays:
        assert arrays["kernel"].dtype == np.float64 and arrays["state/count"] == 2**40
        np.testing.assert_array_equal(arrays["kernel"], wide["kernel"] * np.eye(2, 3))


# diff


def small(path, mask, sign=1):
    kernel = {"kernel": jnp.full((2, 4), 0.5)}
    return save(path, sm.Subnet(kernel, {"kernel": sign * jnp.array(mask, jnp.float32)}), artifact.Stored())


def test_diff_of_a_two_by_four_mask_counts_by_hand(command, tmp_path):
    a = small(tmp_path / "a.safetensors", [[1, 1, 0, 0], [1, 0, 0, 0]])
    b = small(tmp_path / "b.safetensors", [[1, 0, 1, 0], [1, 0, 0, 1]])
    status, out = command("diff", a, b, "--json")
    told = json.loads(out)
    assert status == 1
    layer = {key: value for key, value in told["layers"][0].items() if not key.startswith(("chance", "density"))}
    assert layer == {
        "path": "kernel",
        "size": 8,
        "kept_a": 3,
        "kept_b": 4,
        "both": 2,
        "other_values": 0,
        "jaccard": 2 / 5,
        "hamming": 3,
    }
    for part in (told["layers"][0], told["total"]):
        assert (part["density_a"], part["density_b"]) == (3 / 8, 1 / 2)
        assert part["chance_both"] == 12 / 8  # 8 * 3/8 * 4/8
        assert part["chance_jaccard"] == pytest.approx(1.5 / 5.5)
        assert part["chance_hamming"] == 4  # 8 * (3/8 * 4/8 + 5/8 * 4/8)
    status, out = command("diff", a, b)
    assert status == 1 and "0.4000" in out and "different positions" in out


def test_diff_of_random_masks_is_at_chance_and_of_the_same_masks_is_nothing(command, tmp_path):
    shape = {"kernel": jnp.ones((100, 100))}
    paths = []
    for seed, density in ((0, 0.3), (1, 0.7)):
        kept = {"kernel": random_mask(seed, (100, 100), density)}
        paths.append(save(tmp_path / f"{seed}.safetensors", sm.Subnet(shape, kept), artifact.Stored()))
    told = json.loads(command("diff", *paths, "--json")[1])["total"]
    assert told["jaccard"] == pytest.approx(told["chance_jaccard"], rel=0.05)
    assert told["hamming"] == pytest.approx(told["chance_hamming"], rel=0.05)
    status, out = command("diff", paths[0], paths[0])
    assert status == 0 and "the same positions" in out


def test_diff_sees_signs_that_differ_at_the_same_positions(command, tmp_path):
    a = small(tmp_path / "a.safetensors", [[1, 1, 0, 0], [1, 0, 0, 0]])
    b = small(tmp_path / "b.safetensors", [[1, 1, 0, 0], [1, 0, 0, 0]], sign=-1)
    status, out = command("diff", a, b)
    assert status == 1 and "the same positions, 3 of them with different values" in out


def test_diff_takes_masks_by_name_also_from_one_file(command, two, file, tmp_path):
    status, out = command("diff", f"{two}:early", f"{two}:late", "--json")
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks(1)))
    assert status == 1 and json.loads(out)["total"]["kept_a"] == kept
    assert command("diff", f"{two}:early", file)[0] == 0
    assert command("diff", two, file)[0] == 2
    assert command("diff", f"{two}:never", file)[0] == 2
    odd = shutil.copy(file, tmp_path / "net:late")  # a path with a colon is a path
    assert command("diff", odd, file)[0] == 0


def test_diff_refuses_masks_of_different_networks(command, file, tmp_path):
    other = small(tmp_path / "other.safetensors", [[1, 1, 0, 0], [1, 0, 0, 0]])
    status, told = command("diff", file, other)
    assert status == 1 and "different networks" in told and "Dense_0/kernel" in told


def test_export_takes_the_masks_that_are_named(command, two, tmp_path):
    for name, seed in (("early", 1), ("late", 2)):
        assert command("export", f"{two}:{name}", "--to", "npz", "--output", tmp_path / f"{name}.npz")[0] == 0
        with np.load(tmp_path / f"{name}.npz") as arrays:
            for layer in SHAPES:
                product = np.asarray(weights()[layer]["kernel"]) * masks(seed)[layer]["kernel"]
                np.testing.assert_array_equal(arrays[f"{layer}/kernel"], product)
    assert command("export", two, "--to", "npz", "--output", tmp_path / "any.npz")[0] == 2


# run


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 2, 3, 3), np.uint8)


def expected_logits(pixels):
    x = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).reshape(len(pixels), -1)
    kept = masks(1)
    hidden, last = (np.asarray(weights()[name]["kernel"] * kept[name]["kernel"], np.float64) for name in SHAPES)
    return np.maximum(x @ hidden, 0) @ last


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(classify, "BATCH", 4)


@pytest.mark.parametrize("name", ["images.idx", "images.gz"])
def test_run_on_idx_files_names_the_classes_and_the_accuracy(command, file, tmp_path, small_batches, name):
    pixels, logits = images(10), expected_logits(images(10))
    given = logits.argmax(axis=-1)
    given[:3] = (given[:3] + 1) % 4  # 7 of 10 are right
    arguments = "run", file, "--images", idx(tmp_path / name, pixels), "--labels", idx(tmp_path / "labels.gz", given)
    status, out = command(*arguments, "--top", 2)
    *lines, accuracy = out.splitlines()
    assert status == 0 and accuracy == "accuracy 70.00%: 7 of 10 images"
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for i, line in enumerate(lines):
        image, first, p, second, q = line.split("\t")
        assert image == f"{name}[{i}]"
        assert [int(first), int(second)] == np.argsort(-logits[i])[:2].tolist()
        assert [float(p), float(q)] == pytest.approx(np.sort(probabilities[i])[:1:-1], abs=1e-4)
    assert command(*arguments, "--quiet") == (0, accuracy + "\n")


def test_run_on_a_directory_is_run_on_the_same_images(command, file, tmp_path, small_batches):
    pixels = images(6)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    of_files = command("run", file, "--images", tmp_path / "images")[1].splitlines()
    of_idx = command("run", file, "--images", idx(tmp_path / "all.idx", pixels))[1].splitlines()
    assert [line.split("\t")[1:] for line in of_files] == [line.split("\t")[1:] for line in of_idx]
    assert [Path(line.split("\t")[0]).name for line in of_files] == [f"{i}.png" for i in range(6)]
    assert command("run", file, "--images", tmp_path / "images" / "3.png")[1].splitlines() == [of_files[3]]


def test_run_converts_between_grey_and_colour(command, tmp_path):
    grey = {"architecture": "mlp", "image_shape": [2, 3, 1], "mean": [0.1], "std": [0.5]}
    kernel = {"Dense_0": {"kernel": jnp.ones((6, 5))}, "Dense_1": {"kernel": jnp.eye(5, 4)}}
    ones = jax.tree.map(jnp.ones_like, kernel)
    file = save(tmp_path / "grey.safetensors", sm.Subnet(kernel, ones), artifact.Stored(), about=ABOUT | grey)
    pixels = images(1)[0, :, :, 0]
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(pixels[..., None], 3, axis=-1)).save(tmp_path / "colour.png")
    told = [command("run", file, "--images", tmp_path / f"{name}.png")[1] for name in ("grey", "colour")]
    assert told[0].split("\t")[1:] == told[1].split("\t")[1:]
    colour = save(tmp_path / "colour.safetensors")
    assert command("run", colour, "--images", tmp_path / "grey.png")[0] == 0


def test_the_table_of_networks_is_the_zoo():
    """The registry of a file's names is fixed; a new network of the zoo must be put into it."""
    functions = {
        name: value
        for name, value in vars(zoo).items()
        if inspect.isfunction(value) and value.__module__ == zoo.__name__ and not name.startswith("_")
    }
    assert {name: make for name, (make, _) in networks.TABLE.items()} == functions
    for make, options in networks.TABLE.values():
        parameters = inspect.signature(make).parameters
        assert {name: type(parameters[name].default) for name in list(parameters)[1:]} == options


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "os.system"},
        {"architecture": ["mlp"]},
        {"architecture": "lenet_300_100", "arguments": {}},
        {"arguments": {"width": 5, "depth": 1, "hidden": [5]}},
        {"arguments": {"width": 5, "depth": 10**9}},
        {"arguments": {"width": 10**9, "depth": 1}},
        {"arguments": {"width": True, "depth": 1}},
        {"arguments": {"width": 5, "depth": 2}},
        {"arguments": {"width": 6, "depth": 1}},
        {"classes": 5},
        {"classes": True},
        {"image_shape": [3, 2, 2]},
        {"image_shape": [2**60, 3, 3]},
        {"image_shape": [-2, 3, 3]},
        {"image_shape": None},
        {"mean": [0.1]},
        {"mean": ["a", "b", "c"]},
        {"std": [0.5, 0.0, 0.5]},
    ],
    ids=str,
)
def test_run_and_export_refuse_what_a_file_should_not_tell(command, tmp_path, change):
    file = save(tmp_path / "net.safetensors", about=ABOUT | change)
    pixels = idx(tmp_path / "images.idx", images(1))
    for arguments in (
        ("run", file, "--images", pixels),
        ("export", file, "--to", "compressed-tensors", "--output", tmp_path / "out"),
    ):
        status, told = command(*arguments)
        assert status == 1 and "net.safetensors" in told
    assert not (tmp_path / "out").exists()


def test_a_depth_that_the_weights_cannot_have_is_refused_before_the_network_is_traced(command, tmp_path, monkeypatch):
    file = save(tmp_path / "net.safetensors", about=ABOUT | {"arguments": {"width": 5, "depth": 2**15}})
    monkeypatch.setattr(jax, "eval_shape", lambda *_: pytest.fail("it is traced"))
    assert command("run", file, "--images", idx(tmp_path / "images.idx", images(1)))[0] == 1


# errors


def test_every_error_is_a_paragraph_with_its_status(command, file, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "BATCH", 1)  # nothing is classified before all is checked
    (tmp_path / "text.safetensors").write_text("no network")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(bytes(1000))[:20])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(images(1)[0]).save(tmp_path / "eps.png", "EPS")
    Image.fromarray(images(1)[0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    (tmp_path / "mixed").mkdir()
    for name, pixels in (("a", images(1)[0]), ("b", images(1)[0, :1])):
        Image.fromarray(pixels).save(tmp_path / "mixed" / f"{name}.png")
    Image.fromarray(images(1)[0, :, :2]).save(tmp_path / "narrow.png")
    pixels, wrong = idx(tmp_path / "images.idx", images(2)), idx(tmp_path / "wrong.idx", images(2)[:, 1:])
    short = tmp_path / "short.idx"
    short.write_bytes(pixels.read_bytes()[:-1])
    long = tmp_path / "long.idx"
    long.write_bytes(pixels.read_bytes() + b"\0")
    labels, beyond = idx(tmp_path / "labels.idx", np.zeros(3)), idx(tmp_path / "beyond.idx", np.array([1, 4]))
    run = ("run", file, "--images")
    for arguments, expected, told in (
        ((), 2, "required"),
        (("explain", file), 2, "invalid choice"),
        (("info",), 2, "required"),
        (("info", tmp_path / "none"), 2, "none"),
        (("info", tmp_path), 2, "directory"),
        (("info", tmp_path / "text.safetensors"), 1, "text.safetensors"),
        (("info", file, "--max-bytes", "0"), 2, "--max-bytes"),
        (("info", file, "--max-bytes", "4GB"), 2, "'4GB' is no whole number above 0"),
        (("info", file, "--max-bytes", "10"), 1, "--max-bytes"),
        (("info", f"{file}:late"), 2, "late"),
        (("export", file, "--to", "docx", "--output", "x"), 2, "docx"),
        (("export", file, "--to", "npz", "--output", tmp_path / "no" / "x"), 2, "no directory"),
        (("export", file, "--to", "npz", "--output", file), 2, "the file itself"),
        ((*run, tmp_path / "empty"), 2, "no images"),
        ((*run, tmp_path / "none"), 2, "none"),
        ((*run, tmp_path / "text.png"), 1, "text.png"),
        ((*run, tmp_path / "cut.png"), 1, "cut.png"),
        ((*run, tmp_path / "eps.png"), 1, "eps.png"),  # whose reader starts another program
        ((*run, tmp_path / "huge.png"), 1, "huge.png"),
        ((*run, tmp_path / "narrow.png"), 2, "2 x 2"),
        ((*run, tmp_path / "mixed"), 2, "b.png has 1 x 3"),  # and no line of a.png
        ((*run, tmp_path / "text.safetensors"), 1, "no IDX file"),
        ((*run, tmp_path / "cut.gz"), 1, "cut.gz"),
        ((*run, wrong), 2, "2 x 3 x 3"),
        ((*run, short), 1, "truncated"),
        ((*run, long), 1, "too long"),
        ((*run, pixels, "--labels", labels), 2, "2 images"),
        ((*run, pixels, "--labels", beyond), 2, "label 4"),
        ((*run, pixels, "--labels", pixels), 2, "2 images"),
        ((*run, pixels, "--top", 5), 2, "from 1 to 4"),
        ((*run, pixels, "--top", "many"), 2, "--top"),
        ((*run, pixels, "--quiet"), 2, "--labels"),
    ):
        status, text = command(*arguments)
        assert (status, told in " ".join(text.split())) == (expected, True), (arguments, text)


def test_an_export_does_not_take_the_place_of_the_weights_that_it_reads(command, tmp_path):
    file = save(tmp_path / "net.safetensors", origin=artifact.Base("https://example.org/net"))
    base = tmp_path / "base.npz"
    np.savez(base, **{f"{layer}/kernel": np.asarray(leaf["kernel"]) for layer, leaf in weights().items()})
    before = base.read_bytes()
    status, told = command("export", file, "--base", base, "--to", "npz", "--output", base)
    assert status == 2 and "what --base names" in " ".join(told.split()) and base.read_bytes() == before


def test_base_weights_that_are_damaged_or_no_archive_are_told(command, tmp_path):
    file = save(tmp_path / "net.safetensors", origin=artifact.Base("https://example.org/net"))
    arrays = {f"{layer}/kernel": np.asarray(leaf["kernel"]) for layer, leaf in weights().items()}
    np.savez_compressed(tmp_path / "whole.npz", **arrays)
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", arrays["Dense_0/kernel"])
    (tmp_path / "one.npz").write_bytes((tmp_path / "one.npy").read_bytes())
    status, told = command("verify", file, "--base", tmp_path / "one.npz")
    assert status == 1 and "no whole .safetensors or .npz file" in " ".join(told.split())
    for at in range(0, len(whole), 7):
        (tmp_path / "cut.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert command("verify", file, "--base", tmp_path / "cut.npz")[0] in (0, 1), at


def test_masks_on_given_weights_are_exported_and_run_like_a_file_that_holds_them(command, tmp_path):
    named = {f"{layer}/kernel": np.asarray(leaf["kernel"]) for layer, leaf in weights().items()}
    np.savez(tmp_path / "base.npz", **named)
    bare = save(tmp_path / "bare.safetensors", origin=artifact.Base("https://example.org/net"))
    whole = save(tmp_path / "whole.safetensors", origin=artifact.Stored())
    given, out = ("--base", tmp_path / "base.npz"), tmp_path / "out.npz"
    assert command("export", bare, *given, "--to", "npz", "--output", out)[0] == 0
    with np.load(out) as arrays:
        for layer, mask in masks(1).items():
            np.testing.assert_array_equal(arrays[f"{layer}/kernel"], named[f"{layer}/kernel"] * mask["kernel"])
    pixels = idx(tmp_path / "images.idx", images(3))
    assert command("run", bare, *given, "--images", pixels) == command("run", whole, "--images", pixels)
    for other in ("export", "run"):
        flags = ("--to", "npz", "--output", out) if other == "export" else ("--images", pixels)
        status, told = command(other, bare, *flags)
        assert status == 2 and "--base" in told


@pytest.mark.parametrize("name", ("info", "verify", "diff", "export", "run"))
def test_every_command_takes_as_much_memory_as_it_is_allowed(command, file, tmp_path, name):
    pixels = idx(tmp_path / "images.idx", images(1))
    more = {"diff": (file,), "export": ("--to", "npz", "--output", tmp_path / "o.npz"), "run": ("--images", pixels)}
    arguments = (name, file, *more.get(name, ()), "--max-bytes")
    status, told = command(*arguments, 10)
    assert status == 1 and "--max-bytes" in told
    assert command(*arguments, 2**20)[0] == 0


def test_jpeg_files_are_read(command, file, tmp_path):
    for suffix in (".jpg", ".JPEG"):
        Image.fromarray(images(1)[0]).save(tmp_path / f"x{suffix}", quality=95)
        assert command("run", file, "--images", tmp_path / f"x{suffix}")[0] == 0


@pytest.mark.parametrize(("error", "status"), ((MemoryError, 1), (KeyboardInterrupt, 130)))
def test_no_memory_and_ctrl_c_end_without_a_traceback(file, monkeypatch, capsys, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("supermask_jax.commands.info.info", fail)
    assert main(["info", str(file)]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_masks_whose_name_has_a_colon_are_chosen_by_it(command, tmp_path):
    found = {"task:1": sm.Subnet(weights(), masks(1)), "1": sm.Subnet(weights(), masks(2))}
    file = save(tmp_path / "net.safetensors", found)
    for name in found:
        status, out = command("info", f"{file}:{name}", "--json")
        assert status == 0 and list(json.loads(out)["masks"]) == [name]


def test_gzip_of_many_masks_draws_the_weights_once(command, two, monkeypatch):
    loads, load = [], artifact.load_subnetwork
    monkeypatch.setattr(artifact, "load_subnetwork", lambda *a, **k: loads.append(a) or load(*a, **k))
    sizes = {
        name: told["gzip_bytes"]
        for name, told in json.loads(command("info", two, "--gzip", "--json")[1])["masks"].items()
    }
    assert len(loads) == 1 and len(sizes) == 2
    for name, size in sizes.items():
        assert json.loads(command("info", f"{two}:{name}", "--gzip", "--json")[1])["masks"][name]["gzip_bytes"] == size


def test_run_computes_in_bfloat16_where_the_network_was_trained_so(command, file, tmp_path):
    narrow = save(tmp_path / "narrow.safetensors", about=ABOUT | {"bfloat16": True})
    pixels = idx(tmp_path / "images.idx", images(50))
    wide, rounded = (
        [line.split("\t") for line in command("run", f, "--images", pixels)[1].splitlines()] for f in (file, narrow)
    )
    differ = [abs(float(a[2]) - float(b[2])) for a, b in zip(wide, rounded, strict=True)]
    assert 0 < max(differ) < 0.05


@pytest.mark.parametrize(("package", "arguments"), [("torch", ("--to", "torch")), ("onnx", ("--to", "onnx"))])
def test_a_missing_package_is_named(command, file, tmp_path, monkeypatch, package, arguments):
    monkeypatch.setitem(sys.modules, package, None)
    status, told = command("export", file, *arguments, "--output", tmp_path / "out.bin")
    assert status == 2 and f"pip install {package}" in told.replace("\n", " ")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_claims_much_memory_is_refused_before_it_is_taken(command, file):
    header, arrays, _ = container.read(file)
    header["leaves"]["Dense_0/kernel"]["shape"] = [2**20, 2**10]
    container.write(file, arrays, header)
    for name in ("info", "verify"):
        status, told = command(name, file)
        assert status == 1 and "--max-bytes" in told and "max_bytes" not in told


def test_text_of_a_file_reaches_the_terminal_without_control_characters(command, tmp_path):
    hostile = "\x1b[2J\x07\u202e\ud800"
    file = save(tmp_path / "net.safetensors", about={**ABOUT, hostile: hostile, "architecture": hostile})
    status, out = command("info", file)
    assert status == 0 and not any(c in out for c in "\x1b\x07\u202e\ud800") and "\\x1b[2J" in out
    named = save(tmp_path / "named.safetensors", {"\x1b[2J\x07": sm.Subnet(weights(), masks(1))})
    status, told = command("info", f"{named}:other")  # the error lists the names
    assert status == 2 and "\\x1b[2J" in told and not any(c in told for c in "\x1b\x07")


def test_random_damage_never_ends_in_a_traceback(command, two, tmp_path):
    """The checksum of the header is made right again, so that what it says is believed."""
    rng = np.random.default_rng(0)
    header, arrays, _ = container.read(two)
    text = json.dumps(header).encode()
    damaged = tmp_path / "damaged.safetensors"
    for _ in range(100):
        changed = bytearray(text)
        for at in rng.integers(0, len(text), rng.integers(1, 4)):
            changed[at] = rng.choice(list(b'0123456789.-eE{}[]",:abn'))
        packed = np.frombuffer(zlib.compress(bytes(changed)), np.uint8)
        whole = {container.HEADER: packed, **arrays}
        damaged.write_bytes(safetensors.numpy.save(whole, {"format": container.FORMAT, "version": container.VERSION}))
        assert command("verify", damaged)[0] in (0, 1)  # 0: in `about`, which no hash covers
        assert command("info", damaged)[0] in (0, 1)


# the process


def test_help_answers_without_heavy_imports_and_a_closed_pipe_is_quiet(file):
    code = (
        "import sys\nfrom supermask_jax.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        "assert not {'flax', 'PIL', 'torch', 'onnx', 'supermask_jax.commands.info'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(name in done.stdout for name in ("info", "verify", "diff", "export", "run"))
    process = subprocess.Popen(
        [sys.executable, "-m", "supermask_jax", "info", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)
    process.stderr.close()
