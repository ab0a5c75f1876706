"""Settings: names of runs that outlive new flags, options that something reads, documentation, presets."""

import collections
import dataclasses
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from experiments import cifar, mnist
from experiments.config import presets, registry, sections
from experiments.config.flags import RENAMED, parser
from experiments.config.registry import METHODS
from experiments.config.run import Run, named
from experiments.config.settings import CHOICES, changed, fields, flat, neutral, refuse_unread, unread
from experiments.run.errors import UserError
from experiments.run.names import FIRST_NAMES, Settings, default_path
from experiments.run.workdir import Workdir

ROOT = Path(__file__).parents[2]


def settings_of(config):
    return Settings(flat(config), neutral(type(config)))


def path_of(config, experiment="mnist"):
    return default_path(settings_of(config), experiment)


def parsed(command, *args):
    return parser(command.Config, command.defaults)("prog", list(args))


def refused(command, *args):
    with pytest.raises(UserError) as caught:
        parsed(command, *args)
    return str(caught.value)


# The names of runs.

SHORT = {"density": 0.3, "model": "lenet-300-100", "epochs": 1}
ASSESSED = {"assess": True, "ood": ("kmnist",), "model": "mlp", "width": 16}
# As the first published version named them: runs that are on people's disks.
FIRST_PATHS = [
    ("edge-popup", {}, "runs/mnist/edge-popup-mnist-d0.5-s0-7a9bbc4e"),
    ("edge-popup", SHORT, "runs/mnist/edge-popup-mnist-d0.3-s0-dc07f3cd"),
    ("edge-popup", ASSESSED, "runs/mnist/edge-popup-mnist-d0.5-s0-cfeeff21"),
    ("bernoulli", {}, "runs/mnist/bernoulli-mnist-s0-c67e8a10"),
    ("bernoulli", SHORT, "runs/mnist/bernoulli-mnist-s0-6198d2e2"),
    ("bernoulli", ASSESSED, "runs/mnist/bernoulli-mnist-s0-502fb38e"),
    ("dense", {}, "runs/mnist/dense-mnist-s0-0c215e43"),
    ("dense", SHORT, "runs/mnist/dense-mnist-s0-8c483c0a"),
    ("dense", ASSESSED, "runs/mnist/dense-mnist-s0-97553872"),
    ("random", {}, "runs/mnist/random-mnist-d0.5-s0-45dff785"),
    ("random", SHORT, "runs/mnist/random-mnist-d0.3-s0-105b9625"),
    ("magnitude", {}, "runs/mnist/magnitude-mnist-d0.5-s0-06b0324b"),
    ("magnitude", ASSESSED, "runs/mnist/magnitude-mnist-d0.5-s0-ab3fcce4"),
    ("snip", {}, "runs/mnist/snip-mnist-d0.5-s0-7ec7d9e7"),
    ("snip", SHORT, "runs/mnist/snip-mnist-d0.3-s0-a1428c31"),
    ("grasp", {}, "runs/mnist/grasp-mnist-d0.5-s0-a9a3eed6"),
    ("grasp", ASSESSED, "runs/mnist/grasp-mnist-d0.5-s0-cfbc276e"),
    ("synflow", {}, "runs/mnist/synflow-mnist-d0.5-s0-4ea85893"),
    ("synflow", SHORT, "runs/mnist/synflow-mnist-d0.3-s0-c0722ad4"),
    ("gradual", {}, "runs/mnist/gradual-mnist-d0.5-s0-5f7a103c"),
    ("gradual", ASSESSED, "runs/mnist/gradual-mnist-d0.5-s0-1fa68f1e"),
    ("set", {}, "runs/mnist/set-mnist-d0.5-s0-dab277c6"),
    ("set", SHORT, "runs/mnist/set-mnist-d0.3-s0-556b70f4"),
    ("rigl", {}, "runs/mnist/rigl-mnist-d0.5-s0-83c1fb23"),
    ("rigl", ASSESSED, "runs/mnist/rigl-mnist-d0.5-s0-29d0947c"),
]


@pytest.mark.parametrize(("method", "settings", "path"), FIRST_PATHS)
def test_a_run_has_the_name_that_the_first_version_gave_it(method, settings, path):
    config = changed(mnist.Config(), **{**mnist.defaults("best", method), **settings})
    assert str(path_of(named(config, "mnist"))) == path


def test_the_name_differs_with_every_setting_that_changes_the_result_and_with_no_other():
    config = changed(mnist.Config(), model="lenet-300-100", density=0.3, dataset="mnist-5k")
    base = path_of(config)
    assert base.parts[:2] == ("runs", "mnist") and base.name.startswith("edge-popup-mnist-5k-d0.3-s0-")
    for field, value in {"seed": 1, "learning_rate": 0.2, "epochs": 3, "init": "kaiming-normal"}.items():
        assert path_of(changed(config, **{field: value})) != base, field
    others = {"data_dir": "x", "checkpoint_every": 3, "preset": "tutorial", "devices": 8, "parallel": "pmap"}
    others |= {"shard_scores": True, "coordinator": "auto", "num_processes": 2, "process_id": 1, "workdir": "y"}
    for field, value in others.items():
        assert path_of(changed(config, **{field: value})) == base, field


def test_an_option_that_nothing_reads_is_no_part_of_the_name():
    config = mnist.Config()
    for field, value in {"width": 7, "momentum": 0.5, "rescale": True, "drop_fraction": 0.1}.items():
        other = changed(config, optimizer="adam", **{field: value})
        assert path_of(named(other, "mnist")) == path_of(named(changed(config, optimizer="adam"), "mnist")), field
    dense = [named(changed(config, method="dense", density=density), "mnist") for density in (0.3, 0.7)]
    assert path_of(dense[0]) == path_of(dense[1]) and "-d" not in path_of(dense[0]).name
    assert flat(dense[0])["density"] == 1.0


def test_flips_that_alternate_take_the_place_of_those_at_random_and_are_another_run():
    config = mnist.Config()
    neither, random, alternate, both = (
        named(changed(config, flip=flip, flip_alternately=alternately), "mnist")
        for alternately in (False, True)
        for flip in (False, True)
    )
    assert alternate == both and not both.augment.flip
    assert len({path_of(each) for each in (neither, random, both)}) == 3
    assert "flip_alternately" not in Run.ALWAYS_NAMED and neutral(mnist.Config)["flip_alternately"] is False


@dataclass(frozen=True)
class Later(sections.Augment):
    mirrored: bool = False
    """A flag that a later version has."""
    erased: tuple[int, ...] = (0, 0)
    """Another one, whose value JSON stores as a list."""


@dataclass(frozen=True)
class LaterConfig(mnist.Config):
    augment: Later = Later()


def test_a_later_flag_changes_neither_name_nor_resume_until_it_is_used(tmp_path):
    now, later = named(mnist.Config(), "mnist"), named(LaterConfig(), "mnist")
    assert neutral(LaterConfig).items() > {"mirrored": False, "erased": (0, 0)}.items()
    assert path_of(later) == path_of(now)
    Workdir(tmp_path, settings_of(now), "images").append({"epoch": 0, "step": 0})
    assert Workdir(tmp_path, settings_of(later), "images").records()

    for settings in ({"mirrored": True}, {"erased": (1, 2)}):
        used = changed(later, **settings)
        assert path_of(used) != path_of(now)
        with pytest.raises(UserError, match=rf"{next(iter(settings))} \(was .*now"):
            Workdir(tmp_path, settings_of(used), "images")


def test_a_run_of_the_later_flag_is_refused_without_it_and_resumed_with_it(tmp_path):
    used = settings_of(changed(named(LaterConfig(), "mnist"), mirrored=True, erased=(1, 2)))
    Workdir(tmp_path, used, "images").append({"epoch": 0, "step": 0})
    assert Workdir(tmp_path, used, "images").records()
    with pytest.raises(UserError, match=r"mirrored \(was True, now False\)"):
        Workdir(tmp_path, settings_of(named(LaterConfig(), "mnist")), "images")
    with pytest.raises(UserError, match=r"mirrored \(was True, now None\)"):
        Workdir(tmp_path, settings_of(named(mnist.Config(), "mnist")), "images")


def first_version(config):
    """config.json as the first version wrote it: with the names that settings had, and without later ones."""
    values = {name: value for name, value in flat(config).items() if name in Run.ALWAYS_NAMED}
    values["ood"] = values["ood"][0] if values["ood"] else "none"  # there was one at most
    return {FIRST_NAMES.get(name, name): value for name, value in values.items()}


def test_settings_that_the_first_version_stored_are_resumed_and_compared(tmp_path):
    config = changed(named(changed(mnist.Config(), assess=True, ood=("kmnist",)), "mnist"), workdir=str(tmp_path))
    stored = first_version(config)
    assert {"judge": True, "strangers": "kmnist"}.items() <= stored.items()
    assert not {"assess", "ood", "biases", "affine", "stream"} & set(stored) and len(stored) == 39
    (tmp_path / "config.json").write_text(json.dumps({**stored, "data": "images"}))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "step": 0}\n')
    assert Workdir(tmp_path, settings_of(config), "images").records() == [{"epoch": 0, "step": 0}]
    with pytest.raises(UserError, match=r"ood \(was 'kmnist', now 'none'\)"):
        Workdir(tmp_path, settings_of(changed(config, ood=())), "images")
    with pytest.raises(UserError, match=r"assess \(was True, now False\)"):
        Workdir(tmp_path, settings_of(changed(config, assess=False)), "images")
    with pytest.raises(UserError, match="images that differ from these"):
        Workdir(tmp_path, settings_of(config), "other images")


# Fields.


COMMANDS = [file.stem for file in sorted((ROOT / "experiments").glob("*.py")) if "class Config" in file.read_text()]


def config_of(command):
    return __import__(f"experiments.{command}", fromlist=["Config"]).Config


@pytest.mark.parametrize("command", COMMANDS)
def test_field_names_are_unique_within_a_command(command):
    names = [field.name for field in fields(config_of(command))]
    assert names and len(set(names)) == len(names)
    assert set(names) == set(flat(config_of(command)()))


def test_field_names_are_unique_over_all_sections_but_three_that_masks_and_tickets_share():
    # `--density`, `--rounds` and `--unit` were flags of both commands before there were sections, with one meaning:
    # the fraction kept, how often is ranked and pruned, what is pruned. No command has both sections.
    sections = {f.type for command in COMMANDS for f in dataclasses.fields(config_of(command)) if is_section(f)}
    owners = collections.defaultdict(set)
    for section in sections:
        for field in dataclasses.fields(section):
            owners[field.name].add(section.__name__)
    shared = {name: owned for name, owned in owners.items() if len(owned) > 1}
    assert shared == {name: {"Masks", "Tickets"} for name in ("density", "rounds", "unit")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_documented(command):
    classes = [config_of(command), *(f.type for f in dataclasses.fields(config_of(command)) if is_section(f))]
    documented = {}
    for cls in itertools.chain.from_iterable(cls.__mro__ for cls in classes):
        if cls is object or not dataclasses.is_dataclass(cls):
            continue
        source = inspect.getsource(cls)
        for name in cls.__annotations__:
            text = re.search(rf'^    {name}: .*(?:\n        .*|\n    \).*)*\n    """(.+)', source, re.MULTILINE)
            documented[name] = documented.get(name) or bool(text)
    undocumented = [field.name for field in fields(config_of(command)) if not documented[field.name]]
    assert not undocumented


def is_section(field):
    return dataclasses.is_dataclass(field.type)


def test_settings_are_changed_by_flat_names_and_unknown_ones_raise():
    config = changed(mnist.Config(), density=0.3, epochs=2, model="mlp", width=7)
    assert (config.masks.density, config.epochs, config.model.model, config.model.width) == (0.3, 2, "mlp", 7)
    assert mnist.Config().masks.density == 0.5 and changed(config) == config
    with pytest.raises(TypeError, match="has no setting densty, widht"):
        changed(config, densty=0.3, widht=3)


def test_every_option_that_a_choice_reads_is_a_field():
    names = {field.name for field in fields(mnist.Config)}
    entries = [entry for choices in CHOICES.values() for entry in choices.values()]
    options = {name for entry in entries for name in getattr(entry, "reads", ())}
    assert {"width", "momentum", "rescale", "rounds", "stream", "affine"} < options <= names
    assert names >= set(CHOICES)


def test_every_choice_of_a_registry_is_a_choice_of_its_field():
    types = {field.name: typing.get_args(field.type) for field in fields(mnist.Config)}
    registries = {**CHOICES, "init": registry.INITIALIZERS}
    for field, choices in registries.items():
        assert types[field] == tuple(choices), field


@pytest.mark.parametrize(
    "name", ["DATASETS", "DISTRIBUTIONS", "INITIALIZERS", "METHODS", "MODELS", "OPTIMIZERS", "TEST_SETS"]
)
def test_every_registered_target_is_a_function_and_its_own(name):
    for choice, entry in getattr(registry, name).items():
        if entry.target:
            assert callable(entry.resolve()), choice
    for entry in registry.SALIENCIES.values():
        assert callable(entry.resolve())


# Options that nothing reads.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rescale"], "nothing reads --rescale here: it goes with --method bernoulli."),
        (["--width", "7"], "nothing reads --width here: it goes with --model "),
        (["--no-rescale", "--dropout", "--model", "mlp"], "nothing reads --dropout here: it goes with --model convnet"),
        (["--affine"], "nothing reads --affine here: it goes with --model resnet-110, "),
        (["--stream"], "nothing reads --stream here: it goes with --dataset folder."),
        (["--optimizer", "adam", "--momentum", "0.5"], "nothing reads --momentum here: it goes with --optimizer sgd."),
        (["--method", "random", "--rounds", "3"], "nothing reads --rounds here: it goes with --distribution "),
        (["--method", "gradual", "--minimum", "5"], "nothing reads --minimum here: it goes with --distribution "),
        (["--method", "dense", "--drop-fraction", "0.1"], "it goes with --method rigl, --method set."),
        (["--method", "bernoulli", "--distribution", "erk"], "nothing reads --distribution here: it goes with --meth"),
        (["--biases"], "nothing reads --biases here: it goes with --model lenet-300-100, --model resnet101"),
    ],
)
def test_an_option_that_nothing_reads_is_refused_with_what_does(flags, says):
    assert says in refused(mnist, *flags)


def test_an_option_that_something_reads_or_that_has_its_usual_value_is_not_refused():
    assert parsed(mnist, "--model", "mlp", "--width", "7").model.width == 7
    assert parsed(mnist, "--width", "100").model.model == "convnet"
    assert parsed(mnist, "--method", "random", "--distribution", "snip", "--rounds", "3").masks.rounds == 3
    assert parsed(mnist, "--method", "snip", "--minimum", "5").masks.minimum == 5
    assert parsed(cifar, "--no-affine").model.affine is False
    assert parsed(cifar, "--dataset", "folder", "--stream").data.stream


def test_a_density_that_means_nothing_to_a_method_is_ignored():
    for method in ("dense", "bernoulli"):
        config = parsed(mnist, "--method", method, "--density", "0.3")
        assert flat(named(config, "mnist"))["density"] == 1.0


@pytest.mark.parametrize("command", [mnist, cifar], ids=["mnist", "cifar"])
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_of_every_method_is_valid_and_reads_all_that_it_sets(command, method):
    recipes = {mnist: presets.MNIST, cifar: presets.CIFAR}[command]
    of_method = [preset for preset, name in recipes if name == method]
    assert command.Config().preset in of_method
    for preset in of_method:
        config = parsed(command, "--preset", preset, "--method", method)
        assert (config.preset, config.masks.method) == (preset, method)
        config.check()
        refuse_unread(config, config)
        for name in recipes[preset, method]:
            assert name not in unread(config), name


# Presets and flags.


def test_a_preset_sets_defaults_and_flags_override_them():
    tutorial = parsed(mnist, "--preset", "tutorial")
    assert (tutorial.init.init, tutorial.optim.learning_rate, tutorial.optim.momentum) == ("kaiming-normal", 0.01, 0.9)
    assert (tutorial.optim.weight_decay, tutorial.optim.batch_size, tutorial.epochs) == (5e-4, 64, 20)
    assert (tutorial.optim.schedule, tutorial.model.dropout, tutorial.masks.density) == ("cosine-epoch", True, 0.5)
    assert parsed(mnist, "--learning-rate", "0.3", "--preset=tutorial").optim.learning_rate == 0.3
    assert parsed(mnist, "--method", "dense").init.init == "kaiming-normal"
    assert parsed(mnist).init.init == "signed-constant" and not parsed(mnist).masks.rescale
    zhou = parsed(mnist, "--preset", "zhou", "--method", "bernoulli")
    assert (zhou.model.model, zhou.init.init, zhou.optim.batch_size) == ("lenet-300-100", "glorot-normal", 250)
    assert not zhou.masks.rescale
    optim = zhou.optim
    assert (optim.optimizer, optim.learning_rate, optim.momentum, optim.schedule) == ("sgd", 100, 0.9, "constant")
    assert parsed(mnist, "--method", "bernoulli").masks.rescale
    assert not parsed(mnist, "--method", "bernoulli", "--no-rescale").masks.rescale


@pytest.mark.parametrize(
    ("command", "flags", "density", "rate"),
    [
        (mnist, "--model lenet-300-100 --density 0.02", 0.02, 0.02),
        (mnist, "--density=0.05", 0.05, 0.01),  # with convolutions, a fifth of the density
        (cifar, "--model conv2", 0.1, 0.02),
        (cifar, "--density 0.9", 0.9, 0.1),
        (cifar, "--density 0.01 --learning-rate 0.3", 0.01, 0.3),
    ],
)
def test_the_recipe_for_few_weights_has_a_learning_rate_that_falls_with_the_density(command, flags, density, rate):
    config = parsed(command, "--preset", "few-weights", *flags.split())
    assert config.optim.learning_rate == rate
    assert (config.masks.distribution, config.init.scale_layers) == ("erk", True)
    assert config.masks.density == density


@pytest.mark.parametrize("density", ("0", "1.5", "nan", "half"))
def test_a_density_that_is_none_is_refused_as_such_whatever_the_recipe_makes_of_it(density, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        parsed(mnist, "--preset", "few-weights", "--density", density)
    assert "density" in str(error.value) + capsys.readouterr().err


def test_the_defaults_of_cifar_are_a_resnet_on_cifar():
    config = parsed(cifar, "--method", "snip")
    assert (config.model.model, config.data.dataset, config.model.affine) == ("resnet-20", "cifar10", True)
    assert (config.augment.shift, config.optim.batch_size, config.masks.distribution) == (4, 128, "global")
    assert not parsed(cifar).model.affine


@pytest.mark.parametrize(
    "field", ["density", "seed", "epochs", "batch_size", "checkpoint_every", "learning_rate", "weight_decay", "shift"]
)
def test_every_number_is_checked_before_work_starts(field):
    flag = f"--{field.replace('_', '-')}"
    assert flag in refused(mnist, flag, "-3")


def test_numbers_are_checked_with_the_preset_that_they_are_given_for():
    assert "--shift must be in [0, 14]" in refused(cifar, "--method", "snip", "--shift", "15")
    assert "--momentum must be in [0, 1)" in refused(cifar, "--momentum", "1")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_flags_under_their_old_names_do_the_same_and_are_not_shown(old, new):
    value = ["kmnist"] if new == "--ood" else []
    more = ["--assess"] if new == "--ood" else []
    assert flat(parsed(mnist, *more, old, *value)) == flat(parsed(mnist, *more, new, *value))
    if value:
        assert flat(parsed(mnist, *more, f"{old}={value[0]}")) == flat(parsed(mnist, *more, new, *value))


def test_a_wrong_choice_is_answered_with_the_nearest_right_one():
    assert "no method 'edgepopup': did you mean 'edge-popup'? There are: " in refused(mnist, "--method", "edgepopup")
    assert "no model 'resnet20': did you mean 'resnet-20'?" in refused(cifar, "--model", "resnet20")
    assert "no preset 'tutorial'" in refused(cifar, "--preset", "tutorial")


def test_a_preset_that_a_method_has_not_is_refused_with_those_that_there_are():
    assert "no --preset zhou for --method edge-popup: it is for --method bernoulli." in refused(
        mnist, "--preset", "zhou"
    )
    with pytest.raises(UserError, match="there is --preset quick, paper"):
        presets.recipe(presets.CIFAR, "tutorial", "snip")


def test_the_settings_import_nothing_heavy():
    code = "import sys, experiments.config.run, experiments.config.flags, experiments.config.presets\n"
    code += "print([m for m in ('jax', 'numpy', 'flax', 'optax', 'matplotlib', 'supermask_jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_always_named_are_the_settings_of_the_first_version():
    """They are 39 for ever: one that is added here later would rename every run on people's disks."""
    assert len(Run.ALWAYS_NAMED) == 39 and {field.name for field in fields(Run)} > Run.ALWAYS_NAMED
    assert typing.get_origin(Run.__annotations__["ALWAYS_NAMED"]) is ClassVar


@pytest.mark.parametrize("columns", (40, 80))
def test_help_breaks_its_lines_between_words_and_within_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parsed(mnist, "--help")
    lines = capsys.readouterr().out.splitlines()
    describes = " ".join(inspect.getdoc(mnist.Config).split())
    assert len(lines) > 50 and max(len(line) for line in lines if "python -m" not in line) <= columns
    assert describes in " ".join(" ".join(lines[1:10]).split())


def test_help_is_without_colours_where_none_are_wanted():
    asked = {**os.environ, "NO_COLOR": "1"}
    code = "from experiments.config import flags\nprint(flags.tyro._settings._experimental_options['ansi_codes'])"
    for environment, colours in ((asked, "False"), ({k: v for k, v in asked.items() if k != "NO_COLOR"}, "True")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == colours, done.stderr
