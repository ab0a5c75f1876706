"""What a run would take, from its compiled step, before anything is trained: memory, FLOPs, bytes, days on chips."""

import sys
import time
from functools import partial
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.bench import hlo
from experiments.bench.cost_model import CHIPS, Assumed, Chip, Network
from experiments.bench.networks import describe_module
from experiments.config.run import Run
from experiments.data.blank import blank_imagenet
from experiments.data.source import Dataset
from experiments.run import display, processes
from experiments.run.errors import DataError
from experiments.training import fit, stepper, summary
from experiments.training.images import open_data, splits
from experiments.training.parts import Parts

# What steps took that were measured on an H100 (docs/speed.md, docs/scaling.md). Dense training of CIFAR's ResNet-18 in
# batches of 128 takes 4.32 ms: its FLOPs at this share of the peak, or so many transfers of each activation at the peak
# of the memory. Which of the two it was is not known, so the slower one is expected of other networks.
SHARE, TRANSFERS = 0.2, 23.0
LAYER = 61e-6  # seconds for each layer and each BatchNorm, at least: of ResNet-20, which is small and has many
# Edge-popup's selection and masking, in the five networks that were measured: seconds, and transfers of each score.
SELECTION, SCORE_TRANSFERS = 0.4e-3, 200.0
FLOAT = 4  # bytes


def show(config: Run) -> dict[str, Any]:
    """Compiles the train step of the settings for their devices, and prints what `measure` returns.

    Raises:
      UserError: the devices do not exist or do not divide the batch; the images are missing and are not ImageNet's.
    """
    fit.join(config)
    dataset = _images(config)
    parts = Parts(config, *splits(config.data, dataset), fit.place(config))
    if processes.is_first():
        display.say(f"compiling the train step of {config.model.model} for {parts.placement.size} x {_device()}")
    measured = measure(parts)
    if processes.is_first():
        _print(measured, config, parts.placement.size)
    return measured


def measure(parts: Parts) -> dict[str, Any]:
    """What one train step takes, from its compiled program, and what the training would take on `CHIPS`.

    Returns:
      "parameters"; "kept", of the weights that masks are on; "flops" and "kept_flops" of the forward pass of an image,
      where a multiplication and its addition are two; "step_flops", forward and back, of all devices; "steps" of the
      training; "compile_seconds". "kept" and "kept_flops" are None of masks that are drawn.
      "memory" of a device, in bytes: "state", "images" and the rest of the arguments, "temporary" and all of it,
      "peak". "wire": bytes that a device sends in a step by ring algorithms, {kind: bytes}.
      "chips": {name: {"steps_per_second", "days", "fits"}}. It fits if the state, the gradients, the masked weights and
      the activations that the backward pass needs are less than the memory.
    """
    config, size = parts.config, parts.placement.size
    state, totals = parts.state(), parts.placement.replicate(stepper.zero_totals())
    masks, _ = parts.evaluator.masked(state.subnet)
    kept = {} if parts.method.sampled else summary.sizes(parts.network, *parts.initial, masks)
    network = describe_module(parts.network.module, parts.network.image_shape)
    began = time.perf_counter()
    compiled = parts.stepper.lower(state, totals, parts.epochs.order(parts.key, 0)).compile()
    seconds = time.perf_counter() - began
    wire = {
        kind: hlo.wire_bytes(kind, result, size)
        for kind, result in hlo.by_kind(hlo.collectives(compiled.as_text())).items()
    }
    measured = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.initial[0])),
        "kept": kept.get("density"),
        "flops": network.flops,
        "kept_flops": kept.get("flops"),
        "step_flops": 3 * network.flops * config.optim.batch_size,
        "steps": parts.last_step,
        "compile_seconds": seconds,
        "memory": _memory(compiled, state),
        "wire": wire,
    }
    learns = jax.tree.leaves(getattr(state.subnet, parts.method.learns))
    chips = partial(_on_chip, parts.config, network, measured, size, sum(map(_on_one_device, learns)))
    return measured | {"chips": {name: chips(chip) for name, chip in CHIPS.items()}}


def _images(config: Run) -> Dataset:
    try:
        dataset = processes.in_turn(partial(open_data, config.data))
        if len(dataset.train):
            return dataset
        why = "there is nothing to train on"
    except DataError as error:
        if config.data.dataset != "imagenet":
            raise
        why = str(error).partition(":")[0]
    if processes.is_first():
        display.say(f"{why}: the numbers of photographs and classes are ImageNet's")
    return blank_imagenet(config.data.image_size)


def _memory(compiled: jax.stages.Compiled, state: Any) -> dict[str, int]:
    told = compiled.memory_analysis()
    held = sum(_on_one_device(leaf) for leaf in jax.tree.leaves(state))
    temporary = stepper.memory_of(compiled)
    arguments = told.argument_size_in_bytes if told else held
    return {"state": held, "images": arguments - held, "temporary": temporary, "peak": arguments + temporary}


def _on_one_device(leaf: jax.Array) -> int:
    leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return leaf.addressable_shards[0].data.nbytes


def _on_chip(
    config: Run, network: Network, measured: dict[str, Any], devices: int, learns: int, chip: Chip
) -> dict[str, Any]:
    """The steps a second that are expected on so many of a chip, the days of the training, and whether it fits.

    Args:
      learns: bytes of the scores or weights on a device.
    """
    images, narrow = config.optim.batch_size / devices, config.model.bfloat16
    activations = network.activations * images * (FLOAT // 2 if narrow else FLOAT)
    flops = chip.bfloat16 if narrow else chip.flops
    seconds = max(
        3 * network.flops * images / (flops * SHARE),
        activations * TRANSFERS / chip.bandwidth,
        LAYER * (len(network.scores) + network.norms),
    )
    if config.masks.method == "edge-popup":
        seconds += SELECTION + learns * SCORE_TRANSFERS / chip.bandwidth
    seconds += sum(measured["wire"].values()) / (chip.link * Assumed().link)
    held = measured["memory"]["state"] + 2 * learns + activations  # and masked weights, and gradients
    return {
        "steps_per_second": 1 / seconds,
        "days": measured["steps"] * seconds / 86400,
        "fits": held < chip.memory,
    }


def _device() -> str:
    return jax.devices()[0].device_kind


def _print(measured: dict[str, Any], config: Run, devices: int) -> None:
    memory, wire = measured["memory"], measured["wire"]
    batch = config.optim.batch_size
    console = Console(file=sys.stdout)
    table = Table(
        title=f"a train step of {config.model.model} by {config.masks.method}, {batch:,} images", show_header=False
    )
    rows = (
        ("parameters", f"{measured['parameters']:,}"),
        *([("of the weights under masks, kept", f"{measured['kept']:.1%}")] if measured["kept"] is not None else []),
        ("FLOPs of an image, forward", _scaled(measured["flops"])),
        *([("  of them with kept weights", _scaled(measured["kept_flops"]))] if measured["kept_flops"] else []),
        ("FLOPs of a step, forward and back", _scaled(measured["step_flops"])),
        ("a device holds: weights, scores, optimizer", _scaled(memory["state"], "B")),
        ("  images and labels", _scaled(memory["images"], "B")),
        (f"  within the step, as compiled for {_device()}", _scaled(memory["temporary"], "B")),
        ("  at most", _scaled(memory["peak"], "B")),
        ("a device sends in a step", _scaled(sum(wire.values()), "B")),
        *((f"  {kind}", _scaled(size, "B")) for kind, size in wire.items()),
        ("compilation", f"{measured['compile_seconds']:.1f} s"),
        ("steps of the training", f"{measured['steps']:,}"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    table = Table(title=f"expected of {devices} of each")
    for head in ("chip", "steps/s", "images/s", "training"):
        table.add_column(head, justify="left" if head == "chip" else "right")
    for name, chip in measured["chips"].items():
        rate = chip["steps_per_second"]
        speed = (f"{rate:,.2f}", f"{rate * batch:,.0f}", _time(chip["days"]))
        table.add_row(name, *(speed if chip["fits"] else ("", "", "does not fit")))
    console.print(table)
    display.say(
        "Expected speeds are guesses, from steps that were measured on an H100 and from the vendors' peaks; reading "
        "images and evaluation are not in them. docs/scaling.md says how they are made."
    )


def _scaled(count: float, unit: str = "") -> str:
    """1,234,567 as "1.23 M"."""
    power = next((power for power in (12, 9, 6, 3) if count >= 10**power), 0)
    return f"{count / 10**power:,.{2 if power else 0}f} {' kMGT'[power // 3].strip()}{unit}".rstrip()


def _time(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    if days >= 1 / 24:
        return f"{24 * days:,.1f} hours"
    return f"{1440 * days:,.0f} minutes" if 1440 * days >= 1.5 else "a minute at most"
