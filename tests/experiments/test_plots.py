"""Invariants of the pictures of runs, and of `experiments.overlay`, on small networks and runs made by hand."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from experiments import overlay
from experiments.config.registry import METHODS
from experiments.plots import lines, style
from experiments.plots import one_run as plots
from experiments.run import files
from experiments.run.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib's: no handles, no room, no glyph, equal limits

PICTURES = ("curves.png", "layers.png", "kernels.png", "flips.png")
CONVNET = {"Conv_0": (3, 3, 1, 32), "Conv_1": (3, 3, 32, 8), "Dense_0": (200, 16), "Dense_1": (16, 10)}
LENET = {"Dense_0": (784, 300), "Dense_1": (300, 100), "Dense_2": (100, 10)}
DEEP = {f"Block_{i}": (3, 3, 4, 4) for i in range(53)} | {"Stem": (7, 7, 3, 64)}


@pytest.fixture(autouse=True)
def _few_dots(monkeypatch):
    monkeypatch.setattr(style, "DOTS_PER_INCH", 50)


def network(shapes, masks="popup", density=0.3):
    """(weights, scores, masks) of kernels of these shapes; masks: how they come from the scores, or "none"."""
    rng = np.random.default_rng(0)
    weights, scores, kept = {}, {}, {}
    for name, shape in shapes.items():
        weight, score = rng.normal(size=(2, *shape)).astype(np.float32)
        if masks == "none":
            score = mask = None
        elif masks == "fixed":
            score = mask = (rng.random(shape) < density).astype(np.float32)
        else:
            rank = abs(score) if masks == "popup" else score
            mask = (rank >= np.quantile(rank, 1 - density)).astype(np.float32)
        for tree, leaf in ((weights, weight), (scores, score), (kept, mask)):
            tree[name] = {"kernel": leaf}
        weights[name]["bias"], scores[name]["bias"], kept[name]["bias"] = np.zeros(shape[-1], np.float32), None, None
    return weights, scores, kept


def run_of(shapes, masks, epochs=3, flips=None, split="test", method="edge-popup", seed=3, last=0.97):
    """(summary, records) of a run on them; flips: in every epoch and layer, by default falling."""
    layers = {}
    for name, shape in sorted(shapes.items()):
        size, mask = int(np.prod(shape)), masks[name]["kernel"]
        kept = size if mask is None else int(mask.sum())
        layers[f"{name}/kernel"] = {"size": size, "kept": kept, "density": kept / size}
    density = sum(v["kept"] for v in layers.values()) / sum(v["size"] for v in layers.values())
    records = [{"epoch": 0, "step": 0, f"{split}_loss": 2.5, f"{split}_accuracy": 0.1}]
    for epoch in range(1, epochs + 1):
        flipped = {} if method == "dense" else {k: v["size"] // 2**epoch for k, v in layers.items()}
        records.append(
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "train_loss": 1 / epoch,
                "train_accuracy": 1 - 0.2 / epoch,
                f"{split}_loss": 1.1 / epoch,
                f"{split}_accuracy": last - 0.2 / epoch + 0.2 / epochs,
                "flips": flipped if flips is None else dict.fromkeys(flipped, flips),
            }
        )
    summary = {
        "method": method,
        "dataset": "mnist-5k",
        "model": "convnet",
        "density": density,
        "layers": layers,
        "epochs": epochs,
        "seed": seed,
        "test_accuracy": last,
        "config": {
            "method": method,
            "preset": "best",
            "model": "convnet",
            "density": round(density, 2),
            "learning_rate": 0.1,
            "seed": seed,
            "workdir": f"w{seed}",
        },
    }
    return summary, records


def named(tree):
    return {f"{name}/kernel": np.asarray(v["kernel"]) for name, v in tree.items() if v["kernel"] is not None}


def saved(folder, summary, records):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def decoded(file):
    with PIL.Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def assert_drawn(ax):
    """Every point of every line is finite and inside the limits, so that none is lost."""
    low, high = sorted(ax.get_ylim())
    for line in ax.lines:
        values = np.asarray(line.get_ydata(), float)
        assert np.isfinite(values).all() and (low <= values).all() and (values <= high).all()


@pytest.mark.parametrize(
    "shapes, masks",
    [(CONVNET, "popup"), (CONVNET, "none"), (LENET, "popup"), pytest.param(DEEP, "popup", marks=pytest.mark.slow)],
    ids=["convnet", "dense", "lenet", "deep"],
)
def test_a_run_leaves_pictures_of_something(tmp_path, shapes, masks):
    method = "dense" if masks == "none" else "edge-popup"
    trees = network(shapes, masks)
    plots.draw_run(tmp_path, *run_of(shapes, trees[2], method=method), *map(named, trees))
    expected = PICTURES[:3] if masks == "none" else PICTURES  # where nothing is masked no mask can flip
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(expected)
    for name in expected:
        assert decoded(tmp_path / name).std() > 5


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "validation"])
def test_one_epoch_is_enough(tmp_path, split):
    trees = network(CONVNET)
    plots.draw_run(tmp_path, *run_of(CONVNET, trees[2], epochs=1, split=split), *map(named, trees))
    assert all(decoded(tmp_path / name).std() > 5 for name in PICTURES)


def test_every_picture_says_what_it_is_of():
    weights, scores, kept = map(named, network(CONVNET))
    summary, records = run_of(CONVNET, network(CONVNET)[2])
    for figure in (
        plots.curves(summary, records),
        plots.layers(summary, weights, scores, kept),
        plots.kernels(summary, weights, kept),
        plots.flips(summary, records),
    ):
        title = figure.get_suptitle()
        assert all(word in title for word in ("edge-popup", "mnist-5k", f"density {summary['density']:.4g}", "seed 3"))


@pytest.mark.parametrize("method, before", [("edge-popup", "random subnetwork"), ("dense", "random network")])
def test_curves_say_what_epoch_0_is_and_where_they_end(method, before):
    figure = plots.curves(*run_of(CONVNET, network(CONVNET)[2], method=method, last=0.9725))
    assert any(f"before training ({before}): 10.00%" in text for text in texts(figure))
    assert any("test: 97.25% at the end" in text for text in texts(figure))


@pytest.mark.parametrize("perfect", [False, True], ids=["imperfect", "perfect"])
def test_curves_show_every_point_and_put_the_better_higher(perfect):
    summary, records = run_of(CONVNET, network(CONVNET)[2], epochs=5)
    if perfect:
        records[-1].update(train_accuracy=1.0, test_accuracy=1.0, train_loss=0.0)
    accuracy, loss = plots.curves(summary, records).axes
    assert_drawn(accuracy)
    assert_drawn(loss)
    ticks = dict(zip([t.get_text() for t in accuracy.get_yticklabels()], accuracy.get_yticks(), strict=True))
    bottom, top = accuracy.get_ylim()
    assert top < ticks["90"] < ticks["80"] < bottom
    assert ("100" in ticks) == perfect


def test_an_accuracy_that_is_not_finite_does_not_stop_the_pictures(tmp_path):
    trees = network(CONVNET)
    summary, records = run_of(CONVNET, trees[2])
    records[1]["test_loss"] = float("nan")
    records[2]["test_loss"] = float("inf")
    plots.draw_run(tmp_path, summary, records, *map(named, trees))
    assert decoded(tmp_path / "curves.png").std() > 5


@pytest.mark.parametrize(
    "masks, of", [("popup", "score magnitude"), ("signed", "score"), ("fixed", "weight magnitude")]
)
def test_histograms_hold_every_weight_and_the_threshold_is_the_smallest_kept(masks, of):
    weights, scores, kept = map(named, network(CONVNET, masks))
    figure = plots.layers(run_of(CONVNET, network(CONVNET, masks)[2])[0], weights, scores, kept)
    assert "kept" in texts(figure) and "dropped" in texts(figure)
    axes = {ax.get_title(): ax for ax in figure.axes}
    for name, mask in kept.items():
        below, all_ = (patch.get_data() for patch in axes[name].patches)
        assert (below.values.sum(), all_.values.sum()) == (mask.sum(), mask.size)
        assert axes[name].get_xlabel() == of
        assert (all_.edges[0] == 0) == ("magnitude" in of)
        if masks == "fixed":
            assert not axes[name].lines
        else:
            rank = scores[name] if masks == "signed" else abs(scores[name])
            assert axes[name].lines[0].get_xdata()[0] == rank[mask == 1].min()


def test_histograms_of_equal_and_of_zero_weights_can_be_drawn():
    weights = {"a/kernel": np.full((4, 4), -0.5, np.float32), "b/kernel": np.zeros((4, 4), np.float32)}
    summary, _ = run_of({"a": (4, 4), "b": (4, 4)}, network({"a": (4, 4), "b": (4, 4)}, "none")[2])
    figure = plots.layers(summary, weights, {}, {})
    for ax in figure.axes[1:]:
        all_ = ax.patches[1].get_data()
        assert all_.values.sum() == 16 and (np.diff(all_.edges) > 0).all()


@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_that_keeps_all_or_nothing_has_no_threshold(value):
    weights, scores, kept = map(named, network({"a": (4, 4)}))
    kept = {name: np.full_like(mask, value) for name, mask in kept.items()}
    figure = plots.layers(run_of({"a": (4, 4)}, network({"a": (4, 4)})[2])[0], weights, scores, kept)
    assert figure.axes[1].get_xlabel() == "score magnitude" and not figure.axes[1].lines


def test_histograms_of_many_layers_are_few_and_bars_are_of_all():
    weights, scores, kept = map(named, network(DEEP))
    figure = plots.layers(run_of(DEEP, network(DEEP)[2])[0], weights, scores, kept)
    bars, *histograms = figure.axes
    assert len(histograms) == plots.MAX_HISTOGRAMS
    assert any(f"{plots.MAX_HISTOGRAMS} of the 54 layers" in text for text in texts(figure))
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert len(names) == 54 and names.index("Block_2/kernel") < names.index("Block_10/kernel")


def test_kernels_share_a_symmetric_scale_and_what_is_masked_out_is_grey():
    weights, _, kept = map(named, network(CONVNET))
    figure = plots.kernels(run_of(CONVNET, network(CONVNET)[2])[0], weights, kept)
    before, after = figure.axes[:2]
    whole, masked = before.images[0], after.images[0]
    assert whole.get_clim() == masked.get_clim() == (-whole.get_clim()[1], whole.get_clim()[1])
    scale = (24 // 3) ** 2  # each weight is enlarged to 8 x 8 dots
    assert whole.get_array().count() == 288 * scale
    assert masked.get_array().count() == kept["Conv_0/kernel"].sum() * scale
    assert after.images[1].get_array().count() == (288 - kept["Conv_0/kernel"].sum()) * scale
    assert np.array_equal(whole.get_array()[1:-1:8, 1:-1:8][:3, :3], weights["Conv_0/kernel"][:, :, 0, 0])


def test_kernels_are_of_the_layer_that_sees_the_pixels():
    weights, _, kept = map(named, network(DEEP))
    figure = plots.kernels(run_of(DEEP, network(DEEP)[2])[0], weights, kept)
    assert any(text.startswith("Stem/kernel: 64 of 64 outputs, input channels 1 to 3 of 3") for text in texts(figure))
    weights, _, kept = map(named, network(LENET))
    figure = plots.kernels(run_of(LENET, network(LENET)[2])[0], weights, kept)
    assert any(text.startswith("Dense_0/kernel: 32 of 300 outputs") for text in texts(figure))
    assert np.array_equal(
        figure.axes[0].images[0].get_array()[1:29, 1:29], weights["Dense_0/kernel"][:, 0].reshape(28, 28)
    )
    for inputs in (20, 36, 10 * 12):  # no square, a square that is no image's, and an oblong image
        other = {"Dense_0": (inputs, 5)}
        weights, _, kept = map(named, network(other))
        assert plots.kernels(run_of(other, network(other)[2])[0], weights, kept) is None


def test_kernels_of_a_dense_layer_are_of_the_size_of_its_images():
    for height, channels in ((28, 1), (8, 1), (32, 3)):
        shape = {"Dense_0": (height * height * channels, 5), "Dense_1": (5, 3)}
        trees = network(shape)
        weights, _, kept = map(named, trees)
        figure = plots.kernels(run_of(shape, trees[2])[0], weights, kept)
        before, after = figure.axes[:2]
        dots = max(1, 24 // height)  # small ones are enlarged
        image = before.images[0].get_array()
        kernel = weights["Dense_0/kernel"].reshape(height, height, channels, 5)  # NHWC, as the network flattens
        for channel in range(channels):
            start = 1 + channel * height * dots
            tile = image[1 : 1 + height * dots : dots, start : start + height * dots : dots]
            assert np.array_equal(tile, kernel[:, :, channel, 0])
        assert after.images[0].get_array().count() == kept["Dense_0/kernel"].sum() * dots**2
        says = ", input channels 1 to 3 of 3 side by side" * (channels == 3)
        assert f"Dense_0/kernel: 5 of 5 outputs{says}; grey: masked out" in texts(figure)


@pytest.mark.parametrize("shapes", [CONVNET, DEEP], ids=["few", "many"])
@pytest.mark.parametrize("flips", [None, 1])
def test_flips_are_percentages_of_the_layer_and_zeros_are_shown(shapes, flips):
    summary, records = run_of(shapes, network(shapes)[2], epochs=4, flips=flips)
    records[2]["flips"]["Conv_1/kernel" if shapes is CONVNET else "Stem/kernel"] = 0
    figure = plots.flips(summary, records)
    [ax] = figure.axes
    assert len(ax.lines) == len(shapes) + 1  # and the sum of them
    assert_drawn(ax)
    total = sum(records[1]["flips"].values()) / sum(v["size"] for v in summary["layers"].values())
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(100 * total)
    name, layer = next(iter(summary["layers"].items()))
    assert ax.lines[0].get_ydata()[0] == pytest.approx(100 * records[1]["flips"][name] / layer["size"])


def test_masks_that_never_change_have_no_picture_of_flips():
    assert plots.flips(*run_of(CONVNET, network(CONVNET)[2], epochs=4, flips=0)) is None


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    trees = network(CONVNET)
    (tmp_path / "curves.png").write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.draw_run(tmp_path, *run_of(CONVNET, trees[2]), *map(named, trees))
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"


def test_a_method_needs_no_line_of_its_own():
    for method in (*METHODS, "a new one"):
        before, after = style.stages(method)
        assert before != after
    assert style.stages("a new one") == style.stages("random") == ("random subnetwork", "trained subnetwork")
    assert style.stages("dense") == ("random network", "trained network")


# Lines with bands.


def test_a_line_is_the_mean_over_the_seeds_in_a_band_from_the_lowest_to_the_highest():
    ax = style.new_figure("title", 4, 3).subplots()
    lines.draw_lines(ax, {"b": {0.2: [0.9, 0.7], 0.1: [0.5]}, "a": {0.2: [0.6]}}, "x", "y", True, ["a", "b"])
    b, a = ax.lines
    assert (b.get_color(), a.get_color()) == (style.COLOURS[1], style.COLOURS[0])
    assert list(b.get_xdata()) == [0.1, 0.2] and list(b.get_ydata()) == pytest.approx([50, 20])
    places, errors = ax.collections[0].get_paths()[0].vertices.T
    assert {*errors[places == 0.2].round(6)} == {10, 30}
    assert_drawn(ax)


def test_ticks_are_at_the_values_but_for_those_that_would_overlap():
    ax = style.new_figure("title", 4, 3).subplots()
    lines.log_ticks(ax, [0.5, 0.1, 0.11, 0.2, 0.1], percent=True)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10", "20", "50"]
    lines.log_ticks(ax, [16, 18, 20, 22, 24])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["16", "20", "24"]


@pytest.mark.parametrize("errors", ([1.4], [1.3, 1.5], [13, 15], [3.8, 3.9], [0.0, 1.4], [0.2, 90.0], [2.0, 3.0]))
def test_a_log_axis_has_two_ticks_or_more_within_its_limits(errors):
    ax = style.new_figure("title", 4, 3).subplots()
    style.log_axis(ax, errors, accuracy=True)
    bottom, top = sorted(ax.get_ylim())
    ticks = [tick for tick in ax.get_yticks() if bottom <= tick <= top]
    assert len(ticks) >= 2 and len({label.get_text() for label in ax.get_yticklabels()}) == len(ax.get_yticks())


def test_a_title_says_how_many_runs_were_left_out():
    summary = {"config": {"seeds": 3}}
    assert lines.seeds_note(summary) == "mean of 3 seeds, band from lowest to highest"
    assert lines.seeds_note(summary | {"left_out": [{}, {}]}).endswith("highest, 2 runs left out")


def test_seeds_of_slightly_different_values_share_their_place():
    rows = [{"name": "n", "asked": 0.1, "density": d, "y": y} for d, y in ((0.0625, 1), (0.1875, 2))]
    groups = lines.grouped(lines.at_mean(rows, "name", "asked", "density"), "name", "density", "y")
    assert groups == {"n": {0.125: [1, 2]}}


# Several runs.


def draw_together(runs, output):
    overlay.main(overlay.Config(tuple(runs), output))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, file: (figures.append(figure), save(figure, file)))
    return figures


def test_a_comparison_groups_the_seeds_and_labels_the_means(tmp_path, drawn):
    masks, none = network(CONVNET)[2], network(CONVNET, "none")[2]
    runs = [saved(tmp_path / f"p{s}", *run_of(CONVNET, masks, seed=s, last=0.96 + s / 100)) for s in range(3)]
    runs += [saved(tmp_path / "d", *run_of(CONVNET, none, epochs=5, method="dense", last=0.985))]
    draw_together([*runs, runs[0]], tmp_path / "c.png")  # one is given twice
    assert decoded(tmp_path / "c.png").shape[1] == 450
    [figure] = drawn
    assert {"97.00%", "98.50%", "10.00%"} <= {*texts(figure)}
    assert figure.get_suptitle() == "test accuracy on mnist-5k · convnet"
    assert "edge-popup, density 0.3 (mean of 3 seeds)" in texts(figure) and "dense (1 seed)" in texts(figure)
    left, right = figure.axes
    stages = [label.get_text() for label in right.get_yticklabels()]
    assert stages == ["random subnetwork", "learned subnetwork", "random network", "trained network"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([10, 97, 10, 98.5])
    assert_drawn(left)
    epochs, errors = left.collections[0].get_paths()[0].vertices.T
    assert {*errors[epochs == 3].round(6)} == {2, 4}


def test_a_comparison_tells_groups_apart_by_what_differs(tmp_path, drawn):
    sparse, dense = network(CONVNET, density=0.3)[2], network(CONVNET, density=0.7)[2]
    runs = {name: run_of(CONVNET, masks) for name, masks in (("a", sparse), ("b", dense), ("c", dense), ("d", dense))}
    runs["c"][0]["config"].update(learning_rate=0.2)
    runs["d"][0]["model"] = runs["d"][0]["config"]["model"] = "lenet-300-100"
    draw_together([saved(tmp_path / name, *run) for name, run in runs.items()], tmp_path / "c.png")
    labels = " | ".join(texts(drawn[0]))
    for label in (
        "density 0.3, convnet (1",
        "density 0.7, convnet, learning_rate 0.1 (1",
        "convnet, learning_rate 0.2 (1",
        "density 0.7, lenet-300-100 (1",
    ):
        assert label in labels
    runs["c"][0]["config"].update(preset="tutorial")
    (tmp_path / "c" / "summary.json").write_text(json.dumps(runs["c"][0]))
    draw_together([tmp_path / "b", tmp_path / "c"], tmp_path / "c.png")
    assert any(text.endswith("preset tutorial (1 seed)") for text in texts(drawn[1]))


def test_settings_that_were_renamed_or_added_do_not_set_runs_apart(tmp_path, drawn):
    masks = network(CONVNET)[2]
    runs = [run_of(CONVNET, masks, seed=seed) for seed in range(3)]
    runs[0][0]["config"].update(judge=True, strangers="kmnist", data="0123abcd")  # as stored before the renaming
    runs[1][0]["config"].update(assess=True, ood=["kmnist"], data="4567abcd", biases=False, stream=False, affine=False)
    runs[2][0]["config"].update(assess=True, ood=["kmnist"], biases=True)
    paths = [saved(tmp_path / str(seed), *run) for seed, run in enumerate(runs)]
    draw_together(paths[:2], tmp_path / "c.png")
    assert "edge-popup, density 0.3 (mean of 2 seeds)" in texts(drawn[0])
    draw_together(paths, tmp_path / "c.png")
    assert {
        "edge-popup, density 0.3, biases False (mean of 2 seeds)",
        "edge-popup, density 0.3, biases True (1 seed)",
    } <= {*texts(drawn[1])}


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    summary, records = run_of(CONVNET, network(CONVNET)[2])
    good = saved(tmp_path / "good", summary, records)
    other = saved(tmp_path / "other", {**summary, "dataset": "mnist"}, records)
    validated = saved(tmp_path / "validated", *run_of(CONVNET, network(CONVNET)[2], split="validation"))
    for bad, says in (
        (other, "mnist, test images; mnist-5k, test images"),
        (validated, "mnist-5k, validation images"),
        (tmp_path / "nowhere", "nowhere does not hold a finished run"),
        (saved(tmp_path / "short", summary, records[:-1]), "epochs 0 to 3"),
        (saved(tmp_path / "no_layers", {}, records), "no_layers does not hold a finished run"),
    ):
        with pytest.raises(UserError, match=says):
            draw_together([good, bad], tmp_path / "c.png")
    (tmp_path / "short" / "summary.json").unlink()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"epoch": 0, "te')
    for bad in ("short", "other"):
        with pytest.raises(UserError, match="does not hold a finished run"):
            draw_together([tmp_path / bad], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_the_command_draws_and_imports_nothing_heavy_for_its_help(tmp_path):
    run = saved(tmp_path / "run", *run_of(CONVNET, network(CONVNET)[2]))
    command = [sys.executable, "-m", "experiments.overlay", str(run), "--output", str(tmp_path / "c.png")]
    assert (
        str(tmp_path / "c.png")
        in subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    )
    assert decoded(tmp_path / "c.png").std() > 5
    source = "import sys, experiments.overlay; print(sorted({'jax', 'numpy', 'matplotlib', 'flax'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", source], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(UserError, match="at least one run"):
        overlay.Config().check()
