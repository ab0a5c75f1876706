import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supermask_jax as sm
from experiments.data import load as data
from experiments.mnist import Config, defaults
from experiments.run.errors import UserError
from experiments.run.files import write_text
from experiments.run.workdir import Workdir, default_path
from experiments.training import fit as runner
from experiments.training import methods, recipe
from experiments.training import stepper as driver
from experiments.training.evaluation import Evaluator, Held

SETTINGS = dataclasses.replace(Config(), model="lenet-300-100", density=0.3, dataset="mnist-5k")


@pytest.fixture(scope="module")
def dataset():
    return data.load("mnist-5k")


def task_of(dataset):
    model = recipe.build_model(SETTINGS, dataset.classes)
    weights = recipe.draw_weights(SETTINGS, model, (28, 28, 1), jax.random.key(0))
    return model, methods.METHODS["edge-popup"](methods.Start(SETTINGS, weights, jax.random.key(1), None, model))


# The order of the data.


def test_an_epoch_shows_every_image_once_and_pads_with_weight_zero():
    indices, weights = driver.epoch_order(jax.random.key(0), 0, examples=103, batch_size=10)
    assert indices.shape == weights.shape == (11, 10)
    assert sorted(indices[weights == 1]) == list(range(103))
    assert weights[-1].tolist() == [1] * 3 + [0] * 7


def test_the_order_is_a_function_of_key_and_epoch_alone():
    first = driver.epoch_order(jax.random.key(0), 3, 103, 10)[0]
    np.testing.assert_array_equal(first, driver.epoch_order(jax.random.key(0), 3, 103, 10)[0])
    assert not np.array_equal(first, driver.epoch_order(jax.random.key(0), 4, 103, 10)[0])
    assert not np.array_equal(first, driver.epoch_order(jax.random.key(1), 3, 103, 10)[0])


# The driver.


@pytest.mark.parametrize("steps_per_call", [4, 25])
def test_many_steps_per_call_do_what_single_calls_do(dataset, monkeypatch, steps_per_call):
    model, task = task_of(dataset)
    tx = optax.sgd(0.1, 0.9)
    order = driver.epoch_order(jax.random.key(0), 0, len(dataset.train_labels), 64)

    def after(steps):
        monkeypatch.setitem(driver.STEPS_PER_CALL, "cpu", steps)
        step = sm.make_train_step(task.mask_fn, recipe.make_loss(model, 0.13, 0.31), tx, learns="scores")
        advance = driver.Driver(step, "scores", dataset)
        subnet = jax.tree.map(jnp.copy, task.subnet)
        state = sm.init_state(subnet, tx, jax.random.key(2), learns="scores")
        state, totals, _ = advance(state, driver.zero_totals(), order, 0, 10)
        return state, totals, advance

    (one, totals_one, _), (many, totals_many, advance) = after(1), after(steps_per_call)
    assert int(one.step) == int(many.step) == 10
    assert len(advance._compiled) == (2 if steps_per_call == 4 else 1)
    assert totals_one["count"] == totals_many["count"] == 640
    np.testing.assert_allclose(totals_one["loss"], totals_many["loss"], rtol=1e-5)
    masks = [task.mask_fn(state.subnet.scores, None) for state in (one, many)]
    assert sum(runner.count_flips(*masks).values()) <= 5


def test_the_first_step_that_is_not_finite_is_the_one_that_is_named(dataset):
    model, task = task_of(dataset)
    tx = optax.sgd(lambda step: jnp.where(step == 6, jnp.inf, 0.1))
    step = sm.make_train_step(task.mask_fn, recipe.make_loss(model, 0.13, 0.31), tx, learns="scores")
    state = sm.init_state(task.subnet, tx, jax.random.key(2), learns="scores")
    order = driver.epoch_order(jax.random.key(0), 0, len(dataset.train_labels), 64)
    _, totals, _ = driver.Driver(step, "scores", dataset)(state, driver.zero_totals(), order, 0, 10)
    assert int(totals["bad_step"]) == 6


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_finite_means_every_number(value):
    tree = {"a": jnp.ones((3, 3)), "b": None, "c": jnp.zeros(4)}
    assert driver.first_not_finite(tree) == -1
    assert driver.first_not_finite({**tree, "c": jnp.zeros(4).at[2].set(value)}) == 1
    assert driver.first_not_finite({**tree, "a": jnp.full((3, 3), value), "c": jnp.full(4, value)}) == 0


# Masks that change.


def test_gradual_pruning_ends_with_exactly_the_layer_counts_of_its_distribution(dataset, tmp_path):
    """The counts are fractions of the weights at the start, which the first step gives away."""
    settings = {**defaults("best", "gradual"), "model": "mlp", "width": 12, "density": 0.3, "epochs": 1}
    settings |= {"distribution": "snip", "dataset": dataset.name}
    end = runner.fit(Config(**settings, workdir=str(tmp_path / "a")), dataset, "mnist", alone=False)
    wanted = {**settings, **defaults("best", "random"), "distribution": "snip"}
    start = runner.fit(Config(**wanted, workdir=str(tmp_path / "b")), dataset, "mnist", alone=False)
    assert end["layers"] == start["layers"]
    assert end["parameters"] == sum(layer["kept"] for layer in end["layers"].values())


# Evaluation.


@pytest.mark.parametrize("examples", [1, 249, 250, 1000])
def test_evaluation_counts_every_example_once(dataset, examples):
    model, task = task_of(dataset)
    held = Held("test", dataset.test_images[:examples], dataset.test_labels[:examples])
    evaluator = Evaluator(task.mask_fn, task.forward, model, dataset)
    masks, params = evaluator.found(task.subnet)
    got = evaluator.figures(params, held)
    jax.tree.map(np.testing.assert_array_equal, masks, task.mask_fn(task.subnet.scores, None))
    jax.tree.map(np.testing.assert_array_equal, params, sm.subnetwork(task.mask_fn, task.subnet))
    logits = model.apply({"params": params}, (held.images / np.float32(255) - 0.1307) / np.float32(0.3081))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    np.testing.assert_allclose(got["test_loss"], -log_p[np.arange(examples), held.labels].mean(), rtol=1e-4)
    np.testing.assert_allclose(got["test_accuracy"], np.mean(log_p.argmax(-1) == held.labels), atol=1e-9)


def test_evaluation_of_sampled_masks_is_the_mean_over_the_keys(dataset):
    model, _ = task_of(dataset)
    weights = recipe.draw_weights(SETTINGS, model, (28, 28, 1), jax.random.key(0))
    settings = dataclasses.replace(SETTINGS, rescale=True)
    task = methods.METHODS["bernoulli"](methods.Start(settings, weights, None, None, model))
    held = Held("validation", dataset.test_images[:300], dataset.test_labels[:300])
    keys = jax.random.split(jax.random.key(5), 3)
    evaluator = Evaluator(task.mask_fn, task.forward, model, dataset)
    got = evaluator.sampled_figures(task.subnet, held, keys)
    losses, accuracies = [], []
    for key in keys:
        params = sm.subnetwork(task.forward, task.subnet, key)
        logits = model.apply({"params": params}, (held.images / np.float32(255) - 0.1307) / np.float32(0.3081))
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        losses.append(-log_p[np.arange(300), held.labels].mean())
        accuracies.append(np.mean(log_p.argmax(-1) == held.labels))
    assert len(set(losses)) == 3
    np.testing.assert_allclose(got["validation_sampled_loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(got["validation_sampled_accuracy"], np.mean(accuracies), atol=1e-9)
    masks, params = evaluator.found(task.subnet)
    assert not any(np.any(mask) for mask in jax.tree.leaves(masks))  # logits of 0 keep nothing
    np.testing.assert_allclose(evaluator.figures(params, held)["validation_loss"], np.log(10), rtol=1e-6)
    assert evaluator.sampled_figures(task.subnet, held, keys) == got
    assert evaluator.sampled_figures(task.subnet, held, ()) == {}


def test_flips_are_counted_per_layer():
    before = {"a": jnp.array([0.0, 1, 1]), "b": None, "c": jnp.array([1.0, 1])}
    after = {"a": jnp.array([1.0, 1, 0]), "b": None, "c": jnp.array([1.0, 1])}
    assert runner.count_flips(before, after) == {"a": 2, "c": 0}


# Schedules and the optimizer.


def test_cosine_falls_at_each_step_and_cosine_epoch_at_each_epoch():
    config = dataclasses.replace(SETTINGS, learning_rate=0.4, epochs=4)
    smooth = recipe.make_schedule(config, 10)
    stairs = recipe.make_schedule(dataclasses.replace(config, schedule="cosine-epoch"), 10)
    assert float(smooth(0)) == float(stairs(0)) == float(stairs(9)) == np.float32(0.4)
    assert smooth(1) < smooth(0) and float(smooth(40)) == 0
    np.testing.assert_allclose(stairs(30), 0.4 * 0.5 * (1 + np.cos(np.pi * 3 / 4)), rtol=1e-6)


def test_sgd_adds_decay_to_the_gradient_before_momentum():
    """buf = 0.9 buf + (g + wd s); s -= lr buf: the rule of the published code."""
    config = dataclasses.replace(SETTINGS, weight_decay=0.5, momentum=0.9)
    tx = recipe.make_optimizer(config, optax.constant_schedule(0.1))
    s, buf, state = 1.0, 0.0, tx.init(jnp.float32(1))
    for g in (1.0, -2.0, 0.5):
        updates, state = tx.update(jnp.float32(g), state, jnp.float32(s))
        buf = 0.9 * buf + g + 0.5 * s
        np.testing.assert_allclose(updates, -0.1 * buf, rtol=1e-6)
        s -= 0.1 * buf


# Shifts.


def test_each_image_moves_by_its_own_whole_pixels_and_background_moves_in():
    image = jnp.zeros((9, 9, 1), jnp.uint8).at[3:6, 4:6].set(jnp.arange(1, 7, dtype=jnp.uint8).reshape(3, 2, 1))
    moved = np.asarray(recipe.random_shift(jax.random.key(0), jnp.stack([image] * 400), 2))
    assert moved.shape == (400, 9, 9, 1) and moved.dtype == np.uint8
    corners = [tuple(np.argwhere(m[..., 0] == 1)[0]) for m in moved]
    assert set(corners) == {(y, x) for y in range(1, 6) for x in range(2, 7)}  # all 25 moves, and no other
    for m, (y, x) in zip(moved, corners, strict=True):
        np.testing.assert_array_equal(m[y : y + 3, x : x + 2], image[3:6, 4:6])
        assert m.sum() == 21


# The work directory.


def test_default_path_differs_with_every_setting_that_changes_the_result():
    base = default_path(SETTINGS, "mnist")
    assert base.parts[:2] == ("runs", "mnist") and base.name.startswith("edge-popup-mnist-5k-d0.3-s0-")
    for field, value in {"seed": 1, "learning_rate": 0.2, "epochs": 3, "init": "kaiming-normal"}.items():
        assert default_path(dataclasses.replace(SETTINGS, **{field: value}), "mnist") != base
    for field, value in {"data_dir": "x", "checkpoint_every": 3, "preset": "tutorial"}.items():
        assert default_path(dataclasses.replace(SETTINGS, **{field: value}), "mnist") == base


def test_records_after_the_checkpoint_and_half_a_line_are_cut(tmp_path):
    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    for step in (0, 63, 126):
        workdir.append({"epoch": step // 63, "step": step})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')
    workdir.cut_records(100, epochs=2)
    assert [record["step"] for record in workdir.records()] == [0, 63]


def test_records_that_do_not_reach_the_checkpoint_are_an_error(tmp_path):
    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    workdir.append({"epoch": 0, "step": 0})
    with pytest.raises(UserError, match="does not hold the epochs 0 to 2"):
        workdir.cut_records(126, epochs=3)


def test_other_data_under_the_same_name_are_refused(tmp_path):
    Workdir(tmp_path / "run", SETTINGS, "digest").append({"epoch": 0, "step": 0})
    with pytest.raises(UserError, match="images that are not those found now"):
        Workdir(tmp_path / "run", SETTINGS, "another")


def test_a_directory_whose_run_never_began_takes_other_settings(tmp_path):
    Workdir(tmp_path / "run", SETTINGS, "digest")
    other = dataclasses.replace(SETTINGS, density=0.7)
    assert Workdir(tmp_path / "run", other, "digest").config()["density"] == 0.7


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_a_runs_files_without_its_settings_are_not_taken_over(tmp_path, name):
    (tmp_path / name).write_text("someone's")
    with pytest.raises(UserError, match=f"holds {name} but not config.json"):
        Workdir(tmp_path, SETTINGS, "digest")
    assert (tmp_path / name).read_text() == "someone's"


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b'{"seed": 1', b""])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    workdir = Workdir(tmp_path, SETTINGS, "digest")
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary.json is damaged"):
        workdir.summary()


def test_a_summary_without_its_figures_is_damaged(tmp_path):
    workdir = Workdir(tmp_path, SETTINGS, "digest")
    (tmp_path / "summary.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match=r"damaged \(no dataset"):
        workdir.summary()


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_text(file, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]
