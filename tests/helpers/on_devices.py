"""The cases that test_parallel.py runs in child processes: one toy on one device, on eight, and on two times four.

    python on_devices.py eight              every case below, as {case: error or null} in JSON, and the toy's results
    python on_devices.py process PORT ID    the toy's results as one of two processes

The toy is made of integers: its sums are exact in any order, so that all ways of running it must agree to the bit.
"""

import functools
import json
import sys
import traceback
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import supermask_jax as sm
from experiments import mnist
from experiments.bench import hlo
from experiments.config.settings import changed
from experiments.data.source import arrays_dataset
from experiments.run.placement import Placement
from experiments.training import stepper
from experiments.training.parts import Parts
from supermask_jax import parallel
from supermask_jax.threshold import SAMPLE

STEPS, EXAMPLES, COUNTED = 5, 32, 16  # the rest of the batch is padding, of weight 0: whole devices of it
DENSITY = 0.3
SHAPES = {"a": (8, 16), "b": (16, 3), "bias": (3,)}  # 8 divides both axes, the first, and none
TX = optax.sgd(1 / 8, 0.5)
compiled = []


def note(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(seconds)


def toy_state(seed=0):
    rng = np.random.default_rng(seed)
    weights = {name: rng.choice([-1, 1], shape).astype(np.float32) for name, shape in SHAPES.items()}
    scores = {name: rng.integers(-8, 9, shape).astype(np.float32) / 8 for name, shape in SHAPES.items()}  # many tie
    subnet = sm.Subnet(*jax.tree.map(jnp.asarray, (weights, scores | {"bias": None})))
    return sm.init_state(subnet, TX, jax.random.key(seed), learns="scores")


def toy_batch(t):
    rng = np.random.default_rng([7, t])
    x, y = rng.integers(-1, 2, (EXAMPLES, 8)), rng.integers(-3, 4, (EXAMPLES, 3))
    weight = np.arange(EXAMPLES) < COUNTED
    return {name: value.astype(np.float32) for name, value in {"x": x, "y": y, "weight": weight}.items()}


def toy_loss(axis_name=None):
    """The weighted mean of absolute errors; its metrics tell the masks and what the step's key draws."""

    def loss_fn(params, model_state, batch, key):
        outputs = nn.relu(batch["x"] @ params["a"]) @ params["b"] + params["bias"][None]
        errors = jnp.abs(outputs - batch["y"]).sum(axis=1)
        draw = jax.random.uniform(key)
        metrics = {"draw": draw, "draw squared": draw**2, "sum": errors @ batch["weight"]}
        masks = {name: jnp.abs(params[name]) for name in "ab"}  # weights are 1 and -1
        return parallel.weighted_mean(errors, batch["weight"], axis_name), (model_state, metrics | masks)

    return loss_fn


def run(step, state, place_batch, batch=toy_batch):
    """(state, metrics of each step) after STEPS steps, of which only the first may compile anything."""
    seen = []
    for t in range(STEPS):
        placed = place_batch(batch(t))
        before = len(compiled)
        state, metrics = jax.block_until_ready(step(state, placed))
        assert (len(compiled) > before) == (t == 0), f"step {t}: {len(compiled) - before} compilations"
        seen.append(jax.tree.map(np.asarray, metrics))
    return state, seen


@functools.cache
def on_one_device():
    step = sm.jit(sm.make_train_step(sm.edge_popup(DENSITY), toy_loss(), TX, learns="scores"))
    return run(step, toy_state(), lambda batch: batch)


@functools.cache
def on_a_mesh(shard_scores, batch=toy_batch):
    mesh, state = parallel.mesh(), toy_state()
    shardings = parallel.state_shardings(mesh, state, shard_scores)
    step = sm.jit(
        sm.make_train_step(sm.edge_popup(DENSITY), toy_loss(), TX, learns="scores"),
        out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
    placed = parallel.place_state(mesh, state, shard_scores)
    end, seen = run(step, placed, lambda b: parallel.shard_batch(mesh, b), batch)
    assert jax.tree.map(lambda leaf: leaf.sharding, end) == shardings
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "donating the copy deleted the original"
    return end, seen


@functools.cache
def under_pmap(batch=toy_batch):
    step = parallel.pmap_step(sm.edge_popup(DENSITY), toy_loss(parallel.AXIS), TX, learns="scores")
    return run(step, toy_state(), lambda batch: batch, batch)


def told(seen):
    """The losses and masks of every step, for JSON."""
    return [{name: metrics[name].tolist() for name in ("loss", "a", "b")} for metrics in seen]


def assert_same_run(way, one):
    assert told(way[1]) == told(one[1])
    for name in ("subnet", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(way[0], name), getattr(one[0], name))


def assert_same_on_each_device(tree):
    for leaf in jax.tree.leaves(tree):
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:  # each is that device's own
            np.testing.assert_array_equal(shard.data, leaf)


# The cases on eight devices.


def case_the_masks_of_the_toy_change_and_keep_their_counts():
    _, seen = on_one_device()
    for name in "ab":
        masks = [metrics[name] for metrics in seen]
        assert all(mask.sum() == sm.keep_count(DENSITY, mask.size) for mask in masks)
        assert len({mask.tobytes() for mask in masks}) > 2


def case_a_mesh_gives_the_losses_scores_and_masks_of_one_device_and_a_second_step_compiles_nothing():
    assert_same_run(on_a_mesh(shard_scores=False), on_one_device())


def case_sharded_scores_give_the_losses_scores_and_masks_of_one_device_and_a_second_step_compiles_nothing():
    assert_same_run(on_a_mesh(shard_scores=True), on_one_device())


def case_pmap_gives_the_losses_scores_and_masks_of_one_device_and_a_second_step_compiles_nothing():
    assert_same_run(under_pmap(), on_one_device())


def case_shards_are_along_the_largest_axis_that_the_devices_divide_and_along_the_last_only_where_there_is_no_other():
    mesh, state = parallel.mesh(), toy_state()
    placed = parallel.place_state(mesh, state, shard_scores=True)
    expected = {"a": (1, 16), "b": (2, 3), "bias": (3,)}
    for tree in (placed.subnet.weights, placed.subnet.scores, placed.opt_state[0].trace):
        leaves = {name: leaf for name, leaf in tree.items() if leaf is not None}
        assert len(leaves) >= 2 and all(len(leaf.sharding.device_set) == 8 for leaf in leaves.values())
        assert all(leaf.addressable_shards[0].data.shape == expected[name] for name, leaf in leaves.items())
    assert placed.key.is_fully_replicated and placed.step.is_fully_replicated
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(parallel.place_state(mesh, state)))
    shapes = jax.eval_shape(toy_state)
    assert parallel.state_shardings(mesh, shapes, True) == parallel.state_shardings(mesh, state, True)


def case_a_tree_is_replicated_from_wherever_it_is():
    tree = {"there": jax.device_put(jnp.arange(3), jax.devices()[5]), "host": np.ones(2, np.float32), "none": None}
    copy = parallel.replicate(parallel.mesh(), tree)
    assert copy["none"] is None and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(copy))
    assert [int(shard.data[2]) for shard in copy["there"].addressable_shards] == [2] * 8


def case_pmap_replicas_keep_the_same_scores_and_masks_and_draw_their_own_dropout():
    state, seen = under_pmap()
    assert_same_on_each_device(state.subnet)
    for metrics in seen:  # means over the devices
        assert {*metrics["a"].flat} == {*metrics["b"].flat} == {0, 1}
        assert metrics["draw squared"] - metrics["draw"] ** 2 > 0.01, "the devices drew the same"
    assert len({float(metrics["draw"]) for metrics in seen}) == STEPS


def case_pmap_divides_sums_by_the_number_of_devices():
    (_, over), (_, one) = under_pmap(), on_one_device()
    assert [float(m["sum"]) * 8 for m in over] == [float(m["sum"]) for m in one]


def case_pmap_donates_only_with_donate_and_takes_as_many_devices_as_it_is_told():
    for donate in (False, True):
        state = toy_state()
        weights = state.subnet.weights
        state = sm.init_state(
            sm.Subnet(weights, jax.tree.map(lambda _: None, weights)), TX, state.key, learns="weights"
        )
        loss_fn = toy_loss(parallel.AXIS)
        step = parallel.pmap_step(sm.identity, loss_fn, TX, learns="weights", devices=4, donate=donate)
        end, _ = step(state, toy_batch(0))
        assert weights["a"].is_deleted() == donate
        assert len(end.subnet.weights["a"].sharding.device_set) == 4


class Normalised(nn.Module):
    axis_name: str | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.5, axis_name=self.axis_name)(x)
        x = nn.Dropout(self.dropout, deterministic=False)(nn.relu(x))
        return nn.Dense(3)(x)


def normalised_state(tx):
    made = Normalised().init({"params": jax.random.key(3), "dropout": jax.random.key(4)}, jnp.ones((2, 8)))
    scores = sm.zero_scores(made["params"])
    state = sm.Subnet(made["params"], scores)
    return sm.init_state(state, tx, jax.random.key(5), made["batch_stats"], learns="scores")


def normalised_loss(model):
    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, "batch_stats": model_state}
        out, new = model.apply(variables, batch["x"], rngs={"dropout": key}, mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), (new["batch_stats"], {})

    return loss_fn


def real_batch(t):
    rng = np.random.default_rng([8, t])
    scale = 1 + np.arange(EXAMPLES)[:, None] / EXAMPLES  # so that the devices' own statistics differ
    return {"x": (rng.normal(size=(EXAMPLES, 8)) * scale).astype(np.float32), "y": np.ones((EXAMPLES, 3), np.float32)}


def assert_close_run(way, one):
    np.testing.assert_allclose([m["loss"] for m in way[1]], [m["loss"] for m in one[1]], rtol=1e-5)
    for name in ("subnet", "model_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6),
            getattr(way[0], name), getattr(one[0], name),
        )  # fmt: skip


def case_on_a_mesh_batch_statistics_dropout_and_drawn_masks_are_those_of_one_device():
    loss_fn, tx = normalised_loss(Normalised(dropout=0.3)), optax.sgd(0.1)
    step, state = sm.make_train_step(sm.bernoulli(), loss_fn, tx, learns="scores"), normalised_state(tx)
    one = run(sm.jit(step), state, lambda batch: batch, real_batch)
    mesh = parallel.mesh()
    for sharded in (False, True):
        over = sm.jit(step, out_shardings=(parallel.state_shardings(mesh, state, sharded), None))
        placed = parallel.place_state(mesh, state, sharded)
        assert_close_run(run(over, placed, lambda batch: parallel.shard_batch(mesh, batch), real_batch), one)


def case_under_pmap_batch_statistics_with_the_axis_name_are_those_of_one_device():
    tx = optax.sgd(0.1)
    step = sm.make_train_step(sm.bernoulli(), normalised_loss(Normalised()), tx, learns="scores")
    one = run(sm.jit(step), normalised_state(tx), lambda batch: batch, real_batch)

    def over(axis_name):
        step = parallel.pmap_step(sm.bernoulli(), normalised_loss(Normalised(axis_name)), tx, learns="scores")
        return run(step, normalised_state(tx), lambda batch: batch, real_batch)

    assert_close_run(over(parallel.AXIS), one)
    apart, _ = over(None)
    assert_same_on_each_device(apart.model_state)
    lower, whole = (state.model_state["BatchNorm_0"]["var"] for state in (apart, one[0]))
    assert np.all(np.asarray(lower) < np.asarray(whole) - 1e-3)  # they miss what lies between the devices


def case_more_devices_than_there_are_are_refused():
    assert parallel.mesh(3).size == 3 and parallel.mesh().size == 8
    for count in (0, 9):
        for make in (
            parallel.mesh,
            lambda n: parallel.pmap_step(sm.edge_popup(0.3), None, TX, learns="scores", devices=n),
        ):
            refuses(lambda make=make, count=count: make(count), f"asked for {count} devices; there are 8")


def case_a_batch_that_the_devices_do_not_divide_is_refused():
    batch = {"image": np.ones((8, 2)), "label": np.ones(12)}
    step = parallel.pmap_step(sm.edge_popup(0.3), None, TX, learns="scores")
    for give in (lambda b: parallel.shard_batch(parallel.mesh(), b), lambda b: step(None, b)):
        refuses(lambda give=give: give(batch), "a batch of 12 examples ('label') does not divide over 8 devices")
        refuses(lambda give=give: give({"label": np.float32(1)}), "'label' of the batch has no first axis")


def refuses(call, message):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def traffic(inputs, hidden, shard_scores):
    """(the collectives in selection, all others, number of scores) of a compiled train step of two layers."""

    def mask_fn(scores, key):
        with jax.named_scope("selection"):
            return sm.edge_popup(DENSITY)(scores, key)

    def loss_fn(params, model_state, batch, key):
        return jnp.mean((nn.relu(batch["x"] @ params["first"]) @ params["last"]) ** 2), (model_state, {})

    weights = {"first": jnp.ones((inputs, hidden)), "last": jnp.ones((hidden, 16))}
    subnet = sm.Subnet(weights, sm.init_scores(jax.random.key(1), weights))
    mesh, state = parallel.mesh(), sm.init_state(subnet, TX, jax.random.key(2), learns="scores")
    step = sm.jit(
        sm.make_train_step(mask_fn, loss_fn, TX, learns="scores"),
        out_shardings=(parallel.state_shardings(mesh, state, shard_scores), None),
    )
    batch = parallel.shard_batch(mesh, {"x": np.ones((32, inputs), np.float32)})
    program = step.lower(parallel.place_state(mesh, state, shard_scores), batch).compile().as_text()
    seen = hlo.collectives(program)
    selection = [one for one in seen if "selection" in one.name]
    return selection, [one for one in seen if "selection" not in one.name], (inputs + 16) * hidden


def case_selection_of_sharded_scores_exchanges_counts_and_samples_however_many_scores_there_are():
    layers = 2
    for inputs, hidden in ((64, 32), (2048, 256)):
        selection, _, scores = traffic(inputs, hidden, shard_scores=True)
        in_passes = [one for one in selection if one.data_loops > 1]
        assert any(one.kind == "all-reduce" for one in in_passes), "not sharded at all"
        assert all(sum(one.arrays) <= layers for one in in_passes), in_passes
        assert all(max(one.arrays) <= 2 * SAMPLE for one in selection), selection
        assert sum(one.bytes for one in selection) <= layers * 4 * SAMPLE * 4, selection
    assert scores > 500 * 2 * SAMPLE


def case_a_collective_in_a_loop_or_a_branch_has_the_trips_that_are_known():
    split = jax.NamedSharding(parallel.mesh(), jax.P(parallel.AXIS))

    def fixed(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: x + jnp.sum(jnp.sin(x)), x)

    def until_large(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 100, fixed, x)

    def sometimes(x):
        return jax.lax.cond(x[0] > 0, until_large, lambda x: x, x)

    for function, data_loops in ((fixed, 0), (until_large, 1), (sometimes, 1)):
        x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split)
        seen = hlo.collectives(sm.jit(function).lower(x).compile().as_text())
        (inner,) = [one for one in seen if one.trips > 1]
        expected = inner._replace(kind="all-reduce", arrays=[1], bytes=4, trips=7, data_loops=data_loops)
        assert inner == expected, seen


def case_replicated_scores_are_selected_without_any_exchange():
    selection, others, scores = traffic(64, 32, shard_scores=False)
    assert selection == []
    assert {one.kind for one in others} == {"all-reduce"}
    assert sum(one.bytes for one in others) == 4 * (scores + 1), others  # the gradients and the loss


def case_with_sharded_scores_the_step_of_the_main_job_gathers_weights_and_samples_and_no_activations():
    layers, images, labels = 3, np.zeros((64, 28, 28, 1), np.uint8), np.zeros(64, np.int32)
    dataset = arrays_dataset("blank", (images, labels, images[:1], labels[:1]), "zeros", mean=(0.1,), std=(0.3,))
    small = {"model": "cnn", "width": 64, "depth": 2, "batch_size": 64, "shard_scores": True}
    config, placement = changed(mnist.Config(), **mnist.defaults(), **small), Placement(8, shard_scores=True)
    parts = Parts(config, dataset, None, placement)
    state = sm.init_state(parts.method.subnet, parts.tx, jax.random.key(2), learns=parts.method.learns)
    order = parts.epochs.order(jax.random.key(3), 0)
    parts.stepper(placement.place(state), placement.replicate(stepper.zero_totals()), order, 0, 1)
    (program,) = parts.stepper._compiled.values()
    moved = sum(one.bytes for one in hlo.collectives(program.as_text()) if one.kind != "all-reduce")
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(parts.method.subnet.weights))
    assert size <= moved <= size + layers * 2 * 4 * SAMPLE * 4, (moved, size)


def case_saliencies_and_growth_on_a_mesh_and_under_pmap_are_those_of_the_whole_batch_on_one_device():
    weights = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(EXAMPLES, 6)), jnp.float32)

    def loss(params, state, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["kernel"]) ** 2), (state, {})

    subnet = sm.Subnet(weights, {"kernel": jnp.ones((6, 4))})
    mesh = parallel.mesh()
    for score in (
        lambda batch, **name: sm.saliency.snip(loss, weights, batch, **name),
        lambda batch, **name: sm.saliency.grasp(loss, weights, [batch], **name),
        lambda batch, **name: sm.dynamic.dense_gradient(loss, subnet, batch, **name),
    ):
        one = np.asarray(score(batch)["kernel"])
        sharded = jax.jit(score)(parallel.shard_batch(mesh, batch))["kernel"]
        np.testing.assert_allclose(sharded, one, rtol=1e-5, atol=1e-8)
        parts = batch.reshape(8, -1, 6)
        for part in jax.pmap(functools.partial(score, axis_name="devices"), "devices")(parts)["kernel"]:
            np.testing.assert_allclose(part, one, rtol=1e-5, atol=1e-8)


def main_eight():
    assert jax.device_count() == 8
    errors = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            errors[name] = None
            try:
                case()
            except Exception:
                errors[name] = traceback.format_exc()
    print(json.dumps(errors | {"toy": told(on_one_device()[1])}))


def main_process(port, process_id):
    parallel.initialize(f"127.0.0.1:{port}", 2, process_id)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)

    def share(t):
        half = EXAMPLES // 2
        return jax.tree.map(lambda leaf: leaf[process_id * half : (process_id + 1) * half], toy_batch(t))

    mesh = parallel.mesh()
    results = {"mesh": told(on_a_mesh(True, share)[1]), "pmap": told(under_pmap(share)[1])}
    refuses(lambda: parallel.place_state(mesh, toy_state(seed=process_id)), "the processes pass different values")
    refuses(lambda: parallel.mesh(4), "asked for 4 devices; several processes take part with all 8 of theirs")
    refuses(lambda: parallel.shard_batch(mesh, {"x": np.ones(6)}), "6 examples ('x') does not divide over 4 devices")
    print(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.monitoring.register_event_duration_secs_listener(note)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main_eight() if sys.argv[1] == "eight" else main_process(sys.argv[2], int(sys.argv[3]))
