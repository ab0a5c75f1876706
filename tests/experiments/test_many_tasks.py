"""Many tasks in one network: each task's mask is its own, a run resumes with the same bits, a task is inferred."""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import supermask_jax as sm
from experiments import many_tasks
from experiments.config.flags import parser
from experiments.config.settings import changed, flat
from experiments.config.tasks import CHANGE_NO_MASK, RECIPES, named, of_masks
from experiments.data.source import arrays_dataset
from experiments.plots import style
from experiments.plots import tasks as plots
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted
from experiments.tasks import stored, suite, superposition
from experiments.tasks.permuted import for_tasks, permutation, permuted
from experiments.tasks.superposition import Superposition
from experiments.tasks.trainer import Trainer
from experiments.training import stepper
from experiments.training.evaluation import Split
from supermask_jax.trees import by_path

GOLDEN = Path(__file__).parents[1] / "golden" / "i_threshold.npz"
SMALL = {"width": 32, "depth": 1, "outputs": 6, "epochs": 4, "inferred_images": 60, "dataset": "mnist-5k"}
SMALL |= {"batch_size": 16, "learning_rate": 0.3}
LAYERS = ("first", "second", "third")


@functools.cache
def blobs():
    """960 training and 120 test images in three classes, which are bright at other pixels."""
    labels = np.arange(1080, dtype=np.int32) % 3
    images = np.random.default_rng(0).integers(0, 90, (1080, 6, 6, 1)).astype(np.uint8)
    images.reshape(1080, -1)[labels[:, None] == np.arange(36) // 12] += 120
    arrays = images[:960], labels[:960], images[960:], labels[960:]
    return arrays_dataset("mnist-5k", arrays, "made by hand", classes=3)


@pytest.fixture(autouse=True, scope="module")
def small_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.images, "open_data", lambda data: blobs())
        patch.setattr(style, "DOTS_PER_INCH", 30)
        yield


def small(folder, **changes):
    return changed(many_tasks.Config(), **SMALL | {"workdir": str(folder)} | changes)


def trainer_of(config, **options):
    dataset = blobs()
    return Trainer(named(config, dataset.name), dataset, Split("test", dataset.test), **options)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(directory, what main returned) of a run of three tasks."""
    folder = tmp_path_factory.mktemp("three")
    return folder, many_tasks.main(small(folder, tasks=3))


def files_of(folder, *endings):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.suffix in endings}


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith("_seconds") and k != "workdir"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


# The tasks.


def test_a_permutation_is_a_function_of_seed_and_task_and_task_0_is_the_identity():
    orders = {(seed, task): permutation(jax.random.key(seed), task, 784) for seed in (0, 1) for task in (0, 1, 2, 99)}
    for (seed, task), order in orders.items():
        assert sorted(order) == list(range(784)) and order.dtype == np.int32
        assert (list(order) == list(range(784))) == (task == 0)
        np.testing.assert_array_equal(order, permutation(jax.random.key(seed), task, 784))
    assert len({order.tobytes() for order in orders.values()}) == 2 * 4 - 1  # task 0 is the same with every seed
    # The files of a run do not hold the permutations: another version of this program must draw the same.
    assert orders[0, 1][:6].tolist() == PINNED


PINNED = [317, 608, 578, 517, 270, 640]


def test_the_network_of_a_task_reads_the_pixels_in_the_order_that_permuted_images_have():
    trainer, order = trainer_of(small("x")), permutation(jax.random.key(3), 5, 36)
    images = blobs().test.images[:4]
    params = trainer.weights
    theirs = for_tasks(trainer.network).logits(params, jnp.asarray(order), jnp.asarray(images, jnp.float32))
    ours = trainer.network.logits(params, None, jnp.asarray(permuted(images, order), jnp.float32))
    np.testing.assert_array_equal(ours, theirs)
    plain = trainer.network.logits(params, None, jnp.asarray(images, jnp.float32))
    assert not np.allclose(ours, plain)


def test_all_tasks_share_one_compiled_step():
    """Two functions are compiled, of many steps and of one, and none for a further task."""
    trainer = trainer_of(small("x", epochs=1))
    trainer.train(0)
    compiled, seconds = dict(trainer._stepper._compiled), trainer.compile_seconds
    masks = [trainer.train(task)[0] for task in (1, 2)]
    assert trainer._stepper._compiled == compiled and trainer.compile_seconds == seconds > 0
    assert len(compiled) == 2 and isinstance(trainer._stepper, stepper.OnDevice)
    assert not np.array_equal(*(mask["Dense_0"]["kernel"] for mask in masks))


@pytest.mark.parametrize("method", ["threshold", pytest.param("edge-popup", marks=pytest.mark.slow)])
def test_weights_are_never_trained_and_masks_are_zero_or_one(method):
    config = small("x", method=method, density=0.3, epochs=1)
    trainer = trainer_of(config)
    before = jax.tree.map(np.array, trainer.weights)
    masks, record = trainer.train(1)
    jax.tree.map(np.testing.assert_array_equal, trainer.weights, before)
    assert all(set(np.unique(mask)) == {0, 1} for mask in by_path(masks).values())
    kept = sum(sm.keep_count(0.3, mask.size) for mask in by_path(masks).values())
    size = sum(mask.size for mask in by_path(masks).values())
    assert (record["density"] == kept / size) == (method == "edge-popup")
    again, same = trainer_of(config).train(1)
    jax.tree.map(np.testing.assert_array_equal, masks, again)
    assert without_times(record) == without_times(same)


# The files.


@pytest.mark.slow
def test_a_further_task_changes_no_earlier_mask_and_gives_the_bits_of_a_run_that_had_it_from_the_start(three, tmp_path):
    folder, summary = three
    many_tasks.main(small(tmp_path, tasks=2))
    two = {name: content for name, content in files_of(tmp_path / "tasks", ".npz", ".json").items() if "task-" in name}
    assert len(two) == 4
    result = many_tasks.main(small(tmp_path, tasks=3))
    after = files_of(tmp_path / "tasks", ".npz", ".json")
    assert {name: after[name] for name in two} == two
    assert files_of(tmp_path, ".npz", ".safetensors") == files_of(folder, ".npz", ".safetensors")
    assert without_times(result) == without_times(summary)


def test_a_run_that_is_stopped_in_a_task_resumes_with_that_task_and_ends_with_the_same_bits(
    three, tmp_path, monkeypatch
):
    folder, summary = three
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="in task 1; the tasks before it are saved"):
        patch.setattr(Trainer, "train", stopped_in(1, Trainer.train))
        many_tasks.main(small(tmp_path, tasks=3))
    assert {file.stem for file in (tmp_path / "tasks").iterdir()} == {"task-000"}
    (tmp_path / "tasks" / "task-001.npz").write_bytes(b"half")  # as a killed process may leave it, without its record
    assert without_times(many_tasks.main(small(tmp_path, tasks=3))) == without_times(summary)
    assert files_of(tmp_path, ".npz", ".safetensors") == files_of(folder, ".npz", ".safetensors")


def test_a_run_that_is_stopped_while_tasks_are_inferred_resumes_with_what_is_not_measured_yet(
    three, tmp_path, monkeypatch
):
    folder, summary = three
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    growth = json.loads((tmp_path / "tasks" / "growth.json").read_text())
    (tmp_path / "tasks" / "growth.json").write_text(json.dumps(growth | {"rows": growth["rows"][:2]}))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="all tasks are saved"):
        patch.setattr(suite, "stopping", lambda: contextlib.nullcontext(lambda: True))
        many_tasks.main(small(tmp_path, tasks=3))
    measured, measure = [], suite.Inference.measure

    def noted(self, packed):
        measured.append(len(packed))
        return measure(self, packed)

    monkeypatch.setattr(suite.Inference, "measure", noted)
    assert without_times(many_tasks.main(small(tmp_path, tasks=3))) == without_times(summary)
    assert measured == [3]
    assert files_of(tmp_path, ".npz", ".safetensors") == files_of(folder, ".npz", ".safetensors")


def stopped_in(task, train):
    def trained(self, number, *rest):
        self._stop_requested = lambda: number == task
        return train(self, number, *rest)

    return trained


def test_what_changes_no_mask_may_change_and_is_measured_again_without_training(three, tmp_path, monkeypatch):
    folder, summary = three
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(Trainer, "train", None)
    assert set(CHANGE_NO_MASK) < set(flat(many_tasks.Config()))
    same = many_tasks.main(small(tmp_path, tasks=3))
    assert without_times(same) == without_times(summary)
    fewer = many_tasks.main(small(tmp_path, tasks=2, inferred_images=50, temperature=1.0))
    assert fewer["tasks"] == summary["tasks"][:2] and fewer["growth"][-1]["tasks"] == 2
    assert json.loads((tmp_path / "summary.json").read_text()) == fewer


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 0.2}, {"width": 31}, {"method": "edge-popup"}])
def test_other_masks_are_refused_in_the_same_directory(three, other):
    folder, _ = three
    with pytest.raises(UserError, match=f"other settings: .*{next(iter(other))}"):
        many_tasks.main(small(folder, tasks=3, **other))


def test_a_directory_is_named_after_what_bears_on_the_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(**changes):
        return suite.open_workdir(named(small("x", workdir=None, **changes), "mnist-5k"), blobs()).path

    assert name() == name(tasks=9) == name(temperature=2.0) == name(inferred_images=9)
    assert name().parts[:2] == ("runs", "many_tasks") and name().name.startswith("threshold-mnist-5k-s0-")
    assert len({name(), name(seed=1), name(epochs=2), name(outputs=7), name(weight_decay=1e-3)}) == 5
    assert name(density=0.3) == name()  # threshold has none
    assert name(density=0.3, method="edge-popup") != name(method="edge-popup")


@pytest.mark.parametrize("damage", ["shortened", "other network"])
def test_a_damaged_task_is_named_in_one_paragraph(three, tmp_path, damage):
    shutil.copytree(three[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    file = tmp_path / "tasks" / "task-001.npz"
    if damage == "shortened":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        np.savez(file, masks=np.zeros(7, np.uint8))
    with pytest.raises(UserError, match=r"task-001.npz.* away") as refused:
        many_tasks.main(small(tmp_path, tasks=3))
    assert "\n" not in str(refused.value)


def test_the_file_holds_the_masks_of_all_tasks_and_the_weights_come_back_from_the_seed(three):
    folder, summary = three
    weights, masks, state, about = sm.load_subnetwork(folder / "subnetwork.safetensors")
    trainer = trainer_of(small(folder))
    jax.tree.map(np.testing.assert_array_equal, weights, trainer.weights)
    assert list(masks) == ["task-000", "task-001", "task-002"] and state is None and about["outputs"] == 6
    for task, (name, of_task) in enumerate(masks.items()):
        packed, record = stored.load_task(folder, task, weights)
        assert record == summary["tasks"][task] and name == stored.name_of(task)
        np.testing.assert_array_equal(superposition.pack(of_task), packed)
        images = permuted(blobs().test.images, trainer.permutation(task))
        logits = trainer.logits(sm.subnetwork(sm.identity, sm.Subnet(weights, of_task)), jnp.asarray(images))
        accuracy = float(jnp.mean(jnp.argmax(logits, -1) == blobs().test.labels))
        assert accuracy == pytest.approx(record["test_accuracy"], abs=1e-6)


def test_a_further_task_costs_one_bit_a_weight(three):
    _, summary = three
    assert summary["weights"] == 36 * 32 + 32 * 6 and summary["dense_bytes"] == 4 * summary["weights"]
    assert [row["tasks"] for row in summary["growth"]] == [1, 2, 3]
    assert summary["file_bytes"] == summary["growth"][-1]["file_bytes"]
    payload = summary["weights"] / 8
    assert payload <= summary["bytes_per_task"] < payload + 700  # names, codes and checksums


# The inferred task.


@functools.cache
def golden():
    with np.load(GOLDEN) as arrays:
        loaded = dict(arrays)
    return loaded, json.loads(str(loaded.pop("meta")))


def golden_superposition():
    """(superposition, packed masks) of the published four tasks, whose weights are stored as [out, in]."""
    arrays, meta = golden()
    weights = {name: jnp.asarray(arrays[f"sup_w{i}"].T) for i, name in enumerate(LAYERS)}
    masks = [{n: arrays[f"sup_masks{i}"][k].T for i, n in enumerate(LAYERS)} for k in range(meta["K"])]
    return Superposition(mlp, weights), np.stack([superposition.pack(mask) for mask in masks])


def mlp(params, images):
    hidden = jax.nn.relu(images @ params["first"])
    return jax.nn.relu(hidden @ params["second"]) @ params["third"] if "third" in params else hidden @ params["second"]


def golden_batches():
    arrays, _ = golden()
    ends = np.cumsum(arrays["sup_rows"])
    return [arrays["sup_x"][end - rows : end] for end, rows in zip(ends, arrays["sup_rows"], strict=True)]


def test_entropies_gradients_and_inferred_tasks_equal_supsup():
    arrays, meta = golden()
    network, packed = golden_superposition()
    equal = np.full((1, meta["K"]), 1 / meta["K"], np.float32)
    scale = np.abs(arrays["sup_grad_alpha"]).max()
    for task, batch in enumerate(golden_batches()):
        value, gradient = network.entropies(batch[None], equal, packed)
        np.testing.assert_allclose(value, arrays["sup_entropy"][task], rtol=0, atol=1e-5)
        np.testing.assert_allclose(gradient[0], arrays["sup_grad_alpha"][task], rtol=0, atol=2e-5 * scale)
        assert superposition.infer(network, batch[None], packed)[0] == arrays["sup_inferred"][task]
    assert {len(batch) for batch in golden_batches()} >= {1}


def test_coefficients_of_zero_have_their_true_gradient_which_supsup_drops():
    arrays, _ = golden()
    network, packed = golden_superposition()
    alphas, batch = arrays["sup2_alphas"][None], golden_batches()[0][None]
    value, gradient = network.entropies(batch, alphas, packed)
    true, dropped = arrays["sup2_grad_alpha_true"], alphas[0] == 0
    np.testing.assert_allclose(value[0], arrays["sup2_entropy"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradient[0], true, rtol=0, atol=2e-5 * np.abs(true).max())
    assert dropped.sum() == 2 and (true[dropped] != 0).all() and (arrays["sup2_grad_alpha_code"][dropped] == 0).all()


def test_the_network_of_one_task_equals_supsup():
    arrays, meta = golden()
    network, packed = golden_superposition()
    batch = golden_batches()[0]
    for task in range(meta["K"]):
        theirs = arrays[f"sup_task{task}_logits"]
        ours = network.logits(batch[None], np.array([task]), packed)[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def random_tasks(tasks, seed=0):
    """(weights, masks [tasks, ...] by layer, packed) of a network of two layers."""
    rng = np.random.default_rng(seed)
    weights = {"first": jnp.asarray(rng.normal(size=(7, 9)), jnp.float32), "second": jnp.ones((9, 5)) / 3}
    masks = {name: rng.integers(0, 2, (tasks, *leaf.shape)).astype(np.float32) for name, leaf in weights.items()}
    packed = [superposition.pack({name: mask[k] for name, mask in masks.items()}) for k in range(tasks)]
    return weights, masks, np.stack(packed)


def slow_gradients(weights, masks, images, alphas, temperature):
    """dH/dalpha by differentiating the superposition as it is written, one group after the other."""

    def entropy(alpha, group):
        params = {name: leaf * jnp.tensordot(alpha, masks[name], 1) for name, leaf in weights.items()}
        p = jax.nn.softmax(mlp(params, group) / temperature)
        return -jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))

    gradient = jax.jit(jax.grad(entropy))
    return np.stack([gradient(jnp.asarray(alpha), group) for alpha, group in zip(alphas, images, strict=True)])


def test_gradients_are_those_of_the_plain_definition_for_more_masks_and_images_than_are_computed_at_once():
    tasks, groups = superposition.MASKS_AT_ONCE + 3, superposition.GROUPS_AT_ONCE + 2
    weights, masks, packed = random_tasks(tasks)
    rng = np.random.default_rng(1)
    images, alphas = (rng.random(shape).astype(np.float32) for shape in ((groups, 1, 7), (groups, tasks)))
    network = Superposition(mlp, weights, temperature=0.3)
    theirs = slow_gradients(weights, masks, images, alphas / tasks, 0.3)
    ours = network.entropies(images, alphas / tasks, packed)[1]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    compiled = network._add._cache_size(), network._slopes._cache_size()
    network.entropies(images[:4], alphas[:4, :9], packed[:9])
    assert (network._add._cache_size(), network._slopes._cache_size()) == compiled  # for no other number of tasks


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_one_gradient_takes_the_best_task_and_binary_search_the_better_half_each_time(tasks):
    weights, masks, packed = random_tasks(tasks, seed=2)
    images = np.random.default_rng(3).random((6, 1, 7)).astype(np.float32)
    one_shot, found = superposition.infer(Superposition(mlp, weights), images, packed)
    equal = np.full((6, tasks), 1 / tasks, np.float32)
    np.testing.assert_array_equal(one_shot, slow_gradients(weights, masks, images, equal, 1.0).argmin(axis=1))
    for group, inferred in zip(images, found, strict=True):
        left = list(range(tasks))
        while len(left) > 1:
            alphas = np.isin(np.arange(tasks), left).astype(np.float32) / len(left)
            gradient = slow_gradients(weights, masks, group[None], alphas[None], 1.0)[0]
            left = sorted(left, key=lambda task: gradient[task])[: (len(left) + 1) // 2]
        assert [inferred] == left


def test_packing_loses_nothing_and_leaves_what_is_not_prunable():
    weights = {"a": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "b": {"kernel": jnp.ones((5, 2))}}
    rng = np.random.default_rng(0)
    masks = {"a": {"kernel": rng.integers(0, 2, (3, 5)), "bias": None}, "b": {"kernel": rng.integers(0, 2, (5, 2))}}
    packed = superposition.pack(masks)
    assert packed.dtype == np.uint8 and packed.shape == (superposition.packed_bytes(weights),) == (4,)
    back = superposition.unpack(packed, weights)
    assert back["a"]["bias"] is None
    for path, mask in by_path(masks).items():
        np.testing.assert_array_equal(by_path(back)[path], mask)


def test_the_task_of_one_image_is_found_on_a_toy(three):
    _, summary = three
    for row in summary["growth"][1:]:
        assert row["one_shot"] > 0.9 and row["binary"] > 0.9, row
        assert row["told_accuracy"] > 0.9 and row["one_shot_accuracy"] > 0.85
    assert "one_shot" not in summary["growth"][0]  # there is nothing to infer among one task
    assert min(record["test_accuracy"] for record in summary["tasks"]) > 0.9
    assert summary["mean_accuracy"] == np.mean([record["test_accuracy"] for record in summary["tasks"]])


@pytest.mark.slow
def test_with_held_out_images_the_test_images_have_no_influence(tmp_path, monkeypatch):
    options = {"tasks": 2, "validation": 90, "epochs": 1}
    summary = many_tasks.main(small(tmp_path / "a", **options))
    assert summary["split"] == "validation" and summary["images"] == 90
    assert all("validation_accuracy" in record and "test_accuracy" not in record for record in summary["tasks"])
    other = dataclasses.replace(blobs(), test=blobs().train.take(np.arange(70, 77)))
    monkeypatch.setattr(suite.images, "open_data", lambda data: other)
    assert without_times(many_tasks.main(small(tmp_path / "b", **options))) == without_times(summary)


# The command.


def parsed(*flags):
    return parser(many_tasks.Config, many_tasks.recipe)(many_tasks.PROG, list(flags))


def test_the_defaults_are_the_published_network_and_the_best_recipe_and_presets_change_the_recipe():
    config = parsed()
    assert config == many_tasks.Config()
    assert (config.width, config.depth, config.outputs, config.epochs, config.tasks) == (300, 2, 100, 1, 5)
    for (preset, method), settings in RECIPES.items():
        values = flat(parsed("--preset", preset, "--method", method))
        assert {name: values[name] for name in settings} == settings
    published = parsed("--preset", "published")
    assert (published.optim.optimizer, published.optim.learning_rate, published.optim.batch_size) == (
        *("rmsprop", 1e-4, 128),
    )
    assert "tasks" not in of_masks(config) and "learning_rate" in of_masks(config)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "0"], "--tasks must be in [1, 10,000]; got 0."),
        (["--method", "bernoulli"], "There are: threshold, edge-popup."),
        (["--density", "0"], "--density must be the fraction kept, in (0, 1]; got 0.0."),
        (["--width", "0"], "--width must be in [1, 65,536]"),
        (["--depth", "0"], "--depth must be in [1, 1,000]"),
        (["--outputs", "1"], "--outputs must be in [2, 10,000]"),
        (["--epochs", "0"], "--epochs must be in [1, "),
        (["--inferred-images", "0"], "--inferred-images must be in [1, 1,000,000]"),
        (["--temperature", "0"], "--temperature must be above 0, at most 3e+38; got 0.0."),
        (["--seed", "-1"], "--seed must be a whole number in [0, 2**32)"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--validation", "-1"], "--validation must be 0 or more"),
        (["--preset", "published", "--method", "edge-popup"], "no --preset published for --method edge-popup"),
        (["--preset", "published", "--momentum", "0.5"], "nothing reads --momentum here: it goes with --optimizer sgd"),
        (["--stream"], "nothing reads --stream here"),
    ],
)
def test_bad_flags_are_refused_in_one_paragraph(flags, says):
    with pytest.raises(UserError) as refused:
        parsed(*flags)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outputs": 2}, "--outputs 2: mnist-5k has 3 classes."),
        ({"inferred_images": 121}, "--inferred-images 121: there are 120 test images."),
        ({"validation": 50}, "--inferred-images 60: there are 50 validation images."),
        ({"learning_rate": 3e38}, "the loss or the scores of task 0 are not finite at step "),
    ],
)
def test_settings_that_do_not_fit_the_images_or_diverge_are_refused_in_one_paragraph(changes, says, tmp_path):
    with pytest.raises(UserError) as refused:
        many_tasks.main(small(tmp_path, **changes))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_run_says_what_it_does_and_leaves_a_picture(three, tmp_path, capsys):
    folder, _ = three
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tasks" / "task-002.npz").unlink()
    (tmp_path / "tasks" / "task-002.json").unlink()
    (tmp_path / "summary.json").unlink()
    many_tasks.main(small(tmp_path, tasks=3))
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 2 and "task 2" in shown and "min left" in shown
    assert "the task of one image is right in" in shown and "file of all masks" in shown
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {".lock", "config.json", "many_tasks.png", "subnetwork.safetensors", "summary.json", "tasks"}
    with PIL.Image.open(tmp_path / "many_tasks.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 80 and pixels.std() > 5


def test_the_picture_of_one_task_has_no_inference_and_of_many_has_every_point(three):
    _, summary = three
    one = summary | {"tasks": summary["tasks"][:1], "growth": summary["growth"][:1]}
    assert len(plots.many_tasks(one).axes) == 2
    accuracy, sizes, errors = plots.many_tasks(summary).axes
    assert [len(line.get_xdata()) for line in sizes.lines] == [3, 3]
    np.testing.assert_allclose(
        accuracy.lines[0].get_ydata(), [100 * record["test_accuracy"] for record in summary["tasks"]]
    )
    for line, name in zip(errors.lines[:2], ("one_shot", "binary"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), [100 * (1 - row[name]) for row in summary["growth"][1:]])


def test_sizes_and_inference_are_measured_at_one_two_five_ten_and_at_the_end():
    assert suite.counts(1) == [1] and suite.counts(2) == [1, 2] and suite.counts(7) == [1, 2, 5, 7]
    assert suite.counts(100) == [1, 2, 5, 10, 20, 50, 100] and suite.counts(250)[-2:] == [200, 250]
