"""The report: which results it finds, beside which figures they stand, and what its pages say."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import cifar, mnist
from experiments.config.flags import parser
from experiments.config.presets import CIFAR, MNIST, recipe
from experiments.config.run import named
from experiments.config.settings import changed, flat
from experiments.report import Config, main
from experiments.reports import gather, pages, report, tables
from experiments.reports.published import EXPERIMENTS, Figure

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
    assert (one.variant, other.variant) == ("init signed-constant", "init kaiming-normal")
    assert one.command == "python -m experiments.cifar --model conv4 --density 0.1"
    assert other.command == "python -m experiments.cifar --model conv4 --density 0.1 --init kaiming-normal"


def test_a_result_that_lies_in_two_places_counts_once(tmp_path):
    run = run_of(0.75, model="conv4", density=0.1)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "cifar.json").write_text(json.dumps({"runs": [{"command": "the command", "summary": run}]}))
    results, _ = gather.results([tmp_path / "kept", written(tmp_path / "runs", run)])
    assert [result.command for result in results] == ["the command"]


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
        ["--model", "conv2", "--method", "dense", "--learning-rate", "0.01"],
        ["--method", "bernoulli", "--no-rescale", "--model", "conv2", "--epochs", "3"],
        ["--preset", "paper", "--method", "snip", "--density", "0.05", "--drop-at", "0.25", "0.5", "--nesterov"],
        ["--method", "random", "--distribution", "uniform", "--density", "0.2"],
    ],
)
def test_the_command_of_a_run_gives_its_settings_again(flags):
    config = parser(cifar.Config, cifar.defaults)("x", flags)
    command = gather.command_of(json.loads(json.dumps(flat(config))))
    words = command.split()
    assert words[:3] == ["python", "-m", "experiments.cifar"]
    assert parser(cifar.Config, cifar.defaults)("x", words[3:]) == config


def test_the_command_of_a_run_on_digits():
    for dataset, flag in (("mnist", ""), ("kmnist", " --dataset kmnist")):
        config = named(changed(mnist.Config(), **recipe(MNIST, "tutorial", "edge-popup")), dataset)
        settings = json.loads(json.dumps(flat(config)))
        assert gather.command_of(settings) == f"python -m experiments.mnist --preset tutorial{flag}"


def test_drawn_masks_are_what_a_bernoulli_run_is_judged_by(tmp_path):
    run = run_of(0.3, method="bernoulli", model="conv2", density=1.0) | {"test_sampled_accuracy": 0.6}
    results, _ = gather.results([written(tmp_path, run)])
    assert [row.mean for row in rows_of(results, "Conv2, rescaled, signed weights")] == [0.6]


def test_a_figure_fits_any_of_several_values():
    assert tables.fits({"model": ("conv2", "conv4"), "density": 0.1}, CONV4)
    assert not tables.fits({"model": ("conv2", "conv6")}, CONV4)
    assert not tables.fits({"model": "conv4", "round": 7}, CONV4)


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
    assert "Published, and not run here:" in text and "Conv8, edge-popup, 10 % kept: 70.00 %" in text


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
    written(tmp_path / "results", run_of(0.75, model="conv4", density=0.1))
    config = Config(*(str(tmp_path / name) for name in ("none", "results", "pages", "README.md")))
    assert set(main(config).values()) == {True}
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "**75.00 %**, 10 epochs | 74.00 %, 100 epochs |" in readme
    assert set(main(config).values()) == {False}
    assert "1 results, in 1 rows" in capsys.readouterr().out


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
