"""Images in class folders: the pixels that are in the files, streamed or in memory, or an error that names the file."""

import os
import pickle
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.data import folder as folder_room
from experiments.data import load as data
from experiments.data.batches import class_sample, hold_out
from experiments.data.folder import Files
from experiments.data.pictures import in_threads
from experiments.data.source import Arrays
from experiments.run.errors import DataError

GREY, COLOUR = (6, 5), (6, 5, 3)


def noise(shape, seed):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(file, pixels, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return pixels


def made(base, shape=GREY, splits=(("train", 3), ("test", 2)), classes=("cat", "dog"), suffix=".png"):
    """Writes images of noise; returns {split: (images [n, h, w, c], labels)}, as they should be read."""
    sets, seed = {}, 0
    for split, count in splits:
        images, labels = [], []
        for label, name in enumerate(sorted(classes)):
            for n in range(count):
                images.append(save(base / split / name / f"{n:02}{suffix}", noise(shape, seed)))
                labels.append(label)
                seed += 1
        sets[split] = np.stack(images).reshape(len(images), *shape[:2], -1), labels
    return sets


def opened(file, mode=None):
    """The pixels of a file, as Pillow converts them."""
    with Image.open(file) as image:
        return np.asarray(image.convert(mode or image.mode))


def assert_holds(source, expected):
    images, labels = expected
    batch = source.read(np.arange(len(source)))
    np.testing.assert_array_equal(batch["image"], images, strict=True)
    assert batch["label"].dtype == source.labels.dtype == np.int32
    assert batch["label"].tolist() == source.labels.tolist() == labels


@pytest.fixture(params=[False, True], ids=["memory", "stream"])
def stream(request):
    return request.param


# What is read.


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("where", ["folder", ""])
@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_pixels_labels_and_splits_are_those_of_the_files(tmp_path, stream, shape, where, test):
    sets = made(tmp_path / where, shape, (("train", 3), (test, 2)), classes=("dog", "cat", "ant"))
    got = data.load("folder", tmp_path, stream=stream)
    assert_holds(got.train, sets["train"])
    assert_holds(got.test, sets[test])
    assert (got.name.split("-")[0], got.classes, got.warning) == ("folder", 3, None)
    assert got.image_shape == (6, 5, 1 if shape == GREY else 3)
    assert got.source == f"images in class folders in {tmp_path / where}: train and {test}"
    assert isinstance(got.train, Files if stream else Arrays)


def test_the_folder_of_the_set_comes_before_the_directory_itself(tmp_path, stream):
    made(tmp_path, COLOUR)
    sets = made(tmp_path / "folder")
    assert_holds(data.load("folder", tmp_path, stream=stream).train, sets["train"])


def test_the_test_folder_comes_before_the_validation_folder(tmp_path):
    sets = made(tmp_path, splits=(("train", 2), ("validation", 2), ("val", 2), ("test", 2)))
    assert_holds(data.load("folder", tmp_path).test, sets["test"])


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_streamed_and_in_memory_are_the_same_to_the_last_bit(tmp_path, shape):
    made(tmp_path, shape, splits=(("train", 40), ("test", 5)))
    memory, streamed = (data.load("folder", tmp_path, stream=stream) for stream in (False, True))
    for name in ("classes", "image_shape", "mean", "std", "source"):
        assert getattr(memory, name) == getattr(streamed, name), name
    order = np.random.default_rng(0).permutation(80)[:33]
    for one, other in ((memory.train, streamed.train), (memory.train.take(order), streamed.train.take(order))):
        for indices in (np.arange(len(one)), np.array([5, 0, 0, 31]), np.array([], int)):
            for key in (None, jax.random.key(0)):
                first, second = one.read(indices, key), other.read(indices, key)
                assert first.keys() == second.keys() == {"image", "label"}
                for name in first:
                    np.testing.assert_array_equal(first[name], second[name], strict=True)


def test_the_split_and_the_sample_of_a_streamed_set_are_those_of_the_set_in_memory(tmp_path):
    made(tmp_path, splits=(("train", 10), ("test", 1)))
    batches = []
    for stream in (False, True):
        rest, split = hold_out(data.load("folder", tmp_path, stream=stream), 4)
        batches.append([rest.train.read(np.arange(16)), split.read(np.arange(4))])
        batches[-1].append(class_sample(rest.train, 2, jax.random.key(0), 3))
    for one, other in zip(*batches, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPEG", ".JPG", ".bmp", ".PNG", ".webp", ".gif"])
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_format_is_what_pillow_decodes(tmp_path, stream, suffix, shape):
    made(tmp_path, shape, suffix=suffix)
    got = data.load("folder", tmp_path, stream=stream)
    mode = "L" if got.image_shape[-1] == 1 else "RGB"
    assert (mode == "L") == (shape == GREY and suffix not in (".webp", ".gif"))  # these two have no grey
    files = sorted((tmp_path / "train").rglob("*.*"))
    expected = np.stack([opened(file, mode).reshape(got.image_shape) for file in files])
    assert_holds(got.train, (expected, [0, 0, 0, 1, 1, 1]))


def test_of_a_moving_gif_the_first_frame_is_read(tmp_path):
    sets = made(tmp_path)
    frames = [Image.fromarray(np.full(COLOUR, value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "train" / "ant.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "train" / "ant.gif").rename(tmp_path / "train" / "cat" / "00.gif")
    image = data.load("folder", tmp_path).train.read(np.array([0]))["image"]
    np.testing.assert_array_equal(image, np.full((1, *COLOUR), 40))
    assert len(sets["train"][0]) == 6


@pytest.mark.parametrize("coloured", ["train/dog/00.png", "test/cat/01.png"])
def test_grey_images_among_coloured_ones_have_three_equal_channels(tmp_path, stream, coloured):
    made(tmp_path)
    pixels = save(tmp_path / coloured, noise(COLOUR, 100))
    got = data.load("folder", tmp_path, stream=stream)
    assert got.image_shape == COLOUR
    for split in ("train", "test"):
        files = sorted((tmp_path / split).rglob("*.png"))
        images = getattr(got, split).read(np.arange(len(files)))["image"]
        for file, image in zip(files, images, strict=True):
            if file == tmp_path / coloured:
                np.testing.assert_array_equal(image, pixels)
            else:
                np.testing.assert_array_equal(image, np.repeat(opened(file)[..., None], 3, -1))


def test_black_and_white_and_sixteen_bits_are_grey(tmp_path, stream):
    sets = made(tmp_path)
    bits, deep = noise(GREY, 1) > 127, np.random.default_rng(2).integers(0, 2**16, GREY, np.uint16)
    save(tmp_path / "train/cat/00.png", bits)
    save(tmp_path / "train/cat/01.png", deep)
    sets["train"][0][:2, ..., 0] = bits * 255, deep >> 8
    assert_holds(data.load("folder", tmp_path, stream=stream).train, sets["train"])
    save(tmp_path / "train/dog/02.png", noise(COLOUR, 100))
    images = data.load("folder", tmp_path, stream=stream).train.read(np.arange(2))["image"]
    np.testing.assert_array_equal(images, np.repeat(sets["train"][0][:2], 3, -1))


def test_transparency_and_palettes_become_red_green_and_blue(tmp_path, stream):
    made(tmp_path)
    pixels = save(tmp_path / "train/cat/00.png", noise((*GREY, 4), 1))
    palette = Image.fromarray(noise(COLOUR, 2)).convert("P")
    palette.save(tmp_path / "train/cat/01.png", transparency=bytes([0, 100, 255]))
    batch = data.load("folder", tmp_path, stream=stream).train.read(np.arange(2))["image"]
    np.testing.assert_array_equal(batch[0], pixels[..., :3])
    np.testing.assert_array_equal(batch[1], np.asarray(palette.convert("RGB")))


def test_hidden_files_and_files_beside_the_classes_are_ignored(tmp_path, stream):
    sets = made(tmp_path)
    for file in ("train/.hidden/x.png", "train/cat/.DS_Store", "train/README.txt", ".git/x", "notes.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"no image")
    got = data.load("folder", tmp_path, stream=stream)
    assert got.classes == 2
    assert_holds(got.train, sets["train"])


def test_links_are_followed(tmp_path):
    sets = made(tmp_path / "real")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train").symlink_to(tmp_path / "real/train")
    (tmp_path / "d/test").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "d/test" / name).symlink_to(tmp_path / "real/test" / name)
    assert_holds(data.load("folder", tmp_path / "d").test, sets["test"])


# Without a split.


@pytest.mark.parametrize("where", ["folder", ""])
def test_without_a_split_every_fifth_image_of_each_class_is_held_out(tmp_path, stream, where):
    images, _ = made(tmp_path / where, splits=(("", 11),))[""]
    got = data.load("folder", tmp_path, stream=stream)
    test = np.array([4, 9, 15, 20])  # 11 of each class
    train = np.setdiff1d(np.arange(22), test)
    assert_holds(got.test, (images[test], [0, 0, 1, 1]))
    assert_holds(got.train, (images[train], [0] * 9 + [1] * 9))
    assert str(tmp_path / where) in got.source and "every fifth image of each class" in got.source
    assert "\n" not in got.source


def test_without_a_split_a_class_of_four_images_is_an_error(tmp_path):
    made(tmp_path, splits=(("", 5),))
    (tmp_path / "dog" / "03.png").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path / 'dog'} holds 4 images.* takes 5 or more"):
        data.load("folder", tmp_path)


# Statistics and fingerprints.


def test_statistics_of_a_streamed_set_are_those_of_evenly_spaced_images(tmp_path, monkeypatch):
    images = made(tmp_path, COLOUR, splits=(("train", 10), ("test", 1)))["train"][0]
    monkeypatch.setattr(folder_room, "STATISTICS", 5)
    got = data.load("folder", tmp_path, stream=True)
    sample = images[[0, 4, 8, 12, 16]] / 255
    np.testing.assert_allclose(got.mean, sample.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.std, sample.std((0, 1, 2)), rtol=1e-12)


def test_the_fingerprint_in_memory_is_that_of_the_training_images(tmp_path):
    images = made(tmp_path)["train"][0]
    assert data.load("folder", tmp_path).fingerprint == f"{zlib.crc32(images.tobytes()):08x}"


def test_the_streamed_fingerprint_is_of_the_training_files_and_their_sizes_wherever_they_lie(tmp_path):
    def of(root):
        return data.load("folder", root, stream=True).fingerprint

    made(tmp_path / "a")
    first = of(tmp_path / "a")
    made(tmp_path / "b" / "folder")
    assert of(tmp_path / "b") == first and len(first) == 8
    save(tmp_path / "a/test/cat/00.png", noise(GREY, 50))
    os.rename(tmp_path / "a/test/dog/00.png", tmp_path / "a/test/dog/99.png")
    assert of(tmp_path / "a") == first
    file = tmp_path / "a/train/cat/00.png"
    file.write_bytes(file.read_bytes() + b"\0")
    longer = of(tmp_path / "a")
    os.rename(file, file.with_name("99.png"))
    assert len({first, longer, of(tmp_path / "a")}) == 3


# What is refused.


def refused(root, stream=False):
    with pytest.raises(DataError) as caught:
        data.load("folder", root, stream=stream)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("shape", "says"), [((5, 6), "5 x 6"), ((6, 6), "6 x 6"), ((12, 10, 3), "12 x 10")])
def test_the_first_image_of_another_size_is_named_with_a_way_to_resize_all(tmp_path, stream, shape, says):
    made(tmp_path)
    for name in ("train/dog/01.png", "train/dog/02.png", "test/cat/00.png"):
        save(tmp_path / name, noise(shape, 1))
    message = refused(tmp_path, stream)
    assert message.startswith(f"{tmp_path / 'train/dog/01.png'} is {says} pixels")
    assert f"{tmp_path / 'train/cat/00.png'} is 6 x 5" in message
    assert f"mogrify -resize 5x6! {tmp_path}/*/*/*.png" in message


def test_the_way_to_resize_fits_a_folder_without_a_split(tmp_path):
    made(tmp_path, splits=(("", 5),), suffix=".bmp")
    save(tmp_path / "dog" / "01.bmp", noise((7, 7), 1))
    assert refused(tmp_path).endswith(f"mogrify -resize 5x6! {tmp_path}/*/*.bmp")


@pytest.mark.parametrize("name", ["train/cat/01.png", "test/dog/00.png"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_a_file_without_an_image_in_it_is_named(tmp_path, stream, name, content):
    made(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path, stream).startswith(f"cannot read the image {tmp_path / name} (")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp"])
def test_a_truncated_image_is_named_when_it_is_decoded(tmp_path, suffix):
    made(tmp_path, (40, 40, 3), suffix=suffix)
    file = tmp_path / "test" / "dog" / f"01{suffix}"
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    assert str(file) in refused(tmp_path)
    try:
        test = data.load("folder", tmp_path, stream=True).test
    except DataError as error:  # a format whose header tells
        assert str(file) in str(error)
        return
    assert len(test.read(np.array([0, 1, 2]))["label"]) == 3
    with pytest.raises(DataError, match="cannot read the image") as caught:
        test.read(np.array([1, 3, 2]))
    assert str(file) in str(caught.value)


def test_a_damaged_png_is_named(tmp_path):
    made(tmp_path)
    file = tmp_path / "train/cat/00.png"
    content = file.read_bytes()
    middle = content.index(b"IDAT") + 10
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert str(file) in refused(tmp_path)


def test_a_format_that_is_not_an_image_of_the_list_is_not_decoded_whatever_its_suffix(tmp_path):
    made(tmp_path)
    Image.fromarray(noise(GREY, 0)).save(tmp_path / "x.ppm")
    (tmp_path / "x.ppm").rename(tmp_path / "train/cat/00.png")
    assert str(tmp_path / "train/cat/00.png") in refused(tmp_path)


def test_a_file_that_changes_its_size_after_it_was_listed_is_named(tmp_path):
    made(tmp_path)
    train = data.load("folder", tmp_path, stream=True).train
    save(tmp_path / "train/cat/01.png", noise((7, 7), 0))
    with pytest.raises(DataError, match=rf"{tmp_path / 'train/cat/01.png'} has changed"):
        train.read(np.arange(6))
    (tmp_path / "train/cat/01.png").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path / 'train/cat/01.png'} .*FileNotFoundError"):
        train.read(np.arange(6))


@pytest.mark.parametrize("name", ["train/cat/labels.csv", "test/dog/Thumbs.db", "train/dog/image"])
def test_a_file_that_is_no_image_in_a_class_folder_is_named(tmp_path, name):
    made(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    assert refused(tmp_path).startswith(f"{tmp_path / name} is not an image file")


def test_a_folder_or_a_dead_link_in_a_class_folder_is_named(tmp_path):
    made(tmp_path)
    for name in ("train/cat/more.png", "train/cat/alink.png"):
        path = tmp_path / name
        path.mkdir() if "more" in name else path.symlink_to(tmp_path / "nowhere.png")
        assert refused(tmp_path).startswith(f"{path} is not an image file")
        path.rmdir() if "more" in name else path.unlink()


def test_an_image_outside_the_class_folders_is_named(tmp_path):
    made(tmp_path)
    save(tmp_path / "train" / "x.PNG", noise(GREY, 0))
    assert refused(tmp_path).startswith(f"{tmp_path / 'train' / 'x.PNG'} is in no class folder")


@pytest.mark.parametrize(("split", "says"), [("train", "training set in .* lacks .* test set"), ("test", "test set")])
def test_a_class_that_one_split_lacks_is_named(tmp_path, split, says):
    made(tmp_path, classes=("ant", "bee", "cat", "dog"))
    for name in ("ant", "cat"):
        for file in (tmp_path / split / name).iterdir():
            file.unlink()
        (tmp_path / split / name).rmdir()
    with pytest.raises(DataError, match=rf"{says}.*: ant, cat$"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("name", ["train/cat", "test/dog"])
def test_an_empty_class_is_named(tmp_path, name):
    made(tmp_path)
    for file in (tmp_path / name).iterdir():
        file.unlink()
    (tmp_path / name / ".hidden.png").touch()
    assert refused(tmp_path).startswith(f"the class folder {tmp_path / name} is empty")


def test_one_class_is_too_few(tmp_path):
    made(tmp_path, classes=("cat",))
    assert "the class cat only" in refused(tmp_path)


@pytest.mark.parametrize(("split", "says"), [("train", "has train but no test"), ("val", "has val but no train")])
def test_half_a_split_is_an_error(tmp_path, split, says):
    made(tmp_path, splits=((split, 3),))
    assert says in refused(tmp_path)


@pytest.mark.parametrize("root", ["", "not there"])
def test_where_there_is_nothing_it_says_what_belongs_where(tmp_path, root):
    message = refused(tmp_path / root)
    for part in (tmp_path / root / "folder", "train/CLASS/NAME.png", "test/CLASS/NAME.png"):
        assert str(part) in message


def test_a_set_that_needs_more_than_half_of_the_free_memory_is_to_be_streamed(tmp_path, monkeypatch):
    made(tmp_path, COLOUR, splits=(("train", 4), ("test", 1)))
    needed = 10 * 6 * 5 * 3
    monkeypatch.setattr(folder_room, "free_memory", lambda swap: 2 * needed - 2)
    assert "--stream" in refused(tmp_path)
    assert data.load("folder", tmp_path, stream=True).image_shape == COLOUR
    for free in (2 * needed, None):
        monkeypatch.setattr(folder_room, "free_memory", lambda swap, free=free: free)
        assert len(data.load("folder", tmp_path).train) == 8


def test_the_free_memory_of_this_machine_is_told_in_bytes():
    if not Path("/proc/meminfo").exists():
        pytest.skip("this system does not say")
    assert 2**20 < folder_room.free_memory(swap=False) < 2**50


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch):
    made(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'supermask-jax[experiments]'" in refused(tmp_path)


def test_a_constant_channel_is_an_error_streamed_or_not(tmp_path, stream):
    made(tmp_path, COLOUR)
    for file in (tmp_path / "train").rglob("*.png"):
        pixels = opened(file).copy()
        pixels[..., 2] = 200
        save(file, pixels)
    assert "all training pixels of the blue channel are equal" in refused(tmp_path, stream)


# The machinery.


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 1000, 7001])
def test_threads_return_results_in_order(count):
    assert in_threads(lambda item: item**2, range(count)) == [item**2 for item in range(count)]


def test_threads_raise_the_error_of_the_first_item_that_has_one():
    def fail(item):
        if item in (300, 301, 900):
            raise DataError(str(item))

    with pytest.raises(DataError, match=r"^300$"):
        in_threads(fail, range(1000))


def test_a_streamed_source_can_be_sent_to_another_process(tmp_path):
    sets = made(tmp_path)
    train = data.load("folder", tmp_path, stream=True).train
    assert_holds(pickle.loads(pickle.dumps(train)), sets["train"])
