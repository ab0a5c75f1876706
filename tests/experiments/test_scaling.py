"""What a compiled step exchanges, against the formulae; what selection exchanges, against the number of scores."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICK

from experiments import benchmark, doc_tables
from experiments.bench import hlo, networks, scaling, scaling_step, tables
from experiments.bench.cost_model import CHIPS, Assumed, Network, collective_bytes, cost_model, most_passes, state_bytes
from experiments.faults import child_run, damage, disks, inputs, power, soak, stops, surroundings, table
from supermask_jax.threshold import SAMPLE

DEVICES, BATCH = 8, 16
SMALL, LARGE, NORMALISED = "mnist-convnet", "mlp", "tiny-resnet"  # 1.2 million scores, 25 million, and few
FILES = doc_tables.Config()
FAULTS = (child_run.Fault, child_run.Fault | None)
COMPILED = [
    *((net, layout, BATCH) for net in (SMALL, LARGE, NORMALISED) for layout in ("replicated", "gathered")),
    (LARGE, "sharded", BATCH),
    (LARGE, "gathered", BATCH, False),
]


@pytest.fixture(scope="module")
def compiled():
    """{(network, layout, ...): what `traffic` says}, from one process with eight devices."""
    answers = scaling.in_child(DEVICES, scaling_step.traffic, COMPILED, QUICK)
    return dict(zip((case[:2] + case[3:] for case in COMPILED), answers, strict=True))


@pytest.fixture(scope="module")
def described():
    return {name: networks.describe(name) for name in (SMALL, LARGE, NORMALISED)}


def selection(one):
    return {part: sum(kinds.values()) for part, kinds in one["parts"].items() if "selection" in part}


@pytest.mark.slow
def test_selection_of_split_scores_exchanges_as_many_bytes_a_layer_for_25_million_scores_as_for_1_million(compiled):
    small, large = compiled[SMALL, "gathered"], compiled[LARGE, "gathered"]
    assert (small["scores"], large["scores"]) == (1_199_648, 25_186_304)
    samples = 4 * SAMPLE * 4  # four times a sample of int32: gathered, and what gathering it takes
    for one in (small, large):
        exchanged = selection(one)
        assert exchanged["selection, a pass"] == 4 * one["layers"]
        assert 0 < exchanged["selection, a search"] <= samples * one["layers"]
        assert one["count"]["selection, a pass"] == 1  # all layers in one collective
    assert samples * large["layers"] < large["scores"] / 1000


@pytest.mark.slow
def test_for_the_other_ways_of_running_it_selection_exchanges_no_more(compiled):
    """Where the compiler may move activations, and where the counts are made as CPUs make them."""
    expected = selection(compiled[LARGE, "gathered"])
    assert selection(compiled[LARGE, "sharded"]) == selection(compiled[LARGE, "gathered", False]) == expected


@pytest.mark.slow
def test_selection_of_replicated_scores_exchanges_nothing(compiled):
    for net in (SMALL, LARGE, NORMALISED):
        assert selection(compiled[net, "replicated"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("replicated", "gathered"))
@pytest.mark.parametrize("net", (SMALL, LARGE, NORMALISED))
def test_the_formulae_give_the_bytes_of_the_compiled_step_exactly(compiled, described, net, layout):
    one, network = compiled[net, layout], described[net]
    split = networks.split_layers(network.scores, DEVICES)
    assert split == set(network.scores)  # eight divides something of every layer
    formulae = collective_bytes(network, layout, split, passes=1)
    parts = {part: dict(kinds) for part, kinds in one["parts"].items() if part != "selection, a search"}
    assert parts.pop("batch statistics", {"all-reduce": 0}) == formulae["batch statistics"]
    assert parts.pop("selection, a pass", None) == formulae.get("selection")
    assert parts == {"rest": formulae["gradients and loss"] | formulae.get("weights", {})}
    assert one["state"] == state_bytes(network, DEVICES, layout, split)


@pytest.mark.slow
def test_what_the_compiler_chooses_for_split_scores_is_the_gradients_once_and_the_weights_or_activations(compiled):
    chosen, gathered = compiled[LARGE, "sharded"]["parts"]["rest"], compiled[LARGE, "gathered"]["parts"]["rest"]
    assert chosen != gathered  # or nothing would be left to choose, and docs/scaling.md says otherwise
    assert compiled[LARGE, "sharded"]["state"] == compiled[LARGE, "gathered"]["state"]


def test_networks_are_described_from_their_shapes(described):
    convnet = described[SMALL]
    assert convnet.scores["Dense_0/kernel"] == (9216, 128) and convnet.channels == convnet.norms == 0
    multiplications = 26**2 * 9 * 32 + 24**2 * 9 * 32 * 64 + 9216 * 128 + 1280
    assert convnet.flops == 2 * multiplications
    assert convnet.activations == 26**2 * 32 + 24**2 * 64 + 128 + 10
    normalised = described[NORMALISED]
    inner, out = (16, 32), (64, 128)
    assert normalised.channels == 16 + sum(2 * i + 2 * o for i, o in zip(inner, out, strict=True))
    assert normalised.norms == 1 + 4 + 4


def test_layers_are_split_as_far_as_the_devices_divide_an_axis():
    shapes = {"a": (3, 3, 64, 256), "b": (7, 7, 3, 64), "c": (2048, 1000)}
    assert networks.split_layers(shapes, 8) == {"a", "b", "c"}
    assert networks.split_layers(shapes, 256) == {"a", "c"}
    assert networks.split_layers(shapes, 4096) == set()


@pytest.mark.parametrize(
    ("kind", "bytes_sent"),
    [("all-reduce", 150), ("all-gather", 75), ("all-to-all", 75), ("reduce-scatter", 300), ("collective-permute", 100)],
)
def test_a_ring_of_four_sends_for_a_result_of_100_bytes(kind, bytes_sent):
    assert hlo.wire_bytes(kind, 100, 4) == bytes_sent
    with pytest.raises(ValueError, match="no collective 'gossip'"):
        hlo.wire_bytes("gossip", 100, 4)


def test_the_cost_of_a_step_by_hand():
    network = Network({"a": (10, 20), "b": (3, 5)}, channels=7, norms=2, flops=1000, activations=50)
    chip, assumed = CHIPS["TPU v5p"]._replace(flops=1e6, bandwidth=1e6, link=1e6), Assumed(0.5, 0.25, 0.125, 1e-3)
    cost = cost_model(network, 4, 6, chip, "gathered", {"a"}, passes=9, assumed=assumed)
    own = 200 // 4 + 15
    assert cost.state == 4 * (3 * own + 2 * 7)
    assert cost.temporary == 4 * (2 * 215 + own)
    assert cost.activations == 4 * 50 * 6
    assert cost.compute == pytest.approx(3 * 1000 * 6 / 0.5e6)
    assert cost.selection == pytest.approx(9 * 4 * own / 0.25e6)
    reduced, gathered = 4 * (215 + 1) + 16 * 7 + 9 * 4, 4 * 200
    assert cost.sent == pytest.approx((2 * reduced + gathered) * 3 / 4)
    assert cost.wire == pytest.approx(cost.sent / 0.125e6)
    assert cost.latency == pytest.approx((2 * 2 + 1 + 1 + 9) * 2 * 2 * 1e-3)
    assert cost.overlapped < cost.apart == pytest.approx(sum(cost[:5]))
    whole = cost_model(network, 4, 6, chip, passes=9, assumed=assumed)
    assert whole.state == 4 * (3 * 215 + 2 * 7) and whole.sent == pytest.approx(2 * (4 * 216 + 16 * 7) * 3 / 4)


@pytest.mark.slow
def test_passes_over_scores_are_within_the_bound():
    counted = scaling_step.passes(SMALL)
    largest = max(math.prod(shape) for shape in networks.describe(SMALL).scores.values())
    assert counted.keys() == {"uniform", "normal", "tied"}
    assert all(1 <= n <= most_passes(largest) for n in counted.values())
    assert max(counted.values()) <= 16  # 14, 9 and 12 when this was written


@pytest.mark.parametrize("size", (3, 10, 17, 100, 512))
def test_a_layer_that_the_sample_holds_whole_takes_one_pass_or_three_where_scores_tie(size):
    scores = np.random.default_rng(size).standard_normal(size, np.float32)
    assert scaling_step.count_passes({"": jnp.asarray(scores)}) == 1
    assert scaling_step.count_passes({"": jnp.zeros(size, jnp.float32)}) == 3


@pytest.mark.parametrize("sizes", ((10, 17), (512, 300), (600, 1023, 40)))
def test_so_do_several_such_layers_in_one_array(sizes):
    scores = {str(n): np.random.default_rng(n).standard_normal(n, np.float32) for n in sizes}
    assert scaling_step.count_passes(scores) == 1
    assert scaling_step.count_passes({name: np.zeros_like(layer) for name, layer in scores.items()}) == 3


@pytest.mark.parametrize("seed", range(3))
def test_smooth_scores_take_few_passes_also_where_the_threshold_is_near_zero(seed):
    """There, keys are far from linear in the scores: interpolating keys took 12 to 23 passes."""
    scores = np.random.default_rng(seed).standard_normal(100_000, np.float32)
    assert scaling_step.count_passes({"": jnp.asarray(scores)}) <= 10
    assert scaling_step.count_passes({"": jnp.asarray(np.abs(scores))}) <= 10


@pytest.mark.slow
def test_devices_of_a_child_step_and_its_figures_become_rows(compiled):
    speed = scaling.in_child(2, scaling_step.speed, [([2], 4, 1)], scaling.QUICK)[0]
    seconds = speed["2"]
    assert seconds.keys() == {*scaling_step.LAYOUTS, "pmap", "selection, replicated", "selection, sharded"}
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())
    kinds = {"uniform": 9, "normal": 8, "tied": 7}
    measured = {
        "traffic": list(compiled.values()),
        "passes": dict.fromkeys((SMALL, LARGE, NORMALISED), kinds),
        "speed": speed,
    }
    rows = scaling.rows(measured)
    assert {line["unit"] for line in rows} == {"steps/s", "%", "MB", "bytes", "kB", "passes"}
    assert all(0 <= line["median"] < math.inf for line in rows)
    json.dumps(rows)


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)traffic on 1 fake devices failed.*no-such-net"):
        scaling.in_child(1, scaling_step.traffic, [("no-such-net", "replicated", 8)])


def test_the_scaling_flag_measures_that_and_nothing_else(monkeypatch, tmp_path, capsys):
    measured = {"traffic": [], "passes": {SMALL: {"normal": 9}}, "speed": {}}
    monkeypatch.setattr(scaling, "measure", lambda rounds: measured if rounds == 3 else None)
    file = tmp_path / "scaling.json"
    result = benchmark.main(benchmark.Config(rounds=3, scaling=True, output=str(file)))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert result.keys() == {"about", "rows", *measured}
    assert "9.00 passes" in capsys.readouterr().out


def test_the_faults_flag_does_harm_and_tells_what_survived(monkeypatch, tmp_path, capsys):
    def flood(scratch):
        assert scratch.is_dir()
        return child_run.make_fault("flood", [{"survived": n > 2, "said": "blub"} for n in range(7)])

    def all_faults(kills, soak_seconds):
        assert (kills, soak_seconds) == (5, 9)
        return [flood, lambda scratch: None, drought]  # the second cannot be done here

    def drought(scratch):
        raise child_run.Failed("no rain")

    monkeypatch.setattr(table, "all_faults", all_faults)
    file = tmp_path / "faults.json"
    result = benchmark.main(benchmark.Config(faults=True, kills=5, soak_seconds=9, output=str(file)))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    seen, failed = result["faults"]
    assert failed["survived"] == 0 and "no rain" in failed["lost"][0]
    assert (seen["fault"], seen["tries"], seen["survived"], len(seen["lost"])) == ("flood", 7, 4, 3)
    assert "blub" in seen["lost"][0] and re.search(r"flood\W+7\W+4\W", capsys.readouterr().out)
    assert "| flood | 4 of 7 |" in tables.faults_table(result)


def test_every_fault_is_in_the_table_and_has_a_name_of_its_own():
    faults = table.all_faults(kills=8, soak_seconds=60)
    done = [(getattr(fault, "func", fault), getattr(fault, "keywords", {})) for fault in faults]
    rooms = (damage, disks, inputs, power, soak, stops, surroundings)
    public = [value for room in rooms for name, value in vars(room).items() if name[0] != "_"]
    there = {each for each in public if getattr(each, "__annotations__", {}).get("return") in FAULTS}
    assert {function for function, _ in done} == there - {child_run.make_fault}
    assert sum(more["tries"] for function, more in done if function is stops.kills) == 8


@pytest.mark.slow
def test_the_figures_of_the_document_are_those_of_the_compiled_step(compiled):
    """Of what is quick to compile and does not depend on the batch."""
    kept = {
        (one["network"], one["layout"]): one
        for one in json.loads((FILES.figures / "scaling.json").read_text())["traffic"]
        if one["as_on_accelerators"]
    }
    for net in (SMALL, LARGE):
        for layout in ("replicated", "gathered"):
            one, now = kept[net, layout], compiled[net, layout]
            assert scaling.totals(one)["others"] == scaling.totals(now)["others"]
            assert (one["scores"], one["layers"], one["state"]) == (now["scores"], now["layers"], now["state"])
