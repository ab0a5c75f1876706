"""`experiments.lottery` from end to end on tiny images: rounds, controls, sweeps, resume, and the figures reported."""

import contextlib
import dataclasses
import json
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supermask_jax as sm
from experiments import lottery
from experiments.config.flags import parser
from experiments.config.presets import LOTTERY
from experiments.config.registry import CRITERIA
from experiments.config.settings import changed, fields, flat
from experiments.data.source import arrays_dataset
from experiments.run.errors import UserError
from experiments.run.files import read_arrays
from experiments.run.interrupt import Interrupted
from experiments.tickets import display, questions, rounds
from experiments.tickets import trainer as trainer_room
from experiments.tickets.trainer import Candidate, Snapshot, Trainer
from experiments.training.network import Network
from supermask_jax.lottery import full_masks
from supermask_jax.trees import by_path, leaf_key, map_with_name

pytestmark = pytest.mark.usefixtures("coarse_pictures")
FIGURES = ("early_stop_step", "early_stop_test_accuracy", "test_accuracy")


def images(seed=0, n=240):
    """Noise around one picture per class: a network learns it in a few steps."""
    rng = np.random.default_rng(seed)
    pictures, labels = rng.integers(0, 200, (10, 6, 6, 1)), np.arange(n, dtype=np.int32) % 10
    x = np.clip(pictures[labels] + rng.integers(-50, 50, (n, 6, 6, 1)), 0, 255).astype(np.uint8)
    arrays = x[40:], labels[40:], x[:40], labels[:40]
    return arrays_dataset(f"pictures {seed}", arrays, "made up", mean=(0.4,), std=(0.25,))


def config(tmp_path, **changes):
    settings = {"steps": 30, "rounds": 2, "trials": 1, "batch_size": 20, "eval_every": 10, "validation": 40}
    return changed(lottery.Config(), **settings | {"workdir": str(tmp_path / "run"), "checkpoint_every": 10} | changes)


def without_times(summary):
    records = [{k: v for k, v in record.items() if k != "train_seconds"} for record in summary["networks"]]
    return json.loads(json.dumps([records, summary["per_input"]]))


@pytest.mark.slow
def test_all_rounds_of_all_trials_with_their_controls(tmp_path):
    settings = config(tmp_path, trials=2, stability=True)
    summary = rounds.run(settings, images())
    kinds = [(r["trial"], r["round"], r["network"]) for r in summary["networks"]]
    of_a_trial = [(0, "ticket"), *((n, kind) for n in (1, 2) for kind in ("ticket", "reinit", "random"))]
    assert kinds == [(trial, *rest) for trial in (0, 1) for rest in of_a_trial]
    sizes = {"Dense_0/kernel": 36 * 300, "Dense_1/kernel": 300 * 100, "Dense_2/kernel": 100 * 10}
    for record in summary["networks"]:
        for path, size in sizes.items():
            left = size
            for _ in range(record["round"]):
                left = sm.keep_count(0.9 if path == "Dense_2/kernel" else 0.8, left)
            assert record["layers"][path] == {"kept": left, "size": size}
        assert record["curve"]["step"] == [0, 10, 20, 30]
        at = int(np.argmin(record["curve"]["validation_loss"]))
        assert record["early_stop_step"] == record["curve"]["step"][at]
        assert record["early_stop_test_accuracy"] == record["curve"]["test_accuracy"][at]
        assert record["test_accuracy"] == record["curve"]["test_accuracy"][-1]
        assert (record["network"] == "ticket") == ("instability" in record)
    by_kind = {(r["trial"], r["round"], r["network"]): r for r in summary["networks"]}
    assert by_kind[0, 0, "ticket"]["curve"] != by_kind[1, 0, "ticket"]["curve"]
    assert by_kind[0, 1, "ticket"]["curve"] != by_kind[0, 1, "random"]["curve"] != by_kind[0, 1, "reinit"]["curve"]
    assert by_kind[0, 0, "ticket"]["test_accuracy"] > 0.5  # it learned
    assert len(summary["per_input"]) == 3 and len(summary["per_input"][0]) == 36
    assert summary["per_input"][0] == [1.0] * 36 and np.mean(summary["per_input"][1]) == pytest.approx(0.8, abs=1e-3)
    assert {file.name for file in (tmp_path / "run").glob("*.png")} == {"tickets.png", "curves.png", "inputs.png"}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == json.loads(json.dumps(summary))


class Killed(Exception):
    pass


@pytest.mark.slow
def test_interrupted_anywhere_it_ends_the_same_and_trains_nothing_twice(tmp_path, monkeypatch):
    whole = rounds.run(config(tmp_path / "whole", rounds=1), images())
    broken = config(tmp_path, rounds=1)
    lines, stops = [], [3, 6, 11]  # evaluations: within the first network, in later ones
    step = display.Display.step

    def killed(self, name, at, figures):
        lines.append((name, at, figures is None))
        if stops and sum(1 for *_, resumed in lines if not resumed) == stops[0]:
            stops.pop(0)
            lines.append(("killed", 0, False))
            raise Killed
        step(self, name, at, figures)

    monkeypatch.setattr(display.Display, "step", killed)
    for _ in range(3):
        with pytest.raises(Killed):
            rounds.run(broken, images())
        lines[:] = [line for line in lines if line[0] != "killed"]
    resumed = rounds.run(broken, images())
    assert without_times(resumed) == without_times(whole)
    assert any(was_resumed and at > 0 for _, at, was_resumed in lines)
    assert not list((tmp_path / "run/checkpoints").iterdir())

    monkeypatch.setattr(Trainer, "train", None)  # a finished run is only read
    assert without_times(rounds.run(broken, images())) == without_times(whole)


@pytest.mark.slow
def test_one_compilation_serves_all_networks(tmp_path):
    settings = config(tmp_path, pruned="freeze", trials=2)
    workdir = rounds.open_workdir(settings, images())
    with rounds.Experiment(settings, images(), None, workdir) as experiment:
        for trial in range(2):
            assert len(list(experiment.rounds(trial))) == 3
        assert len(experiment._source._stepper._compiled) == 1  # steps of one length only: fewer than 50 a call


def a_trainer(tmp_path, **changes):
    settings = config(tmp_path, **changes)
    return Trainer(settings, images(), rounds.open_workdir(settings, images()), lambda *_: None)


def some_masks(weights):
    return sm.random_masks(jax.random.key(5), weights, 0.3)


def small(seed):
    """A tree that is named like LeNet-300-100, and quick to draw."""
    rng = np.random.default_rng(seed)
    shapes = {"Dense_0": (40, 50), "Dense_1": (50, 40), "Dense_2": (40, 10)}
    return {name: {"kernel": jnp.asarray(rng.standard_normal(s, np.float32))} for name, s in shapes.items()}


@pytest.mark.slow
def test_weights_are_drawn_at_the_step_that_prune_at_names(tmp_path):
    early = a_trainer(tmp_path / "a", prune_at=0.5)
    begin, key = early.draw(jax.random.key(1)), jax.random.key(2)
    masks = full_masks(begin.weights)
    drawn = early.train(Candidate("early", begin, masks, key)).drawn.weights
    late = a_trainer(tmp_path / "b")
    stopped = late.train(Candidate("stopped", begin, masks, key, last_step=15)).drawn.weights
    at_end = late.train(Candidate("whole", begin, masks, key)).drawn.weights
    jax.tree.map(np.testing.assert_array_equal, drawn, stopped)
    assert not np.array_equal(drawn["Dense_0"]["kernel"], at_end["Dense_0"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"schedule": "steps", "drop_at": (0.3, 0.7), "warmup_epochs": 2.0},
        {"schedule": "exponential", "shift": 1, "flip": True, "cutout": 2},
    ],
)
def test_training_in_two_parts_is_training_in_one_but_for_the_optimizer(tmp_path, schedule):
    """Rewinding starts at a later step of the same batches and of the same schedule; plain SGD has nothing to lose."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, **schedule}
    trainer = a_trainer(tmp_path, **plain)
    begin, key = trainer.draw(jax.random.key(1)), jax.random.key(2)
    masks = full_masks(begin.weights)
    whole = trainer.train(Candidate("whole", begin, masks, key)).drawn
    half = trainer.train(Candidate("half", begin, masks, key, last_step=12)).drawn
    rest = trainer.train(Candidate("rest", half, masks, key, first_step=12))
    assert rest.record["curve"]["step"] == [12, 20, 30]
    jax.tree.map(np.testing.assert_array_equal, rest.drawn, whole)


@pytest.mark.slow
def test_training_images_are_augmented_and_evaluated_ones_are_not(tmp_path):
    ends = []
    for changes in ({}, {"flip": True}, {"flip_alternately": True}, {"cutout": 2}, {"label_smoothing": 0.3}):
        trainer = a_trainer(tmp_path / f"{len(ends)}", **changes)
        begin = trainer.draw(jax.random.key(1))
        candidate = Candidate("network", begin, full_masks(begin.weights), jax.random.key(2), last_step=1)
        ends.append((trainer.train(candidate).drawn.weights["Dense_0"]["kernel"], trainer.evaluate(*begin_of(begin))))
    for kernel, figures in ends[1:]:
        assert not np.array_equal(kernel, ends[0][0]) and figures == ends[0][1]


def begin_of(snapshot):
    return snapshot, full_masks(snapshot.weights)


def test_frozen_pruned_weights_stay_and_are_part_of_the_network(tmp_path):
    trainer = a_trainer(tmp_path, pruned="freeze", weight_decay=0.1)
    begin = trainer.draw(jax.random.key(1))
    weights = begin.weights
    masks = some_masks(weights)
    drawn = trainer.train(Candidate("frozen", begin, masks, jax.random.key(2))).drawn.weights
    for path, mask in by_path(masks).items():
        before, after = (np.asarray(by_path(tree)[path]) for tree in (weights, drawn))
        assert np.array_equal(before[mask == 0], after[mask == 0])
        assert not np.any(before[mask == 1] == after[mask == 1])
    zeros = a_trainer(tmp_path / "zero").evaluate(begin, masks)
    assert trainer.evaluate(begin, masks) == trainer.evaluate(begin, full_masks(weights)) != zeros


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["rewind", "reinit", "reshuffle", "signed-constant", "learning-rate", "finetune"])
def test_kept_weights_start_as_the_settings_say(tmp_path, kept):
    start, other, last = small(1), small(3), small(4)
    masks, last_round = some_masks(start), Snapshot(last)
    tickets = config(tmp_path, kept=kept).tickets
    begins = rounds._starts(tickets, jax.random.key(0), Snapshot(start), Snapshot(other))
    for path, mask in by_path(masks).items():
        mask = np.asarray(mask) == 1
        old, new = (
            np.asarray(by_path(start)[path]),
            np.asarray(by_path(begins("ticket", 1, masks, last_round).weights)[path]),
        )
        if kept in ("learning-rate", "finetune"):
            assert np.array_equal(new, np.where(mask, by_path(last)[path], old))
        elif kept == "rewind":
            assert np.array_equal(new, old)
        elif kept == "reinit":
            assert np.array_equal(new, by_path(other)[path])
        else:
            assert np.array_equal(new[~mask], old[~mask]) and not np.array_equal(new[mask], old[mask])
        if kept == "reshuffle":
            assert np.array_equal(np.sort(new[mask]), np.sort(old[mask]))
        if kept == "signed-constant":
            assert np.array_equal(np.sign(new), np.sign(old)) and np.ptp(np.abs(new[mask])) == 0
        assert np.array_equal(by_path(begins("random", 1, masks, last_round).weights)[path], old)
        assert np.array_equal(by_path(begins("reinit", 1, masks, last_round).weights)[path], by_path(other)[path])
        assert np.array_equal(
            by_path(begins("ticket", 0, masks, last_round).weights)[path], old
        )  # one network to draw from


@pytest.mark.parametrize(
    ("kept", "ticket"), [("rewind", (7, 7)), ("reinit", (0, 0)), ("learning-rate", (7, 7)), ("finetune", (0, 30))]
)
def test_training_begins_at_the_step_of_the_weights_and_only_fine_tuning_after_the_schedule(tmp_path, kept, ticket):
    tickets = config(tmp_path, kept=kept, rewind_step=7).tickets
    first = {kind: rounds._first_steps(tickets, kind, 1) for kind in ("ticket", "again", "reinit", "random")}
    assert first == {"ticket": ticket, "again": ticket, "reinit": (0, 0), "random": (7, 7)}
    assert rounds._first_steps(tickets, "ticket", 0) == (7, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rounds": 1, "fraction": 0.5, "spare_output": True}, {"Dense_0/kernel": 0.5, "Dense_2/kernel": 1.0}),
        ({"rounds": 2, "density": 0.09, "spare_output": True}, {"Dense_0/kernel": 0.09, "Dense_2/kernel": 1.0}),
        ({"rounds": 3, "fraction": 0.2}, {"Dense_0/kernel": 0.512, "Dense_2/kernel": 0.729}),
        ({"rounds": 4, "density": 0.1}, {"Dense_0/kernel": 0.1, "Dense_2/kernel": 0.55}),
        ({"rounds": 1, "density": 0.1}, {"Dense_0/kernel": 0.1, "Dense_2/kernel": 0.55}),
        ({"rounds": 2, "fraction": 0.5, "scope": "global"}, {}),
        ({"rounds": 1, "fraction": 0.5, "unit": "neuron"}, {"Dense_0/kernel": 0.5, "Dense_2/kernel": 1.0}),
        ({"rounds": 1, "fraction": 0.3, "criterion": "random"}, {"Dense_0/kernel": 0.7}),
    ],
)
def test_pruning_leaves_what_the_settings_say(tmp_path, changes, expected):
    settings = config(tmp_path, **changes)
    start, final = small(1), small(3)
    masks = full_masks(start)
    prune = rounds.make_prune(settings.tickets, jax.random.key(0), "Dense_2/kernel")
    for _ in range(settings.tickets.rounds):
        masks = prune(rounds.Pruned(Snapshot(start), rounds.Trained({}, Snapshot(final))), masks)
    for path, density in expected.items():
        assert sm.layer_densities(masks)[path] == pytest.approx(density, abs=6e-3)
    if settings.tickets.scope == "global":
        assert sm.density(masks) == pytest.approx(0.25, abs=1e-3)


def test_a_signal_stops_a_network_with_convolutions_after_ten_steps_and_not_at_the_next_evaluation(tmp_path):
    settings = config(tmp_path, model="cnn", width=2, depth=1, eval_every=30, checkpoint_every=30)
    workdir = rounds.open_workdir(settings, images())
    trainer = Trainer(settings, images(), workdir, lambda *_: None, stop_requested=lambda: True)
    begin = trainer.draw(jax.random.key(1))
    with pytest.raises(Interrupted, match="saved at step 10 of 30"):
        trainer.train(Candidate("network", begin, full_masks(begin.weights), jax.random.key(2)))


def with_a_convolution(seed):
    rng = np.random.default_rng(seed)
    shapes = {"Conv_0": (3, 3, 2, 10), "Dense_0": (10, 30), "Dense_1": (30, 10)}
    return {name: {"kernel": jnp.asarray(rng.standard_normal(s, np.float32))} for name, s in shapes.items()}


def pruned_once(settings, output, start, final):
    prune = rounds.make_prune(settings.tickets, jax.random.key(0), output)
    masks = prune(rounds.Pruned(Snapshot(start), rounds.Trained({}, Snapshot(final))), full_masks(start))
    return sm.layer_densities(masks)


@pytest.mark.parametrize(("preset", "conv"), [("conv2", 0.9), ("conv4", 0.9), ("conv6", 0.85), ("paper", 0.8)])
def test_convolutions_dense_layers_and_the_output_layer_lose_what_a_preset_says(preset, conv):
    settings = changed(lottery.Config(), **lottery.defaults(preset))
    of_layers = pruned_once(settings, "Dense_1/kernel", with_a_convolution(1), with_a_convolution(2))
    assert of_layers == pytest.approx({"Conv_0/kernel": conv, "Dense_0/kernel": 0.8, "Dense_1/kernel": 0.9}, abs=0.01)


def test_a_global_ranking_can_spare_the_output_layer(tmp_path):
    start, final = small(1), small(3)
    settings = config(tmp_path, fraction=0.3, scope="global", spare_output=True)
    of_layers = pruned_once(settings, "Dense_2/kernel", start, final)
    assert of_layers["Dense_2/kernel"] == 1
    assert (of_layers["Dense_0/kernel"] + of_layers["Dense_1/kernel"]) / 2 == pytest.approx(0.7, abs=1e-3)
    assert of_layers["Dense_0/kernel"] != of_layers["Dense_1/kernel"]


def test_a_global_ranking_leaves_the_minimum_in_each_layer_or_is_refused(tmp_path):
    start = small(1)
    final = {**small(3), "Dense_1": {"kernel": 1e-6 * small(3)["Dense_1"]["kernel"]}}
    settings = config(tmp_path, fraction=0.7, scope="global", layer_minimum=7)
    of_layers = pruned_once(settings, "Dense_2/kernel", start, final)
    assert round(of_layers["Dense_1/kernel"] * 50 * 40) == 7
    sizes = {"a": 1000, "b": 5}
    rounds.check_densities(changed(settings, rounds=1, fraction=0.9, layer_minimum=90).tickets, sizes, "b")
    with pytest.raises(
        UserError, match="leave 101 of the weights, and 2 layers need 105 to have --layer-minimum 100 each"
    ):
        rounds.check_densities(changed(settings, rounds=1, fraction=0.9, layer_minimum=100).tickets, sizes, "b")


@pytest.mark.parametrize("preset", LOTTERY)
def test_every_preset_is_valid_alone_and_with_learning_rate_rewinding_and_sweeps(preset):
    parse = parser(lottery.Config, lottery.defaults)
    for args in ([], ["--kept", "learning-rate"], ["--sweep", "rewind"]):
        parsed = parse("prog", ["--preset", preset, *args])
        assert parsed.data.dataset == ("auto" if preset in ("short", "paper") else "cifar10")
    for value in (0, 1000):
        changed(parsed, **questions.changes_of(parsed, value)).check()


def test_what_leaves_fewer_weights_than_layers_is_refused_before_training(tmp_path):
    few = {"scope": "global", "rounds": 3, "fraction": 0.99}
    with pytest.raises(UserError, match=r"round 3 would leave 1 of the weights, and 3 layers need 3 .*--density"):
        rounds.run(config(tmp_path, **few), images())
    assert not list((tmp_path / "run").glob("networks/*"))
    sizes = {"a": 10_000, "b": 10_000, "c": 100}
    rounds.check_densities(config(tmp_path, **few | {"scope": "layer"}).tickets, sizes, "c")
    rounds.check_densities(config(tmp_path, **few | {"rounds": 2}).tickets, sizes, "c")
    rounds.check_densities(
        config(tmp_path, **few | {"rounds": 2, "fraction": 0.991, "spare_output": True}).tickets, sizes, "c"
    )
    with pytest.raises(UserError, match="leave 2 of the weights, and 3 layers need 3 to have one each"):
        rounds.check_densities(config(tmp_path, **few | {"rounds": 2, "fraction": 0.991}).tickets, sizes, "c")


def test_a_network_that_does_not_fit_the_images_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="--model conv6 does not take images of 6 x 6 x 1"):
        rounds.run(config(tmp_path, model="conv6"), images())
    assert not (tmp_path / "run/networks").exists()


def test_tickets_move_only_between_images_of_one_shape_and_as_many_classes(tmp_path, monkeypatch):
    sets = {"mnist": images(), "cifar10": images(seed=1)}
    monkeypatch.setattr(rounds.images, "load", lambda name, *_, **__: sets[name])
    monkeypatch.setattr(rounds, "load_like", lambda name, *_: sets[name])
    for one, other in (("mnist", "cifar10"), ("cifar10", "mnist")):
        _, dataset, target = rounds.open_data(config(tmp_path, dataset=one, transfer_to=other))
        assert (dataset.name, target.name) == (sets[one].name, sets[other].name)
    sets["cifar10"] = dataclasses.replace(sets["cifar10"], image_shape=(6, 6, 3))
    for one, other in (("mnist", "cifar10"), ("cifar10", "mnist")):
        with pytest.raises(UserError, match=f"--transfer-to {other} .*one network must fit both"):
            rounds.open_data(config(tmp_path, dataset=one, transfer_to=other))


@pytest.mark.slow
def test_each_data_set_of_a_transfer_has_its_own_normalisation(tmp_path):
    """Images at half the brightness are the same images to a network, if they are normalised as themselves."""
    bright = images(seed=1)
    arrays = [2 * (images // 4) for images in (bright.train.images, bright.test.images)]
    targets = []
    for scale in (1, 2):
        of_scale = [array // scale for array in arrays]
        both = of_scale[0], bright.train.labels, of_scale[1], bright.test.labels
        target = arrays_dataset("target", both, "made up", mean=(0.2 / scale,), std=(0.1 / scale,))
        settings = config(tmp_path / f"{scale}", rounds=1, controls=())
        targets.append([r["curve"] for r in rounds.run(settings, images(), target)["networks"]])
    for one, other in zip(*targets, strict=True):
        np.testing.assert_allclose(one["validation_loss"], other["validation_loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_ticket_is_measured_on_the_images_that_it_is_transferred_to(tmp_path):
    settings = config(tmp_path, rounds=1, controls=())
    summary = rounds.run(settings, images(), images(seed=1))
    untransferred = rounds.run(config(tmp_path / "untransferred", rounds=1, controls=()), images())
    assert summary["dataset"] == "pictures 1"
    assert [r["network"] for r in summary["networks"]] == ["ticket", "ticket"]
    sources = [read_arrays(tmp_path / f"run/networks/trial0-round{n}-source.npz") for n in (0, 1)]
    tickets = [read_arrays(tmp_path / f"untransferred/run/networks/trial0-round{n}-ticket.npz") for n in (0, 1)]
    jax.tree.map(np.testing.assert_array_equal, sources, tickets)  # drawn as without transfer
    assert summary["networks"][1]["curve"] != untransferred["networks"][1]["curve"]


def test_the_control_of_pruned_neurons_has_as_many_neurons():
    masks = full_masks(small(1))
    masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].at[:, :20].set(0)
    tickets = changed(lottery.Config(), unit="neuron").tickets
    control = rounds.random_control(tickets, jax.random.key(0), 1, masks)
    kept = np.asarray(control["Dense_0"]["kernel"])
    assert sorted(np.unique(kept.sum(axis=0), return_counts=True)[1].tolist()) == [20, 30]
    assert not np.array_equal(kept, masks["Dense_0"]["kernel"]) and np.all(control["Dense_2"]["kernel"] == 1)


@pytest.mark.slow
def test_a_ticket_can_be_taken_out_of_its_file(tmp_path):
    rounds.run(config(tmp_path, rounds=1), images())
    files = {file.stem for file in (tmp_path / "run/networks").glob("*.npz")}
    assert files == {"trial0-round0-ticket", "trial0-round1-ticket"}  # no weights of controls
    arrays = read_arrays(tmp_path / "run/networks/trial0-round1-ticket.npz")
    weights, loaded, _, about = sm.load_subnetwork(tmp_path / "run/networks/trial0-round1-ticket.safetensors")
    for path, mask in by_path(loaded).items():
        np.testing.assert_array_equal(mask, arrays[f"masks/{path}"])
        np.testing.assert_array_equal(by_path(weights)[path], arrays[f"weights/{path}"] * arrays[f"masks/{path}"])
    assert about["model"] == "lenet-300-100" and 0 < about["test_accuracy"] <= 1
    masks = {path: mask for path, mask in arrays.items() if path.startswith("masks/")}
    assert {path: (mask.dtype, mask.sum()) for path, mask in masks.items()} == {
        f"masks/Dense_{i}/kernel": (bool, sm.keep_count(rate, size))
        for i, (rate, size) in enumerate([(0.8, 36 * 300), (0.8, 300 * 100), (0.9, 1000)])
    }


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ("rewind", "early", "rounds", "criterion"))
def test_a_sweep_compares_the_last_rounds_and_draws(tmp_path, monkeypatch, sweep):
    setting, values, label = questions.SWEEPS[sweep]
    values = {"early": (0.4, 1.0), "rewind": (0, 10)}.get(sweep, (values[0], values[-1]))
    monkeypatch.setitem(questions.SWEEPS, sweep, (setting, (2, 1) if sweep == "rounds" else values, label))
    summary = questions.run(config(tmp_path, sweep=sweep, controls=("random",)), images())
    rows = summary["rows"]
    assert [(row["value"], row["network"]) for row in rows] == [
        (value, kind) for value in questions.SWEEPS[sweep][1] for kind in ("ticket", "random")
    ]
    assert all(row["density"] == pytest.approx(0.1, abs=0.02) for row in rows)  # the output layer loses less
    assert all(set(FIGURES) <= set(row) for row in rows)
    assert ("instability" in rows[0]) == (sweep == "rewind")
    assert (tmp_path / "run/sweep.png").stat().st_size > 2_000
    assert questions.run(config(tmp_path, sweep=sweep, controls=("random",)), images())["rows"] == rows


def test_every_value_of_a_sweep_is_checked_before_the_first_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "run", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match="--unit neuron"):
        questions.run(config(tmp_path, sweep="rewind", unit="neuron", steps=40), images())


@pytest.mark.slow
def test_untrained_masks_are_measured_for_every_criterion(tmp_path):
    summary = questions.run(config(tmp_path, sweep="untrained", steps=60), images())
    rows = {(r["criterion"], r["density"], r["start"]): r["test_accuracy"] for r in summary["rows"]}
    assert len(rows) == len(CRITERIA) * len(questions.UNTRAINED_DENSITIES) * 2
    best = {name: max(v for (criterion, *_), v in rows.items() if criterion == name) for name in CRITERIA}
    assert best["large_final_same_sign"] > best["random"]
    assert (tmp_path / "run/sweep.png").exists()


def test_the_command_line_names_the_librarys_criteria():
    assert set(CRITERIA) == {*sm.saliency.CRITERIA, *sm.saliency.RANKED, "random"}
    choices = typing.get_args(next(field.type for field in fields(lottery.Config) if field.name == "sweep"))
    assert set(choices) == {"none", "untrained", *questions.SWEEPS}


def test_instability_is_the_distance_between_copies_in_units_of_how_far_they_went():
    start = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}
    a, b = ({"kernel": jnp.array([x]), "bias": jnp.ones(1)} for x in ([3.0, 9.0], [0.0, 9.0]))
    masks = {"kernel": jnp.array([[1.0, 0.0]]), "bias": None}
    assert rounds.instability(start, masks, a, a) == 0
    assert rounds.instability(start, masks, a, b) == 2  # 3 apart; one went 3, the other nowhere
    opposite = jax.tree.map(jnp.negative, a)
    assert rounds.instability(start, masks, a, opposite) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"fraction": 1.0},
        {"density": 0.0},
        {"rewind_step": 6000},
        {"prune_at": 0.0},
        {"trials": 0},
        {"seed": -1},
        {"unit": "neuron", "scope": "global"},
        {"unit": "neuron", "pruned": "freeze"},
        {"unit": "neuron", "rewind_step": 10},
        {"prune_at": 0.1, "rewind_step": 600},
        {"layer_minimum": 1},
        {"layer_minimum": -1, "scope": "global"},
        {"conv_fraction": 1.0},
        {"conv_fraction": 0.1, "scope": "global"},
        {"conv_fraction": 0.1, "density": 0.1},
        {"kept": "learning-rate", "prune_at": 0.5},
        {"kept": "learning-rate", "unit": "neuron"},
        {"kept": "learning-rate", "sweep": "early"},
        {"kept": "finetune", "transfer_to": "mnist"},
        {"kept": "finetune", "rewind_step": 10},
        {"kept": "finetune", "sweep": "rewind"},
        {"kept": "finetune", "schedule": "cosine"},
        {"sweep": "untrained", "conv_fraction": 0.1},
        {"shift": 15},
        {"kept": "reinit"},
        {"sweep": "untrained", "pruned": "freeze"},
        {"stability": True, "prune_at": 0.5},
        {"transfer_to": "mnist", "sweep": "early"},
    ],
)
def test_settings_out_of_range_are_user_errors(wrong):
    with pytest.raises(UserError, match="|".join(f"--{name.replace('_', '-')}" for name in wrong)):
        changed(lottery.Config(), **wrong).check()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "lenet-300-100-mnist-s0-5f803e1c"),
        ({"kept": "reshuffle", "rewind_step": 100}, "lenet-300-100-mnist-s0-74dacdd7"),
        ({"model": "resnet-20", "sweep": "rewind", "density": 0.1}, "rewind-resnet-20-mnist-s0-2293810f"),
    ],
)
def test_a_run_has_the_name_that_it_had_before_images_were_augmented(tmp_path, monkeypatch, changes, name):
    monkeypatch.chdir(tmp_path)
    settings = changed(lottery.Config(), dataset="mnist", validation=5000, **changes)
    workdir = rounds.open_workdir(settings, dataclasses.replace(images(), name="mnist"))
    assert workdir.path.name == name


def test_the_papers_preset_has_its_densities():
    """100, 51.3, 21.1 and 3.6 % after 0, 3, 7 and 15 rounds: as the paper counts, without biases."""
    config = changed(lottery.Config(), **lottery.defaults("paper"))
    settings = config.tickets
    sizes = {"hidden": 784 * 300 + 300 * 100, "output": 100 * 10}
    series = []
    for _ in range(settings.rounds + 1):
        series.append(100 * sum(sizes.values()) / 266_200)
        sizes = {
            name: sm.keep_count(1 - (settings.fraction / 2 if name == "output" else settings.fraction), size)
            for name, size in sizes.items()
        }
    assert [round(series[n], 1) for n in (0, 3, 7, 15)] == [100, 51.3, 21.1, 3.6]
    assert flat(config)["batch_size"] == 60


# Batch statistics belong to a network.


class WithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, use_bias=False, name="dense_0")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))
        return nn.Dense(10, use_bias=False, name="dense_1")(x)


@pytest.fixture
def with_statistics(monkeypatch):
    def make(model, init, classes, image_shape):
        draw = sm.initializers.kaiming_uniform
        return Network(WithStatistics(), "dense_0/kernel", "dense_1/kernel", image_shape, draw)

    monkeypatch.setattr(trainer_room, "network", make)


def statistics(snapshot):
    return np.concatenate([np.asarray(leaf) for leaf in by_path(snapshot.model_state).values()])


@pytest.mark.slow
def test_statistics_are_drawn_stored_and_rewound_with_the_weights(tmp_path, with_statistics):
    trainer = a_trainer(tmp_path)
    begin, key = trainer.draw(jax.random.key(1)), jax.random.key(2)
    np.testing.assert_array_equal(begin.weights["norm"]["scale"], np.ones(8))
    masks = full_masks(begin.weights)
    early = trainer.train(Candidate("early", begin, masks, key, last_step=12)).drawn
    at_end = trainer.train(Candidate("whole", begin, masks, key)).drawn
    seen = [statistics(snapshot) for snapshot in (begin, early, at_end)]
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])
    stored = read_arrays(tmp_path / "run/networks/early.npz")
    names = {f"model_state/{path}" for path in by_path(early.model_state)}
    assert names == {name for name in stored if name.startswith("model_state/")} != set()
    measured = trainer.train(Candidate("rewound", early, masks, key, first_step=12)).record["curve"]
    figures = trainer.evaluate(early, masks)
    assert measured["validation_loss"][0] == pytest.approx(figures["validation_loss"])
    fresh = trainer.evaluate(early._replace(model_state=begin.model_state), masks)
    assert abs(fresh["validation_loss"] - figures["validation_loss"]) > 1e-3


STEPS = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "steps", "drop_at": (0.5,)}


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "rewind_step"), [("learning-rate", 0), ("learning-rate", 5), ("finetune", 0)])
def test_a_round_goes_on_from_the_end_of_the_round_before(tmp_path, with_statistics, kept, rewind_step):
    """Weights and statistics are those of the file before, and the end is that of training from there by itself."""
    falling = {**STEPS, "schedule": "exponential", "drop_at": (), "final_rate": 0.1}  # past its end too
    settings = config(tmp_path, **falling, kept=kept, rewind_step=rewind_step, stability=True)
    summary = rounds.run(settings, images())
    alone = falling if kept == "learning-rate" else {"optimizer": "sgd", "learning_rate": 0.1 * 0.1 ** (29 / 30)}
    trainer = a_trainer(tmp_path / "alone", **alone)
    like = trainer.draw(jax.random.key(0))
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    for number in (1, 2):
        files = [tmp_path / f"run/networks/trial0-round{n}-ticket.npz" for n in (number - 1, number)]
        before, after = (trainer_room._restored(like, read_arrays(file)) for file in files)
        kept_now = read_arrays(files[1])
        masks = full_masks(like.weights)
        masks = map_with_name(lambda path, mask, a=kept_now: jnp.asarray(a[f"masks/{path}"], mask.dtype), masks)
        curve = next(r for r in summary["networks"] if (r["round"], r["network"]) == (number, "ticket"))["curve"]
        assert curve["step"][0] == rewind_step and curve["step"][-1] == 30
        assert curve["validation_loss"][0] == pytest.approx(trainer.evaluate(before, masks)["validation_loss"])
        order = leaf_key(key, f"order of round {number}")
        candidate = Candidate(f"alone {number}", before, masks, order, rewind_step)
        by_itself = trainer.train(candidate).drawn
        for one, other in zip(after, by_itself, strict=True):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *kept_of(one, other, masks)
            )
    assert all("instability" in r for r in summary["networks"] if r["network"] == "ticket")


def kept_of(one, other, masks):
    """Both trees, weights under the masks."""
    under = {path: np.asarray(mask) for path, mask in by_path(masks).items()}
    return [{path: leaf * under.get(path, 1) for path, leaf in by_path(tree).items()} for tree in (one, other)]


@pytest.mark.slow
def test_the_stability_of_a_resnet_that_is_rewound_is_measured_and_drawn(tmp_path, monkeypatch):
    setting, _, label = questions.SWEEPS["rewind"]
    monkeypatch.setitem(questions.SWEEPS, "rewind", (setting, (0, 4), label))
    given = images()
    colours = [np.repeat(a, 3, axis=3) for a in (given.train.images, given.test.images)]
    arrays = colours[0], given.train.labels, colours[1], given.test.labels
    coloured = arrays_dataset("colours", arrays, "made up")
    small = {"model": "resnet-20", "widen": 0.125, "affine": True, "init": "kaiming-normal", "weight_decay": 1e-4}
    settings = config(tmp_path, **STEPS, **small, sweep="rewind", scope="global", flip=True, controls=(), steps=8)
    rows = questions.run(settings, coloured)["rows"]
    assert [row["value"] for row in rows] == [0, 4]
    assert all(0 < row["instability"] < 2 for row in rows)
    assert (tmp_path / "run/sweep.png").stat().st_size > 2_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"rewind_step": 5}, {**STEPS, "kept": "learning-rate", "rewind_step": 5}, {**STEPS, "kept": "finetune"}]
)
def test_an_interrupted_network_with_statistics_ends_the_same(tmp_path, with_statistics, changes):
    changes = {"rounds": 1, **changes}
    whole = rounds.run(config(tmp_path / "whole", **changes), images())
    calls = []

    def stop_once():
        calls.append(0)
        return len(calls) == 4

    settings = config(tmp_path, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "stopping", lambda: contextlib.nullcontext(stop_once))
        with pytest.raises(Interrupted, match="stopped by a signal"):
            rounds.run(settings, images())
    assert without_times(rounds.run(settings, images())) == without_times(whole)
