"""One run: what it does between its steps, and the files that it leaves."""

import contextlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import supermask_jax as sm
from experiments.config.registry import OPTIMIZERS
from experiments.config.run import named
from experiments.config.settings import changed, flat, neutral
from experiments.data.batches import epoch_order
from experiments.data.folder import folder
from experiments.data.source import arrays_dataset
from experiments.mnist import Config, defaults
from experiments.run.errors import Diverged, UserError
from experiments.run.files import write_text
from experiments.run.interrupt import Interrupted
from experiments.run.names import Settings
from experiments.run.placement import Placement
from experiments.run.workdir import Workdir
from experiments.training import fit as fitting
from experiments.training import methods
from experiments.training.evaluation import Split
from experiments.training.loss import make_loss
from experiments.training.optimizer import begin_schedule_at, hold_last_rate, make_optimizer, make_schedule
from experiments.training.parts import Parts
from experiments.training.stepper import OnDevice, Streamed
from supermask_jax.trees import leaf_key

CONFIG = changed(Config(), model="lenet-300-100", density=0.3, dataset="mnist-5k")
SETTINGS = Settings(flat(CONFIG), neutral(Config))
CLASSES, SHAPE = 4, (6, 5, 3)
TIMES = {"train_seconds", "images_per_second", "compile_seconds"}


def made_up(examples=40, tests=12, seed=0):
    labels = np.arange(examples + tests) % CLASSES
    images = np.random.default_rng(seed).integers(0, 150, (len(labels), *SHAPE)) + 30 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return arrays_dataset(
        "made up", (images[:examples], labels[:examples], images[examples:], labels[examples:]), "here", CLASSES
    )


def small(workdir, method="edge-popup", **settings):
    """Steps of 8 images on a network of two small layers."""
    network = {"model": "mlp", "width": 6, "depth": 1, "batch_size": 8, "density": 0.3, "epochs": 2, "shift": 1}
    settings = {**defaults("best", method), **network, "workdir": str(workdir), **settings}
    return named(changed(Config(), **settings), "made up")


def fit(config, dataset=None, **more):
    return fitting.fit(config, dataset or made_up(), "mnist", single=False, **more)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def without_times(summary):
    return {name: value for name, value in summary.items() if name not in TIMES | {"config", "dataset", "data_source"}}


# Where it starts.


def test_weights_and_scores_are_drawn_from_keys_of_the_seed_by_name():
    """So that they are the same for ever, whatever else a later version draws."""
    config = small("nowhere", seed=7)
    parts = Parts(config, made_up(), Split("test", made_up().test), Placement())
    key = jax.random.key(7)
    weights, _ = parts.network.init(leaf_key(key, "weights"))
    jax.tree.map(np.testing.assert_array_equal, parts.method.subnet.weights, weights)
    scores = sm.init_scores(leaf_key(key, "scores"), weights)
    jax.tree.map(np.testing.assert_array_equal, parts.method.subnet.scores, scores)


# What happens between the steps.


@pytest.mark.slow
def test_rigl_is_given_the_very_batch_that_the_last_step_used(tmp_path, monkeypatch):
    """Its gradient is that of the images that the weights have just been trained on, shuffled as they were."""
    build, given = methods.rigl, []

    def noting(setup):
        method = build(setup)

        def update(step, state, batch):
            given.append((step, batch))
            return method.update(step, state, batch)

        return method._replace(update=update)

    monkeypatch.setattr(methods, "rigl", noting)
    dataset = made_up(examples=44)  # of which the last batch of an epoch holds four
    fit(small(tmp_path, "rigl", update_every=3, epochs=3), dataset)
    assert [step for step, _ in given] == [2, 4, 6, 8, 10, 12, 14, 16, 18]  # five changes fit in three quarters
    for step, batch in given:
        epoch, at = divmod(step - 1, 6)
        order = epoch_order(leaf_key(jax.random.key(0), "order"), epoch, 44, 8)
        indices, weights = (part[at] for part in order)
        np.testing.assert_array_equal(batch["image"], dataset.train.images[indices])
        np.testing.assert_array_equal(batch["label"], dataset.train.labels[indices])
        np.testing.assert_array_equal(batch["weight"], weights)
    assert given[2][1]["weight"].tolist() == [1] * 4 + [0] * 4


@pytest.mark.slow
def test_at_one_step_masks_change_then_are_evaluated_then_are_saved_then_training_stops(tmp_path, monkeypatch):
    seen, append, save = [], Workdir.append, fitting.Checkpoints.save
    build = methods.sparse_evolutionary

    def noting(setup):
        method = build(setup)

        def update(step, state, batch):
            seen.append((step, "update"))
            return method.update(step, state, batch)

        return method._replace(update=update, update_every=5)

    monkeypatch.setattr(methods, "sparse_evolutionary", noting)
    monkeypatch.setattr(Workdir, "append", lambda self, r: (seen.append((r["step"], "evaluate")), append(self, r))[1])
    monkeypatch.setattr(
        fitting.Checkpoints, "save", lambda self, step, tree: (seen.append((step, "save")), save(self, step, tree))[1]
    )

    @contextlib.contextmanager
    def stopped():
        yield lambda: len(seen) > 3

    monkeypatch.setattr(fitting, "stopping", stopped)
    config = small(tmp_path, "set", checkpoint_every=5)
    with pytest.raises(Interrupted, match=r"stopped by a signal; saved at step 5 of 10 in"):
        fit(config)
    assert seen == [(0, "evaluate"), (5, "update"), (5, "evaluate"), (5, "save")]


@pytest.mark.slow
def test_a_pause_comes_at_least_every_fifty_steps(tmp_path, monkeypatch):
    calls, call = [], OnDevice.__call__

    def noting(self, state, totals, order, start, stop):
        calls.append((start, stop))
        return call(self, state, totals, order, start, stop)

    monkeypatch.setattr(OnDevice, "__call__", noting)
    fit(small(tmp_path, "dense", epochs=1, checkpoint_every=1000), made_up(examples=8 * 130))
    assert calls == [(0, 50), (50, 100), (100, 130)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["edge-popup", "rigl"])
def test_after_the_first_epoch_nothing_is_compiled(tmp_path, monkeypatch, method):
    """Also after masks have changed, and after a checkpoint: all that changes is an argument."""
    events, at, append = [], {}, Workdir.append

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            events.append(name)

    def noting(self, record):
        at[record["epoch"]] = len(events)
        return append(self, record)

    monkeypatch.setattr(Workdir, "append", noting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(small(tmp_path, method, epochs=4, update_every=2, checkpoint_every=3, batch_size=4))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert at[0] > 0 and at[1] > at[0]
    assert at[1] == at[2] == at[3] == at[4]


@pytest.mark.slow
def test_a_streamed_run_has_the_files_of_one_in_memory(tmp_path, monkeypatch):
    source = made_up(examples=20, tests=8)
    for split, part in (("train", source.train), ("test", source.test)):
        for n, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
            file = tmp_path / "pictures" / split / f"class {label}" / f"{n:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    used = []
    for stepper in (OnDevice, Streamed):
        call = stepper.__call__
        monkeypatch.setattr(
            stepper, "__call__", lambda self, *args, call=call: (used.append(type(self)), call(self, *args))[1]
        )
    runs = {}
    for stream in (False, True):
        workdir = tmp_path / f"stream-{stream}"
        config = small(workdir, "random", assess=True)
        dataset = folder(tmp_path / "pictures", stream=stream)
        summary = without_times(fit(changed(config, dataset="folder", stream=stream), dataset))
        del summary["file_bytes"]  # the file names the images by a hash, and packs its header
        runs[stream] = summary, records(workdir)
    assert runs[True] == runs[False]
    assert used and set(used[: len(used) // 2]) == {OnDevice} and set(used[len(used) // 2 :]) == {Streamed}


@pytest.mark.slow
def test_gradual_pruning_ends_with_exactly_the_layer_counts_of_its_distribution(tmp_path):
    """The counts are fractions of the weights at the start, which the first step gives away."""
    end = fit(small(tmp_path / "a", "gradual", distribution="snip"))
    start = fit(small(tmp_path / "b", "random", distribution="snip"))
    assert end["layers"] == start["layers"]
    assert end["parameters"] == sum(layer["kept"] for layer in end["layers"].values())


def test_numbers_that_are_not_finite_end_it_and_are_not_saved(tmp_path):
    config = small(tmp_path, "dense", optimizer="sgd", learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(Diverged, match=r"(Dense_\d/kernel|the loss) is not finite .* at step (\d+)") as raised:
        fit(config)
    fine = int(re.search(r"at step (\d+)", str(raised.value))[1])  # steps before it
    saved = [int(file.name) for file in (tmp_path / "checkpoints").iterdir() if file.name.isdigit()]
    assert max(saved, default=0) <= fine and not (tmp_path / "summary.json").exists()


# Schedules and the optimizer.


def test_cosine_falls_at_each_step_and_cosine_epoch_at_each_epoch():
    optim = changed(CONFIG, learning_rate=0.4).optim
    smooth = make_schedule(optim, 40, 10)
    stairs = make_schedule(changed(CONFIG, learning_rate=0.4, schedule="cosine-epoch").optim, 40, 10)
    assert float(smooth(0)) == float(stairs(0)) == float(stairs(9)) == np.float32(0.4)
    assert smooth(1) < smooth(0) and float(smooth(40)) == 0
    np.testing.assert_allclose(stairs(30), 0.4 * 0.5 * (1 + np.cos(np.pi * 3 / 4)), rtol=1e-6)


def test_sgd_adds_decay_to_the_gradient_before_momentum():
    """buf = 0.9 buf + (g + wd s); s -= lr buf: the rule of the published code."""
    optim = changed(CONFIG, weight_decay=0.5, momentum=0.9).optim
    tx = make_optimizer(optim, optax.constant_schedule(0.1))
    s, buf, state = 1.0, 0.0, tx.init(jnp.float32(1))
    for g in (1.0, -2.0, 0.5):
        updates, state = tx.update(jnp.float32(g), state, jnp.float32(s))
        buf = 0.9 * buf + g + 0.5 * s
        np.testing.assert_allclose(updates, -0.1 * buf, rtol=1e-6)
        s -= 0.1 * buf


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_optimizer_starts_at_the_learning_rate(optimizer):
    optim = changed(CONFIG, optimizer=optimizer, learning_rate=0.3, schedule="constant").optim
    schedule = make_schedule(optim, 40, 10)
    assert schedule(0) == schedule(39) == 0.3
    tx = make_optimizer(optim, schedule)
    updates, _ = tx.update(jnp.float32(1), tx.init(jnp.float32(1)), jnp.float32(1))
    np.testing.assert_allclose(updates, -0.3, rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_schedule_begins_at_any_step_and_the_rest_of_the_optimizer_at_its_start(optimizer):
    optim = changed(CONFIG, optimizer=optimizer, schedule="cosine", momentum=0.9).optim
    weights, gradient = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -0.3])}
    schedule = make_schedule(optim, 40, 10)
    late, constant = make_optimizer(optim, schedule), make_optimizer(optim, lambda step: schedule(30))
    update, _ = late.update(gradient, begin_schedule_at(30, late.init(weights)), weights)
    expected, _ = constant.update(gradient, constant.init(weights), weights)
    np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-6)


def test_a_schedule_that_is_over_stays_at_the_rate_of_its_last_step():
    schedule = make_schedule(changed(CONFIG, schedule="exponential").optim, 40, 10)
    held = hold_last_rate(schedule, 40)
    assert [float(held(step)) for step in (0, 20, 39, 40, 79)] == [float(schedule(s)) for s in (0, 20, 39, 39, 39)]


def test_steps_drop_to_a_tenth_at_the_parts_that_are_named_and_exponential_decay_ends_at_its_part():
    steps = make_schedule(changed(CONFIG, learning_rate=0.4, schedule="steps", drop_at=(0.5, 0.75)).optim, 40, 10)
    rates = [float(steps(step)) for step in (0, 19, 21, 29, 31, 39)]
    np.testing.assert_allclose(rates, [0.4, 0.4, 0.04, 0.04, 0.004, 0.004], rtol=1e-6)
    decay = changed(CONFIG, learning_rate=0.4, schedule="exponential", final_rate=0.01).optim
    np.testing.assert_allclose(
        [make_schedule(decay, 40, 10)(step) for step in (0, 20, 40)], [0.4, 0.04, 0.004], rtol=1e-6
    )


def test_a_warm_up_rises_evenly_and_then_the_schedule_is_as_without():
    plain = make_schedule(changed(CONFIG, learning_rate=0.4).optim, 100, 10)
    warm = make_schedule(changed(CONFIG, learning_rate=0.4, warmup_epochs=0.5).optim, 100, 10)
    np.testing.assert_allclose([warm(t) / plain(t) for t in range(7)], [0.2, 0.4, 0.6, 0.8, 1, 1, 1], rtol=1e-6)


def test_a_warm_up_of_less_than_a_step_is_none():
    plain = make_schedule(changed(CONFIG, learning_rate=0.4).optim, 100, 50)
    for epochs in (0.001, 0.01, 0.02):
        warm = make_schedule(changed(CONFIG, learning_rate=0.4, warmup_epochs=epochs).optim, 100, 50)
        assert [warm(t) for t in range(3)] == [plain(t) for t in range(3)]


def test_nesterov_looks_ahead():
    optim = changed(CONFIG, momentum=0.9, nesterov=True).optim
    tx = make_optimizer(optim, optax.constant_schedule(0.1))
    updates, _ = tx.update(jnp.float32(1), tx.init(jnp.float32(1)), jnp.float32(1))
    np.testing.assert_allclose(updates, -0.1 * 1.9, rtol=1e-6)


@pytest.mark.parametrize(
    "settings, says",
    (
        ({"drop_at": (0.5,)}, "--drop-at and --schedule steps go together"),
        ({"schedule": "steps"}, "--drop-at and --schedule steps go together"),
        ({"schedule": "steps", "drop_at": (0.5, 1.0)}, r"drop.at.*in \(0, 1\)"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum above 0"),
        ({"label_smoothing": 1.0}, r"label.smoothing.*in \[0, 1\)"),
        ({"warmup_epochs": -1.0}, "warmup.epochs.*0 or more"),
    ),
)
def test_settings_of_the_optimizer_that_cannot_be_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        changed(CONFIG, **settings).check()


def test_smoothed_labels_are_a_mixture_with_all_classes():
    rng = np.random.default_rng(0)
    batch = {"image": np.zeros((6, 2, 2, 1), np.uint8), "label": np.arange(6) % 3, "weight": np.ones(6, np.float32)}
    logits = rng.normal(size=(6, 3)).astype(np.float32)

    class Fixed:
        def apply(self, params, state, images, *, train, key):
            return params, state

    def loss(smoothing):
        return float(
            make_loss(Fixed(), (0.0,), (1.0,), label_smoothing=smoothing)(logits, None, batch, jax.random.key(0))[0]
        )

    target = 0.9 * np.eye(3)[batch["label"]] + 0.1 / 3
    expected = -(target * np.asarray(jax.nn.log_softmax(logits))).sum(-1).mean()
    assert loss(0.1) == pytest.approx(expected, rel=1e-5) and loss(0.0) != pytest.approx(expected, rel=1e-3)


# The work directory.


def test_records_after_the_checkpoint_and_half_a_line_are_cut(tmp_path):
    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    for step in (0, 63, 126):
        workdir.append({"epoch": step // 63, "step": step})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')
    workdir.cut_records(100, epochs=2)
    assert [record["step"] for record in workdir.records()] == [0, 63]


def test_a_restarted_run_begins_anew_and_keeps_what_was_there(tmp_path):
    first = fit(small(tmp_path))
    left = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds metrics\.jsonl.*Put it back, or begin anew: .* or give --restart"):
        fit(small(tmp_path))
    for number in (1, 2):  # a run that has begun is restarted as well
        again = fit(small(tmp_path, restart=True))
        assert without_times(again) == without_times(first)
        assert (tmp_path / "replaced-1" / "metrics.jsonl").read_text() == left
        assert (tmp_path / f"replaced-{number}" / "summary.json").exists()
    assert without_times(fit(small(tmp_path))) == without_times(first)  # which is read, not trained again


def test_a_directory_that_is_no_runs_is_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("the user's")
    Workdir(tmp_path, SETTINGS, "digest", restart=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "config.json", "notes.txt"]


def test_a_line_that_is_no_record_is_named(tmp_path):
    workdir = Workdir(tmp_path, SETTINGS, "digest")
    workdir.append({"epoch": 0, "step": 0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "step": "63"}\n')
    with pytest.raises(UserError, match=r"damaged \(line 2: Expected `int`, got `str` - at `\$.step`\)"):
        workdir.records()


def test_records_that_do_not_reach_the_checkpoint_are_an_error(tmp_path):
    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    workdir.append({"epoch": 0, "step": 0})
    with pytest.raises(UserError, match="does not hold the epochs 0 to 2"):
        workdir.cut_records(126, epochs=3)


def test_other_data_under_the_same_name_are_refused(tmp_path):
    Workdir(tmp_path / "run", SETTINGS, "digest").append({"epoch": 0, "step": 0})
    with pytest.raises(UserError, match="images that differ from these"):
        Workdir(tmp_path / "run", SETTINGS, "another")


def test_a_directory_whose_run_never_began_takes_other_settings(tmp_path):
    Workdir(tmp_path / "run", SETTINGS, "digest")
    other = Settings(flat(changed(CONFIG, density=0.7)), neutral(Config))
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
    with pytest.raises(
        UserError, match=r"damaged \(Object missing required field `method`\); move it away, and it is made again"
    ):
        workdir.summary()


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_text(file, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]
