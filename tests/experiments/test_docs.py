"""The code of the documentation: its blocks run in order, and its recipes for the registry train."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import supermask_jax as sm
from experiments import doc_tables
from experiments.bench import tables
from experiments.config.flags import parser
from experiments.config.sections import Masks
from experiments.reports import bits
from experiments.run import markdown
from experiments.run.errors import UserError
from experiments.training.methods import Setup

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
NAMED = re.compile(r"# (\S+\.py)\n")  # the first line of a block that belongs into a file
QUICK = ("--epochs", "1", "--train-images", "1000")
ONE_AFTER_THE_OTHER = """
import json, runpy, sys

for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(text: str) -> dict:
    """The names that a page's Python blocks leave, run in order."""
    names = {}
    for block in blocks(text, "python"):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def extending() -> dict:
    return run(EXTENDING)


@pytest.mark.slow
def test_rigl_in_a_loop_is_short_and_trains_at_its_density():
    setup, loop = blocks(EXTENDING, "python")[:2]
    assert "rigl" in loop
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20
    names = {}
    exec(setup, names)
    exec(loop, names)
    assert names["metrics"]["loss"] < 0.5
    assert sm.density(names["state"].subnet.scores) == sm.density(names["masks"])
    moved = names["state"].subnet.scores["Dense_0"]["kernel"] != names["masks"]["Dense_0"]["kernel"]
    assert moved.any()


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """(name, arguments) of the experiments that a page runs, in its blocks and in its text."""
    text = page.read_text().replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name} ", f"{value} ")
    lines = re.findall(r"^(?:\$ )?(?:\w+=\S+ +)*python -m experiments\.(\w+)(.*)$", text, re.MULTILINE)
    return [(name, shlex.split(rest.partition(" & ")[0], comments=True)) for name, rest in lines]


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES.remove("docs/extending.md")  # whose commands need what it adds to the registry: a test of its own runs them


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page):
    for name, arguments in commands_of(ROOT / page):
        command = importlib.import_module(f"experiments.{name}")
        own = (command.Config, command.defaults) if hasattr(command, "defaults") else (command.Config,)
        parser(*own)(command.PROG, arguments)


def test_pages_have_commands():
    assert sum(len(commands_of(ROOT / page)) for page in PAGES) > 50


@pytest.mark.slow
def test_the_first_sizes_of_the_readme_are_those_that_its_code_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, text = (ROOT / "docs" / "files.md").read_text().split("## The sizes in the README")
    exec(blocks(text, "python")[0], {})
    size, dense, packed = capsys.readouterr().out.split()
    row = re.search(r"\| MNIST convnet, 0.5 \| (.+) \|", (ROOT / "README.md").read_text())[1]
    told = [cell.strip(" *").removesuffix(" bytes").replace(",", "") for cell in row.split("|")]
    assert [told[0], told[1], told[3]] == [size, dense, packed]


@pytest.mark.slow
def test_the_method_of_the_page_draws_its_masks_again(extending):
    tx, batch = extending["tx"], extending["batch"]
    masks = Masks(density=0.3, update_every=2)
    setup = Setup(masks, None, extending["weights"], None, extending["k_method"], tx, steps=10)
    method = extending["redrawn"](setup)
    before = sm.init_state(method.subnet, tx, extending["k_train"], learns=method.learns)
    after = method.update(2, before, batch)
    assert method.update_every == 2
    assert (after.subnet.scores["Dense_0"]["kernel"] != before.subnet.scores["Dense_0"]["kernel"]).any()
    assert sm.layer_densities(after.subnet.scores) == sm.layer_densities(before.subnet.scores)
    assert method.update(8, before, batch) is before


@pytest.mark.slow
def test_the_page_about_own_models_runs_and_shows_what_inspect_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "models.md").read_text()
    names = run(text)
    [table] = blocks(text, "text")
    shown, density = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert shown == table.rstrip("\n") and 0.1 < float(density) < 0.3
    assert np.isfinite(names["metrics"]["loss"])
    assert sm.density(sm.edge_popup(0.5)(names["average"])) == 0.5


@pytest.mark.slow
def test_the_saliency_of_the_page_scores_by_the_gradient(extending):
    names, kernel = extending, ("Dense_0", "kernel")
    scores = names["gradient_magnitude"](names["loss_fn"], names["weights"], names["batch"])
    assert scores["Dense_0"]["bias"] is None
    bumped = {**names["weights"], "Dense_0": dict(names["weights"]["Dense_0"])}
    at = np.unravel_index(np.argmax(scores["Dense_0"]["kernel"]), scores["Dense_0"]["kernel"].shape)

    def loss(change):
        bumped["Dense_0"]["kernel"] = names["weights"][kernel[0]][kernel[1]].at[at].add(change)
        return float(names["loss_fn"](bumped, None, names["batch"], None)[0])

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(slope) == pytest.approx(float(scores["Dense_0"]["kernel"][at]), rel=0.02)
    assert sm.density(names["masks"]) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.slow
def test_the_data_set_and_the_model_of_the_page_fit(extending):
    dataset = extending["stripes"](None)
    assert (dataset.classes, dataset.image_shape) == (2, (28, 28, 1))
    assert (len(dataset.train), len(dataset.test)) == (4000, 1000)
    architecture = extending["deep_mlp"](dataset.classes, width=8)
    shapes = architecture.module.init(extending["k_model"], np.zeros((1, 28, 28, 1), np.float32))["params"]
    kernels = sm.trees.prunable(shapes)
    assert (kernels[architecture.first], kernels[architecture.last]) == ((784, 8), (8, 2))


def test_the_blocks_of_running_run():
    assert np.isfinite(run((ROOT / "docs" / "running.md").read_text())["metrics"]["loss"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_the_recipes_train_when_they_are_put_into_the_files_that_they_name(tmp_path):
    """In a copy of the sources: what a reader does who follows the page to the letter, and then its commands."""
    for package in ("experiments", "supermask_jax"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for block in blocks(EXTENDING, "python"):
        if found := NAMED.match(block):
            path = tmp_path / found[1]
            assert path.parent.is_dir()
            with path.open("a") as file:
                file.write(f"\n\n{block}")
    registry = tmp_path / "experiments" / "config" / "registry.py"
    for block in blocks(EXTENDING, "diff"):
        place, *added = block.splitlines()
        text, context = registry.read_text(), place.removeprefix(" ") + "\n"
        assert text.count(context) == 1, f"the registry has no line {context}"
        assert all(line.startswith("+") for line in added)
        registry.write_text(text.replace(context, context + "".join(line[1:] + "\n" for line in added)))

    commands = [line for block in blocks(EXTENDING, "bash") for line in block.splitlines()]
    assert len(commands) == 4
    runs = []
    for number, command in enumerate(commands):
        python, dash_m, *arguments = shlex.split(command)
        assert (python, dash_m) == ("python", "-m")
        arguments += [*QUICK, "--workdir", f"run{number}"]
        runs.append(arguments if "--dataset" in arguments else [*arguments, "--dataset", "mnist-5k"])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(runs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((tmp_path / f"run{number}" / "summary.json").read_text()) for number in range(4)]
    assert [summary["method"] for summary in summaries] == ["redrawn", "gradient", "edge-popup", "edge-popup"]
    assert [summary["density"] for summary in summaries] == pytest.approx([0.3, 0.1, 0.5, 0.5], abs=1e-3)
    assert summaries[2]["test_accuracy"] > 0.9, "stripes are easy"


def test_the_tables_of_the_documents_are_those_of_the_figures(tmp_path):
    before = doc_tables.Config()
    for document in doc_tables.DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        text = (before.documents / document).read_text()
        assert len(markdown.MARKED.findall(text)) == text.count("<!-- table: ") >= 1, document
        (tmp_path / document).write_text(markdown.MARKED.sub(r"\1\4", text))
    doc_tables.main(doc_tables.Config(documents=tmp_path))
    for document in doc_tables.DOCUMENTS:
        same = (tmp_path / document).read_text() == (before.documents / document).read_text()
        assert same, f"{document}: run {doc_tables.PROG}"


def test_figures_or_tables_that_are_missing_are_named_and_nothing_is_written(tmp_path):
    for document in doc_tables.DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text("<!-- table: faults from faults.json -->\n<!-- end -->\n")
    last = tmp_path / doc_tables.DOCUMENTS[-1]
    config = doc_tables.Config(documents=tmp_path)
    config.check()
    last.write_text("<!-- table: taxes from faults.json -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=f"a table of {doc_tables.DOCUMENTS[-1]}.*'taxes'"):
        doc_tables.main(config)
    assert (tmp_path / doc_tables.DOCUMENTS[0]).read_text().count("\n") == 2
    last.write_text("<!-- table: faults from nothing.json -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"there is no file .*nothing\.json"):
        config.check()


def test_the_tables_of_speed_and_of_bits():
    lines = [
        {"group": "training step, batch 8", "name": "edge-popup", "unit": "ms", "median": 12.0},
        {"group": "training step, batch 8", "name": "dense", "unit": "ms", "median": 10.0},
        {
            **{"group": "training step, batch 8", "name": "edge-popup / dense", "unit": "x", "median": 1.2},
            **{"target": "<= 1.1", "met": False},
        },
        {"group": "resnet, batch 128", "name": "dense", "unit": "ms", "median": 900.0},
        {"group": "resnet, batch 128", "name": "compiling, edge-popup", "unit": "s", "median": 3.0},
        {"group": "resnet, batch 128", "name": "compiling, dense", "unit": "s", "median": 2.0},
        {"group": "resnet, batch 128", "name": "compiling, edge-popup / dense", "unit": "x", "median": 1.5},
        *(
            {"group": f"selection, net, tied, {d}", "name": "selection / numpy.partition", "unit": "x", "median": 2 + d}
            for d in (0.3, 0.5)
        ),
    ]
    steps = tables.steps_table({"rows": lines}).splitlines()
    assert steps[0] == "| ratio | batch 8 | resnet |"
    assert steps[2:] == [
        "| edge-popup / dense | 1.20 x (12.0 / 10.0 ms); <= 1.1 missed |  |",
        "| compiling, edge-popup / dense |  | 1.50 x (3.00 / 2.00 s) |",
    ]
    selection = tables.partition_table({"rows": lines}).splitlines()
    assert (selection[0], selection[2]) == (
        "| scores | density 0.3 | density 0.5 |",
        "| net, tied | 2.3 x | 2.5 x |",
    )

    def point(line, stored, asked, accuracy, size, front=False, seeds=1, **more):
        own = {"family": line.partition(",")[0], "network": "net", "density": asked, "seeds": seeds}
        own |= {"lowest": accuracy - 0.01, "highest": accuracy + 0.01, "test_accuracy": accuracy, "file_bytes": size}
        return {"line": line, "stored": stored, "asked": asked, "front": front, **own, **more}

    points = [
        point("masks", "seed and masks", 0.1, 0.97, 1234.0, front=True, seeds=2),
        point("pruned, int8", "int8", 0.1, 0.98, 4321.0),
        point("dense, int8", "int8", 1.0, 0.99, 9999.0),
        point("learnt", "seed and masks", 1.0, 0.9, 1000.0, density=0.4),
    ]
    assert bits.by_density({"points": points}).splitlines()[::2] == [
        "| Kept | masks | pruned, int8 |",
        "| 10 % | **97.00 (96.00 to 98.00), 1,234** | 98.00, 4,321 |",
    ]
    assert bits.others({"points": points}).splitlines() == [
        "| Method | Network | Kept | seed and masks | int8 |",
        "| --- | --- | --- | --- | --- |",
        "| dense | net | 100 % |  | 99.00, 9,999 |",
        "| learnt | net | 40 % | 90.00, 1,000 |  |",
    ]
    assert bits.others({"points": points[:2]}).count("\n") == 2
