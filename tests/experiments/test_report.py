"""The report: which results it finds, beside which figures they stand, and what its pages say."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import cifar, mnist
from experiments.config import tasks
from experiments.config.flags import parser
from experiments.config.presets import CIFAR, LOTTERY, MNIST, recipe
from experiments.config.run import named
from experiments.config.settings import changed, flat
from experiments.config.tasks import ManyTasks
from experiments.config.tickets import Lottery
from experiments.report import Config, main
from experiments.reports import commands, gather, pages, report, tables
from experiments.reports.published import EXPERIMENTS, Figure
from experiments.run.names import plain

ROOT = Path(__file__).parents[2]
CONV4 = {"dataset": "cifar10", "model": "conv4", "widen": 1.0, "method": "edge-popup", "density": 0.1}


def run_of(accuracy, seed=0, **settings):
    """A summary.json as a run of experiments.cifar writes it."""
    config = changed(cifar.Config(), **recipe(CIFAR, "quick", settings.get("method", "edge-popup")))
    config = named(changed(config, seed=seed, **settings), "cifar10")
    return {
        "method": config.masks.method,
        "dataset": "cifar10",
        "model": config.model.model,
        "test_accuracy": accuracy,
        "density": config.masks.density,
        "epochs": config.epochs,
        "seed": seed,
        "device": "cpu",
        "date": f"2026-01-0{seed + 1}",
        "config": json.loads(json.dumps(flat(config))),
    }


def written(folder, *summaries):
    for i, summary in enumerate(summaries):
        (folder / f"run{i}").mkdir(parents=True, exist_ok=True)
        (folder / f"run{i}" / "summary.json").write_text(json.dumps(summary))
        (folder / f"run{i}" / "config.json").write_text(json.dumps(summary["config"]))
    return folder


def rows_of(results, what):
    return [row for _, rows in report.by_experiment(results) for row in rows if row.figure.what == what]


def test_seeds_of_one_setting_are_one_row_and_other_settings_another(tmp_path):
    runs = [run_of(accuracy, seed, model="conv4", density=0.1) for seed, accuracy in enumerate((0.75, 0.77))]
    runs.append(run_of(0.7, 0, model="conv4", density=0.1, init="kaiming-normal"))
    results, damaged = gather.results([written(tmp_path, *runs)])
    assert len(results) == 3 and not damaged
    one, other = sorted(rows_of(results, "Conv4, edge-popup, 10 % kept"), key=lambda row: -row.mean)
    assert one.accuracies == (0.75, 0.77) and one.spread == (0.75, 0.77) and one.date == "2026-01-02"
    assert one.difference == pytest.approx(0.76 - 0.74) and one.cut_short and one.epochs == 10
    assert (one.variant, other.variant) == ("", "init kaiming-normal")
    assert one.command == "python -m experiments.cifar --model conv4 --density 0.1"
    assert other.command == "python -m experiments.cifar --model conv4 --density 0.1 --init kaiming-normal"


def test_a_result_that_lies_in_two_places_counts_once(tmp_path):
    run = run_of(0.75, model="conv4", density=0.1)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "cifar.json").write_text(json.dumps({"runs": [{"command": "the command", "summary": run}]}))
    results, _ = gather.results([tmp_path / "kept", written(tmp_path / "runs", run)])
    assert [result.command for result in results] == ["the command"]


def test_what_restart_put_aside_does_not_count(tmp_path):
    written(tmp_path, run_of(0.75, model="conv4", density=0.1))
    written(tmp_path / "run0" / "replaced-1", run_of(0.6, model="conv4", density=0.1))
    (row,) = rows_of(gather.results([tmp_path])[0], "Conv4, edge-popup, 10 % kept")
    assert row.accuracies == (0.75,)


def test_files_that_are_no_summaries_are_named_and_the_others_count(tmp_path):
    written(tmp_path, run_of(0.75, model="conv4", density=0.1))
    (tmp_path / "cut.json").write_text('{"method": ')
    (tmp_path / "odd.json").write_text(json.dumps({"config": {}, "networks": [{"a": 1}]}))
    (tmp_path / "other.json").write_text("[1, 2]")
    results, damaged = gather.results([tmp_path])
    assert len(results) == 1 and {Path(file).name for file in damaged} == {"cut.json", "odd.json"}


@pytest.mark.parametrize(
    "flags",
    [
        *(["--method", method, "--model", "conv2"] for preset, method in CIFAR if preset == "quick"),
        ["--model", "conv2", "--method", "dense", "--learning-rate", "0.01"],
        ["--method", "bernoulli", "--no-rescale", "--model", "conv2", "--epochs", "3"],
        ["--preset", "paper", "--method", "snip", "--density", "0.05", "--drop-at", "0.25", "0.5", "--nesterov"],
        ["--preset", "zhou", "--method", "bernoulli", "--init", "signed-deviation", "--rescale"],
        ["--method", "random", "--distribution", "uniform", "--density", "0.2", "--flip-alternately"],
        ["--dataset", "cifar100", "--model", "vgg-16", "--optimizer", "adam", "--learning-rate", "0.001"],
        [],
    ],
)
def test_the_command_of_a_run_gives_its_settings_again(flags):
    config = parser(cifar.Config, cifar.defaults)("x", flags)
    config = named(config, config.data.dataset)
    words = commands.command_of("run", plain(flat(config))).split()
    assert words[:3] == ["python", "-m", "experiments.cifar"]
    assert len(words) <= 3 + len(flags)
    again = parser(cifar.Config, cifar.defaults)("x", words[3:])
    assert named(again, again.data.dataset) == config


def test_the_command_of_a_run_on_digits():
    for dataset, flag in (("mnist", ""), ("kmnist", " --dataset kmnist")):
        config = named(changed(mnist.Config(), **recipe(MNIST, "tutorial", "edge-popup")), dataset)
        said = commands.command_of("run", plain(flat(config)))
        assert said == f"python -m experiments.mnist --preset tutorial{flag}"


@pytest.mark.parametrize(
    ("preset", "more", "command"),
    [
        ("short", {}, "python -m experiments.lottery"),
        ("short", {"fraction": 0.5, "controls": ()}, "python -m experiments.lottery --fraction 0.5 --controls"),
        ("conv4", {"rounds": 3}, "python -m experiments.lottery --preset conv4 --rounds 3"),
    ],
)
def test_the_command_of_tickets(preset, more, command):
    config = changed(Lottery(), **{**LOTTERY[preset], "preset": preset, "validation": 5000, **more})
    config = changed(config, dataset="mnist" if preset == "short" else "cifar10")
    assert commands.command_of("ticket", plain(flat(config))) == command


def test_the_command_of_many_tasks():
    config = tasks.named(changed(ManyTasks(), **tasks.recipe("published", "threshold"), tasks=7), "mnist")
    said = commands.command_of("tasks", plain(flat(config)))
    assert said == "python -m experiments.many_tasks --preset published --tasks 7"


def tickets_of(dataset="mnist", **changes):
    """A summary.json as experiments.lottery writes it."""
    config = changed(Lottery(), dataset=dataset, **changes)
    networks = [
        {"network": kind, "round": number, "trial": 0, "density": 0.8**number, "early_stop_test_accuracy": 0.98}
        for number in (0, 7, 8)
        for kind in (("ticket", "reinit", "random") if number else ("ticket",))
    ]
    return {"dataset": dataset, "networks": networks, "per_input": [], "seed": 0, "config": plain(flat(config))}


def shown(results):
    return {row.figure.what for _, rows in report.by_experiment(results) for row in rows if row.accuracies}


def test_tickets_stand_beside_tickets_only(tmp_path):
    results, _ = gather.results([written(tmp_path, tickets_of())])
    assert len(results) == 7 and {result.kind for result in results} == {"ticket"}
    whats = ("the ticket", "its masks on other weights", "random masks")
    assert shown(results) == {
        "LeNet-300-100, all weights",
        *(f"LeNet-300-100, {what}, 21.1 % kept" for what in whats),
    }


@pytest.mark.parametrize(
    "changes",
    [{"unit": "neuron"}, {"fraction": 0.5}, {"criterion": "random"}, {"transfer_to": "kmnist"}, {"density": 0.1}],
)
def test_tickets_that_were_drawn_in_another_way_stand_beside_nothing(tmp_path, changes):
    results, _ = gather.results([written(tmp_path, tickets_of(**changes))])
    assert len(results) == 7 and not shown(results)


def test_tickets_of_a_sweep_are_no_runs_of_edge_popup(tmp_path):
    results, _ = gather.results([written(tmp_path, tickets_of("cifar10", model="conv4", density=0.1, rounds=1))])
    assert not any("edge-popup" in what for what in shown(results))


def test_many_tasks_count_on_test_images_and_with_the_settings_of_their_figure(tmp_path):
    config = tasks.named(changed(ManyTasks(), **tasks.recipe("published", "threshold")), "mnist")
    summary = {
        "tasks": [{}] * 5,
        "mean_accuracy": 0.9,
        "split": "test",
        "dataset": "mnist",
        "config": plain(flat(config)),
    }
    wide = summary | {"config": summary["config"] | {"width": 500}}
    results, _ = gather.results([written(tmp_path, summary, wide, summary | {"split": "validation"})])
    assert len(results) == 2 and shown(results) == {"Permuted MNIST, 5 tasks in one network, the published settings"}


def test_drawn_masks_are_what_a_bernoulli_run_is_judged_by(tmp_path):
    run = run_of(0.3, method="bernoulli", model="conv2", density=1.0, init="signed-deviation") | {
        "test_sampled_accuracy": 0.6
    }
    results, _ = gather.results([written(tmp_path, run)])
    assert [row.mean for row in rows_of(results, "Conv2, Bernoulli, rescaled, signed weights")] == [0.6]


def test_densities_may_differ_by_a_hundredth_of_themselves():
    assert tables.fits({"model": "conv4", "density": 0.1001}, CONV4)
    assert not tables.fits({"model": "conv4", "density": 0.102}, CONV4)
    assert not tables.fits({"model": "conv4", "round": 7}, CONV4)


def test_a_seed_that_was_run_twice_counts_once_and_held_out_images_are_told(tmp_path):
    runs = [run_of(0.7, model="conv4", density=0.1, workdir=f"{i}", checkpoint_every=i + 1) for i in range(2)]
    runs.append(run_of(0.6, 1, model="conv4", density=0.1, validation=5000))
    results, _ = gather.results([written(tmp_path, *runs)])
    rows = rows_of(results, "Conv4, edge-popup, 10 % kept")
    assert [(row.accuracies, row.variant) for row in rows] == [((0.7,), ""), ((0.6,), "validation 5000")]


def test_what_differs_from_our_recipe_is_told(tmp_path):
    odd = run_of(0.7, model="conv4", density=0.1, train_images=500, distribution="erk", cutout=4)
    results, _ = gather.results([written(tmp_path, odd)])
    (row,) = rows_of(results, "Conv4, edge-popup, 10 % kept")
    assert row.variant == "distribution erk, cutout 4, train images 500"


def test_every_published_figure_has_a_source_and_is_a_fraction():
    figures = [figure for experiment in EXPERIMENTS for figure in experiment.figures]
    assert len({figure.what for figure in figures}) == len(figures)
    for figure in figures:
        assert (figure.accuracy is None) or (0 < figure.accuracy < 1 and figure.source), figure.what


def test_the_pages_say_what_was_cut_short_and_what_was_not_run(tmp_path):
    results, _ = gather.results([written(tmp_path, run_of(0.75, model="conv4", density=0.1))])
    text = pages.markdown(report.by_experiment(results))
    (line,) = [line for line in text.splitlines() if line.startswith("| Conv4, edge-popup, 10 % kept")]
    assert "| 74.00 % | 75.00 % | 1 | +1.00 | 10, cut short (published: 100) |" in line
    assert "Published, and not run here:\n\n- " in text
    assert "\n- Conv2, edge-popup: 65.00 % (10 % kept)\n- Conv2, dense: 68.79 %\n" in text


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.targets += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_page_is_whole_and_needs_no_other_file(tmp_path):
    runs = [run_of(0.7 + density / 10, model="conv4", density=density) for density in (0.1, 0.5)]
    results, _ = gather.results([written(tmp_path, *runs)])
    links = Links()
    links.feed(pages.page(report.by_experiment(results), report.picture))
    assert links.targets and all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert not links.open


def test_text_from_files_is_escaped():
    figure = Figure("a <b> network", {}, 0.5, 1, "x")
    row = tables.Row(figure, "", (0.5,), 0.1, 1, "run <script>", "cpu", "")
    text = pages.page([(EXPERIMENTS[0], [row])], lambda *_: None)
    assert "<script>" not in text and "a &lt;b&gt; network" in text


def test_the_command_writes_its_pages_and_says_nothing_is_new_the_second_time(tmp_path, capsys):
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    written(tmp_path / "results", tickets_of())
    written(tmp_path / "runs", run_of(0.9, model="conv2", density=0.1))
    config = Config(*(str(tmp_path / name) for name in ("runs", "results", "pages", "README.md")))
    assert set(main(config).values()) == {True}
    assert "90.00 %" not in (tmp_path / "pages" / "published.md").read_text()
    assert "90.00 %" in (tmp_path / "runs" / "report" / "published.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "| LeNet-300-100, the ticket, 21.1 % kept | `python -m experiments.lottery` | **98.00 %** |  |" in readme
    assert set(main(config).values()) == {False}
    assert "results: 7 results, in 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": "nowhere"}, "nowhere is no directory"),
        ({"readme": "none.md"}, "there is no none.md"),
        ({"readme": "plain.md"}, "cannot take the table of results"),
    ],
)
def test_wrong_paths_are_one_paragraph(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    (tmp_path / "plain.md").write_text("no marks")
    with pytest.raises(report.UserError, match=message):
        main(dataclasses.replace(Config(), **changes))


def test_readme_and_pages_hold_the_results_that_the_project_keeps(tmp_path):
    results, damaged = gather.results([ROOT / "experiments" / "results"])
    assert not damaged
    experiments = report.by_experiment(results)
    readme = (ROOT / "README.md").read_text()
    assert pages.with_table(readme, pages.readme_table(experiments)) == readme
    assert (ROOT / "docs" / "results" / "published.md").read_text() == pages.markdown(experiments)
