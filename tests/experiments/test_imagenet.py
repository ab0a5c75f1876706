"""Photographs of many sizes: found, cropped and decoded as they should be, in an order that no worker changes."""

import errno
import json
import multiprocessing.context
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.io
import signals

from experiments import benchmark, import_weights
from experiments import imagenet as command
from experiments.bench import reading
from experiments.config.flags import parser
from experiments.config.registry import METHODS
from experiments.config.settings import changed
from experiments.data import photographs
from experiments.data.batches import class_sample, hold_out
from experiments.data.blank import blank_imagenet
from experiments.data.imagenet import CLASSES, TRUTH
from experiments.data.load import load
from experiments.data.photographs import CENTRE, RATIO, cropped
from experiments.data.source import Arrays
from experiments.data.stream import batches_ahead
from experiments.run.errors import DataError, UserError
from experiments.run.interrupt import Interrupted
from experiments.run.placement import Placement
from experiments.training import parts, stepper
from experiments.training.fit import run
from experiments.training.images import splits
from experiments.training.stepper import Epochs, _read, epochs_of

ROOT = Path(__file__).parents[2]
WNIDS = ("n01440764", "n02119789", "n03000684")
SIZES = ((60, 90), (128, 40), (300, 500), (33, 33))  # width, height


def photograph(width, height, seed=0):
    """A smooth picture: decoding it at half its size changes little."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    pixels = np.stack([127.5 + 120 * np.sin(3 * x + 2 * y + phase) for phase in phases], axis=-1)
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes of six photographs to train on and two to evaluate on, of many sizes and kinds."""
    base = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 6), ("val", 2)):
        for c, wnid in enumerate(WNIDS):
            folder = base / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for n in range(count):
                image = photograph(*SIZES[(c + n) % len(SIZES)], seed=10 * c + n)
                image = image.convert("L") if n == 1 else image.convert("CMYK") if n == 2 else image
                image.save(folder / f"{wnid}_{n}.JPEG", format="PNG" if n == 3 else "JPEG", quality=95)
    return base


@pytest.fixture
def copied(root, tmp_path):
    return shutil.copytree(root / "imagenet", tmp_path / "imagenet")


def test_photographs_of_all_sizes_and_kinds_become_squares_with_their_labels(root):
    dataset = load("imagenet", root, image_size=24)
    assert (dataset.name, dataset.classes) == (f"photographs-{dataset.fingerprint}", 3)
    assert dataset.image_shape == (24, 24, 3)
    assert (len(dataset.train), len(dataset.test)) == (18, 6)
    batch = dataset.train.read(np.arange(18), np.arange(18, dtype=np.uint32))
    assert batch["image"].shape == (18, 24, 24, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].tolist() == [c for c in range(3) for _ in range(6)]
    grey = batch["image"][1]
    assert np.abs(grey[..., 0].astype(int) - grey[..., 2]).max() <= 2 and np.ptp(batch["image"][0]) > 10
    assert dataset.test.read(np.arange(6))["label"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("width, height", SIZES)
def test_the_centre_is_that_of_the_shorter_side(width, height, tmp_path):
    photograph(width, height).save(tmp_path / "a.jpg", quality=95)
    with PIL.Image.open(tmp_path / "a.jpg") as image:
        got = cropped(image, 28)
    whole = photograph(width, height)
    scale = 28 / CENTRE / min(width, height)  # resize the shorter side to 32, and take 28 in the middle
    whole = whole.resize((round(width * scale), round(height * scale)), PIL.Image.Resampling.BILINEAR)
    left, top = (whole.width - 28) / 2, (whole.height - 28) / 2
    expected = np.asarray(whole.crop((round(left), round(top), round(left) + 28, round(top) + 28)))
    assert np.abs(got.astype(int) - expected).mean() < 4


def test_random_parts_have_the_published_sizes_and_shapes_and_half_are_mirrored():
    areas, ratios = [], []
    for draw in range(500):
        rng = np.random.Generator(np.random.Philox(draw))
        left, top, right, bottom = photographs._part(200, 100, 0.08, rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        areas.append((right - left) * (bottom - top) / 20000)
        ratios.append((right - left) / (bottom - top))
    assert 0.075 < min(areas) < 0.12 and 0.5 < max(areas) <= 0.7  # of twice its height, no more fits in the ratio
    assert RATIO[0] * 0.95 < min(ratios) < 0.85 and 1.2 < max(ratios) < RATIO[1] * 1.05
    image = photograph(100, 100)
    slopes = [
        int(part[:, -1].sum()) - int(part[:, 0].sum()) for draw in range(200) for part in [cropped(image, 8, draw, 1)]
    ]
    assert 70 < sum(slope > 0 for slope in slopes) < 130


def test_a_draw_decides_the_part_and_another_draw_another(root):
    train = load("imagenet", root, image_size=16).train
    read = [train.read(np.array([0, 0, 7]), np.array(draws, np.uint32))["image"] for draws in ([5, 6, 5], [5, 6, 5])]
    np.testing.assert_array_equal(*read)
    assert not np.array_equal(read[0][0], read[0][1])
    np.testing.assert_array_equal(train.read(np.array([0]))["image"][0], train.read(np.array([0, 3]))["image"][0])


def test_of_sixteen_bits_of_grey_the_upper_eight_are_taken(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    PIL.Image.fromarray(np.tile(levels, (64, 1))).save(tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
        pixels = cropped(image, 64)
    assert (
        pixels[0, 0].max() < 40 and pixels[0, -1].min() > 215 and np.abs(np.diff(pixels[0, :, 0].astype(int))).max() < 8
    )


def test_every_trainer_asks_a_source_that_crops_for_its_draws(root):
    train = load("imagenet", root, image_size=8).train
    assert epochs_of(train, 4).drawn and epochs_of(train, 4).order(jax.random.key(0), 0).draw is not None
    assert not epochs_of(Arrays(np.zeros((8, 2, 2, 1), np.uint8), np.zeros(8)), 4).drawn
    rooms = [file.read_text() for file in Path(stepper.__file__).parents[1].rglob("*.py")]
    assert [text.count("Epochs(") for text in rooms if "stepper.Epochs(" in text] == []


def test_an_order_has_draws_of_its_own_for_every_epoch_and_example():
    epochs, key = Epochs(50, 16, drawn=True), jax.random.key(0)
    first, again, later = epochs.order(key, 0), epochs.order(key, 0), epochs.order(key, 1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.draw.dtype == np.uint32 and first.draw.shape == (4, 16)
    assert len(set(first.draw[first.weight > 0])) == 50 and not set(first.draw.ravel()) & set(later.draw.ravel())
    np.testing.assert_array_equal(first.index, Epochs(50, 16).order(key, 0).index)


class Reading:
    """What a worker gets pickled."""

    def __init__(self, source, order):
        self.source, self.order = source, order

    def __call__(self, at):
        return _read(self.source, self.order, at)


@pytest.mark.slow
def test_workers_give_the_batches_that_one_thread_gives_from_any_step_on(root):
    train, order = load("imagenet", root, image_size=16).train, Epochs(18, 4, drawn=True).order(jax.random.key(0), 0)
    one = list(batches_ahead(Reading(train, order), 0, 5, workers=0, ahead=2))
    assert len(one) == 5 and one[4]["weight"].tolist() == [1, 1, 0, 0]
    for start in (0, 2):
        several = list(batches_ahead(Reading(train, order), start, 5, workers=2, ahead=2))
        jax.tree.map(np.testing.assert_array_equal, several, one[start:])


@pytest.mark.slow
def test_what_a_worker_cannot_read_and_a_worker_that_dies_are_errors_that_say_what_to_do(root, tmp_path):
    order = Epochs(18, 2, drawn=True).order(jax.random.key(0), 0)
    copied = shutil.copytree(root / "imagenet", tmp_path / "imagenet")
    file = next((copied / "train" / WNIDS[2]).iterdir())
    file.write_bytes(b"no photograph")
    with pytest.raises(DataError, match=f"cannot read the image {file}"):
        list(batches_ahead(Reading(load("imagenet", copied, image_size=16).train, order), 0, 9, workers=2, ahead=1))
    batches = batches_ahead(Reading(load("imagenet", root, image_size=16).train, order), 0, 9, workers=1, ahead=1)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(DataError, match=r"a process that reads images failed .*same command again"):
        list(batches)


def asks_for_devices(number):
    """Whether a worker has made JAX look for devices: it would take memory of the GPU from the run."""
    return jax._src.xla_bridge.backends_are_initialized()


@pytest.mark.slow
def test_a_worker_takes_no_device():
    """As it did in grain issue 1199."""
    assert list(batches_ahead(asks_for_devices, 0, 2, workers=1, ahead=1)) == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_ends_after_an_error_while_batches_are_read_ahead(workers, tmp_path):
    """Threads that read ahead kept it alive in grain issue 1196."""
    (tmp_path / "reading.py").write_text(READING)
    program = [sys.executable, str(tmp_path / "reading.py"), str(workers)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError: in training" in done.stderr, done.stderr


def test_without_shared_memory_workers_are_refused_in_one_paragraph(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("Semaphore", "BoundedSemaphore", "Lock", "RLock"):
        monkeypatch.setattr(multiprocessing.context.BaseContext, name, full)
    with pytest.raises(DataError, match=r"the shared memory has no room for the locks of --workers 2 .*/dev/shm"):
        next(batches_ahead(asks_for_devices, 0, 2, workers=2, ahead=1))


READING = """
import sys
from experiments.data.stream import batches_ahead

def number(at):
    return at

if __name__ == "__main__":
    batches = batches_ahead(number, 0, 10**6, workers=int(sys.argv[1]), ahead=4)
    assert next(batches) == 0
    raise RuntimeError("in training")
"""


def test_photographs_that_are_held_out_are_in_no_batch_of_training(root):
    """They leaked where a shuffled set was cut, in grain issue 1200."""
    dataset = load("imagenet", root, image_size=8)
    rest, held_out = hold_out(dataset, 5)
    names = set(rest.train.stored.names.tolist()), set(held_out.stored.names.tolist())
    assert len(held_out) == 5 and not names[0] & names[1]
    assert names[0] | names[1] == set(dataset.train.stored.names.tolist())
    orders = [Epochs(len(rest.train), 4, drawn=True).order(jax.random.key(0), epoch) for epoch in range(3)]
    for order in orders:
        assert set(rest.train.stored.names[np.unique(order.index)].tolist()) == names[0]


# A run.


def settings(root, workdir, **more):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    small = ["--model=cnn", "--width=4", "--depth=1", "--image-size=12", "--batch-size=4", "--epochs=2"]
    small += ["--warmup-epochs=0", f"--data-dir={root}", f"--workdir={workdir}"]
    return parser(command.Config, command.defaults)("prog", [*small, *flags])


@pytest.mark.slow
def test_a_run_that_is_stopped_within_an_epoch_ends_with_the_bits_of_one_that_is_not(root, tmp_path):
    whole = run(settings(root, tmp_path / "whole"), "imagenet")
    for _ in range(2):
        with signals.stopped_once_training(), pytest.raises(Interrupted, match="saved at step"):
            run(settings(root, tmp_path / "parts", checkpoint_every=1), "imagenet")
    resumed = run(settings(root, tmp_path / "parts", checkpoint_every=1), "imagenet")
    assert whole["test_loss"] == resumed["test_loss"]
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for one, other in zip(*records, strict=True):
        assert all(one[name] == other[name] for name in one if name not in ("train_seconds", "images_per_second"))


@pytest.mark.slow
def test_the_file_of_a_run_is_evaluated_to_its_figures_at_the_size_that_it_was_trained_at(root, tmp_path, capsys):
    summary = run(settings(root, tmp_path / "run", epochs=1), "imagenet")
    assert summary["dataset"] == f"photographs-{load('imagenet', root).fingerprint}"
    flags = ["--data-dir", str(root), "--evaluate", str(tmp_path / "run" / "subnetwork.safetensors")]
    figures = run(parser(command.Config, command.defaults)("prog", flags), "imagenet")
    assert figures["test_loss"] == summary["test_loss"] and "the same accuracy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
def test_a_signal_to_all_processes_of_a_run_with_workers_saves_it(root, tmp_path):
    flags = ["--model=cnn", "--width=4", "--depth=1", "--image-size=64", "--batch-size=2", "--epochs=400"]
    flags += ["--warmup-epochs=0", f"--data-dir={root}", f"--workdir={tmp_path / 'run'}", "--workers=2"]
    program = [sys.executable, "-m", "experiments.imagenet", *flags]
    process = subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert any(line.startswith("epoch   2/") for line in iter(process.stdout.readline, ""))
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and "saved at step" in said and "Traceback" not in said, said


def test_workers_are_refused_where_nothing_is_read_from_disk():
    with pytest.raises(UserError, match="--workers read images that stay on disk"):
        parser(command.Config, command.defaults)("prog", ["--workers", "2", "--dataset", "mnist-5k", "--model", "mlp"])
    both = ["--workers", "2", "--parallel", "pmap"]
    assert parser(command.Config, command.defaults)("prog", both).machine.workers == 2


def test_the_published_settings_are_those_of_the_preset():
    config = parser(command.Config, command.defaults)("prog", [])
    optim = config.optim
    assert (config.model.model, config.masks.density, config.epochs, optim.batch_size) == ("resnet50", 0.3, 100, 256)
    assert (optim.learning_rate, optim.warmup_epochs, optim.momentum) == (0.256, 5, 0.875)
    assert (optim.label_smoothing, optim.weight_decay) == (0.1, 3.0517578125e-5)
    assert not config.model.affine and config.init.init == "signed-constant"
    config = parser(command.Config, command.defaults)("prog", ["--preset", "random-pruning", "--method", "random"])
    assert (config.masks.distribution, config.optim.drop_at, config.optim.batch_size) == ("erk+", (0.3, 0.6, 0.9), 768)
    with pytest.raises(UserError, match="no --preset random-pruning for --method edge-popup"):
        parser(command.Config, command.defaults)("prog", ["--preset", "random-pruning"])
    assert changed(config, workers=3).machine.workers == 3


@pytest.mark.slow
def test_reading_is_measured_by_cores_and_workers_and_leaves_no_memory(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reading, "EXAMPLES", 2000)
    result = benchmark.main(benchmark.Config(reading=str(root), rounds=2, output=str(tmp_path / "reading.json")))
    units = [line["unit"] for line in result["rows"]]
    assert units == ["images/s"] * 3 + ["MB"] and all(line["median"] > 0 for line in result["rows"][:3])
    assert result["rows"][3]["median"] < 100 and "one core" in capsys.readouterr().out


# Bad input.


def test_a_corrupt_file_is_named_and_by_flag_another_takes_its_place(copied):
    file = copied / "train" / WNIDS[0] / f"{WNIDS[0]}_2.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    train = load("imagenet", copied, image_size=16).train
    with pytest.raises(DataError, match=f"cannot read the image {file}"):
        train.read(np.array([2]), np.array([1], np.uint32))
    train = load("imagenet", copied, image_size=16, skip_corrupt=True).train
    with pytest.warns(UserWarning, match=re.escape(str(file)) + r".*another takes its place \(1 so far\)"):
        batch = train.read(np.array([2, 3]), np.array([1, 1], np.uint32))
    np.testing.assert_array_equal(batch["image"][0], batch["image"][1])
    with pytest.raises(DataError):  # an evaluation counts each once
        train.read(np.array([2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        train.read(np.array([2]), np.array([1], np.uint32))


def flat(copied, truth, ids=((1, WNIDS[1]), (2, WNIDS[2]), (3, WNIDS[0]))):
    """val without class folders, and the development kit that tells the classes."""
    for number, file in enumerate(sorted((copied / "val").glob("*/*"))):
        file.rename(copied / "val" / f"ILSVRC2012_val_{number:08}.JPEG")
    for folder in (copied / "val").glob("n*"):
        folder.rmdir()
    kit = copied / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.array(list(ids), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    scipy.io.savemat(kit / CLASSES, {"synsets": synsets})
    (kit / TRUTH).write_text("".join(f"{number}\n" for number in truth))
    return kit


def test_a_flat_val_has_the_classes_of_the_development_kit(copied):
    flat(copied, [3, 3, 1, 1, 2, 2])
    test = load("imagenet", copied, image_size=16).test
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "damage, says",
    (
        (lambda base: shutil.rmtree(base / "val" / WNIDS[0]), None),  # fewer classes are fine
        (lambda base: shutil.rmtree(base / "train" / WNIDS[0]), f"has classes that .*train lacks: {WNIDS[0]}"),
        (lambda base: shutil.rmtree(base / "val"), "no photographs in .*val"),
        (lambda base: [f.unlink() for f in (base / "train" / WNIDS[1]).iterdir()], f"{WNIDS[1]} is empty: put its"),
        (lambda base: flat(base, [3, 3, 1, 1, 2]), "has 6 photographs, and .* tells the classes of 5"),
        (lambda base: flat(base, [3, 3, 1, 1, 2, 9]), "cannot read the classes in .*KeyError"),
        (lambda base: shutil.rmtree(flat(base, [])), "no class folders, and .* are not in .*devkit.*tar -xzf"),
        (lambda base: (base / "val" / "a.JPEG").touch(), "a.JPEG lies beside class folders"),
        (lambda base: (base / "train" / "n01.tar").touch(), r"not unpacked \(n01.tar, ...\): cd .* for t in \*.tar"),
    ),
)
def test_what_is_missing_or_does_not_fit_is_named_with_what_to_do(copied, damage, says):
    damage(copied)
    if says is None:
        assert len(load("imagenet", copied, image_size=16).test) == 4
        return
    with pytest.raises(DataError, match=says):
        load("imagenet", copied, image_size=16)


def test_val_alone_is_evaluated_and_what_training_lacks_is_told(copied):
    both = load("imagenet", copied, image_size=16)
    shutil.rmtree(copied / "train")
    alone = load("imagenet", copied, image_size=16)
    assert (len(alone.train), alone.classes, alone.class_names) == (0, both.classes, both.class_names)
    np.testing.assert_array_equal(alone.test.labels, both.test.labels)
    everything = np.arange(len(both.test))
    np.testing.assert_array_equal(alone.test.read(everything)["image"], both.test.read(everything)["image"])
    with pytest.raises(DataError, match=r"no photographs in .*train: put them in .*never downloaded"):
        splits(command.Config().data, alone)
    (copied / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(DataError, match=r"img_train.tar is not unpacked: cd .*mkdir -p train && tar -xf"):
        splits(command.Config().data, load("imagenet", copied, image_size=16))


def test_every_method_has_a_recipe_and_the_commands_of_the_pages_are_understood():
    for method, entry in METHODS.items():
        config = parser(command.Config, command.defaults)("prog", ["--method", method])
        assert (config.epochs, config.optim.batch_size, config.masks.method) == (100, 256, method)
        assert config.model.affine is (entry.learns == "weights")
    understood = 0
    for page in ("running.md", "files.md", "scaling.md"):
        text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
        for name, config, defaults in (
            ("imagenet", command.Config, command.defaults),
            ("import_weights", import_weights.Config, None),
        ):
            for line in re.findall(rf"^python -m experiments\.{name} (.+)$", text, re.MULTILINE):
                parse = parser(config, defaults) if defaults else parser(config)
                parse("prog", shlex.split(line, comments=True))
                understood += 1
    assert understood > 6


def test_a_sample_of_photographs_is_no_larger_than_a_batch_can_be(monkeypatch):
    seen = {}

    def class_sample(source, classes, key, per_class, most):
        seen.update(per_class=per_class, most=most)

    monkeypatch.setattr(parts, "class_sample", class_sample)
    for classes, side, expected in ((10, 28, 50), (100, 32, 50), (1000, 32, 5), (1000, 224, 1)):
        data = blank_imagenet(side, classes)
        parts.Parts(command.Config(), data, None, Placement()).sample(50)
        assert seen["per_class"] == expected and seen["most"] % 2 == 0
    assert seen["most"] == 102


def test_a_sample_with_a_limit_has_classes_at_even_distances():
    source = Arrays(np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 20)
    key = jax.random.key(0)
    assert class_sample(source, 20, key, 1, 5)["label"].tolist() == [0, 4, 8, 12, 16]
    assert class_sample(source, 20, key, 2, 40)["label"].tolist() == sorted([*range(20)] * 2)
    assert class_sample(source, 20, key, 1)["label"].tolist() == [*range(20)]
