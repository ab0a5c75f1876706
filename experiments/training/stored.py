"""The file that a run leaves of its network, and the evaluation of such a file."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import supermask_jax as sm
from experiments.config.registry import DATASETS, MODELS
from experiments.config.run import Run
from experiments.config.sections import Data, Init, Model
from experiments.data.load import load_shifted
from experiments.data.source import Dataset
from experiments.run import display, processes
from experiments.run.errors import UserError, brief
from experiments.run.placement import Placement
from experiments.training import summary
from experiments.training.evaluation import Evaluator, Split
from experiments.training.images import open_data
from experiments.training.network import network
from experiments.training.parts import Parts
from supermask_jax import artifact
from supermask_jax.trees import Tree

OWN_FILES = {"folder": "folder", "photographs": "imagenet"}  # how names of users' own images begin: who reads them


def save(parts: Parts, folder: Path, subnet: sm.Subnet, model_state: Tree, figures: dict[str, float]) -> dict[str, int]:
    """Writes the network of a run to `folder`; returns "file_bytes", and "dense_bytes" of all its weights in float32.

    Args:
      parts: of the run.
      folder: its work directory.
      subnet, model_state: the network at the end.
      figures: "test_loss" and "test_accuracy".
    """
    config, dataset, method = parts.config, parts.dataset, parts.method
    origin: artifact.Origin = artifact.Stored()
    if method.learns == "scores" and not config.weights:
        origin = artifact.Drawn(config.init.init.replace("-", "_"), config.seed, "weights", density=parts.scale)
    about = describe(config.model, dataset) | {
        "method": config.masks.method,
        "density": config.masks.density,
        "epochs": config.epochs,
        "seed": config.seed,
        **{name: figures[name] for name in ("test_accuracy", "test_loss")},
        **({"weights": Path(config.weights).name} if config.weights else {}),
    }
    found = method._replace(subnet=jax.tree.map(np.asarray, subnet))
    state = jax.tree.map(np.asarray, model_state)
    size = sm.save_subnetwork(folder / artifact.FILE, found, origin, model_state=state, about=about)
    return {"file_bytes": size, "dense_bytes": 4 * sum(leaf.size for leaf in jax.tree.leaves(subnet.weights))}


def describe(model: Model, dataset: Dataset) -> dict[str, Any]:
    """What the file of a network must tell, so that the network can be built and given images again."""
    entry, versions = MODELS[model.model], summary.versions()
    return {
        "model": model.model,
        "architecture": entry.target.partition(":")[2],
        "arguments": {name: getattr(model, name) for name in entry.reads} | dict(entry.arguments),
        **({"bfloat16": True} if model.bfloat16 else {}),
        "classes": dataset.classes,
        "image_shape": list(dataset.image_shape),
        "mean": [float(value) for value in dataset.mean],
        "std": [float(value) for value in dataset.std],
        "dataset": dataset.name,
        "data": dataset.fingerprint,
        "versions": {name: versions[name] for name in ("supermask-jax", "jax")},
    }


def evaluate(config: Run) -> dict[str, Any]:
    """Evaluates the file that the settings name on the test images, and shows the figures beside the recorded ones.

    Args:
      config: `evaluate` is the file. Data and devices are read; of the rest, the file decides. It decides on the data
        set too, unless another one than the command's own is named.

    Returns:
      "test_accuracy" and "test_loss", and the recorded ones as "recorded_accuracy" and "recorded_loss"; with shifted
      sets, "shifted" as in the summary of a run.

    Raises:
      UserError: the file is damaged, or is no network of an experiment; or the images do not fit the network.
    """
    file = Path(config.evaluate or "").expanduser()
    try:
        weights, masks, state, about = sm.load_subnetwork(file)
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror or error}): --evaluate takes a file of a network."
        ) from error
    except ValueError as error:
        raise UserError(f"{error}.") from error
    dataset = open_data(_data_of(config.data, about, type(config)().data, file))
    net = _network_of(about, dataset, file)
    shifted = load_shifted(config.evaluation.shifted, config.data.data_dir, dataset)
    dataset = dataclasses.replace(dataset, mean=tuple(about["mean"]), std=tuple(about["std"]))
    method = sm.Method("weights", sm.identity, sm.Subnet(weights, masks))
    placement = Placement(config.machine.devices)
    evaluator = Evaluator(method, net, dataset, placement)
    _, params = evaluator.masked(placement.place(method.subnet))
    figures = evaluator.figures(params, placement.replicate(state), Split("test", dataset.test))
    others = {
        each.dataset.name: evaluator.shifted_figures(params, placement.replicate(state), each) for each in shifted
    }
    recorded = {"recorded_accuracy": about.get("test_accuracy"), "recorded_loss": about.get("test_loss")}
    if processes.is_first():
        _show(figures | recorded, about, dataset)
        for name, each in others.items():
            display.say(f"on {name}: {display.shifted_text(each)}")
    return figures | recorded | ({"shifted": others} if others else {})


def _data_of(data: Data, about: dict[str, Any], usual: Data, file: Path) -> Data:
    name = str(about.get("dataset"))
    if data.dataset == usual.dataset:
        of_files = name.partition("-")[0]  # of a user's own files, whose names end with a digest
        name = OWN_FILES.get(of_files, name)
        if name not in DATASETS:
            raise UserError(f"{file} does not say which data set it is of: name one with --dataset.")
        data = dataclasses.replace(data, dataset=name)
    shape = about.get("image_shape")
    known = data.image_size == usual.image_size and isinstance(shape, list) and shape and isinstance(shape[0], int)
    if "image_size" in DATASETS[data.dataset].reads and known:
        data = dataclasses.replace(data, image_size=shape[0])  # which the network decides
    return data


def _network_of(about: dict[str, Any], dataset: Dataset, file: Path):
    try:
        entry = MODELS[about["model"]]
        options = {name: about["arguments"].get(name, getattr(Model(), name)) for name in entry.reads}
        model = Model(model=about["model"], bfloat16=about.get("bfloat16") is True, **options)
        model.check()
        classes, shape = int(about["classes"]), tuple(int(size) for size in about["image_shape"])
        usable = len(about["mean"]) == len(about["std"]) == shape[-1]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file} is no network of these experiments: it does not say {brief(error)}.") from error
    if not usable or (classes, shape) != (dataset.classes, dataset.image_shape):
        raise UserError(
            f"{file} holds a network for images of {' x '.join(map(str, shape))} in {classes} classes, and "
            f"{dataset.name} has {' x '.join(map(str, dataset.image_shape))} in {dataset.classes}: name another "
            "--dataset, or the size of the images with --image-size where it can be chosen."
        )
    return network(model, Init(), classes, shape)


def _show(figures: dict[str, Any], about: dict[str, Any], dataset: Dataset) -> None:
    display.say(f"test accuracy {figures['test_accuracy']:.2%}, loss {figures['test_loss']:.4f}, on {dataset.name}")
    if figures["recorded_accuracy"] is None:
        return
    text = f"recorded      {figures['recorded_accuracy']:.2%}"
    if about.get("data") != dataset.fingerprint:
        display.say(f"{text}, on other images of {about.get('dataset')}")
    elif figures["test_accuracy"] != figures["recorded_accuracy"]:
        display.show_warning(f"{text}: another backend or version of JAX rounds differently.")
    else:
        display.say(f"{text}: the same accuracy")
