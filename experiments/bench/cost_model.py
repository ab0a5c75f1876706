"""What a step of edge-popup costs on n devices, by formulae: arithmetic, memory, bytes on the wire. Imports no jax.

Everything is float32. Times come from published peaks times an assumed utilisation. They compare layouts and show what
bounds a step; they predict no run. docs/scaling.md states each formula and what is left out.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from experiments.bench.hlo import wire_bytes

FLOAT = 4  # bytes
Holding = Literal["replicated", "gathered"]


class Network(NamedTuple):
    """What the formulae need to know of a network. Figures per image are those of one forward pass."""

    scores: Mapping[str, tuple[int, ...]]  # {path: shape}; every weight has one
    channels: int  # that BatchNorm normalises, over all layers
    norms: int  # BatchNorm layers
    flops: int  # per image; a multiplication and its addition are two
    activations: int  # numbers kept per image for the backward pass: the outputs of kernels and of BatchNorms


class Chip(NamedTuple):
    """A vendor's published peak figures."""

    flops: float  # per second, in the format that matrices of float32 are multiplied in by default
    bfloat16: float  # the same in bfloat16
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    link: float  # bytes per second that a chip sends to the others, all its links together, one way


CHIPS = {
    # bfloat16, with which TPUs multiply float32 by default; half of the published bidirectional figure for the links.
    # Source: cloud.google.com/tpu/docs/v5e and v5p. A v5e pod ends at 256 chips, a v5p slice at 6,144.
    "TPU v5e": Chip(197e12, 197e12, 16e9, 819e9, 200e9),
    "TPU v5p": Chip(459e12, 459e12, 95e9, 2765e9, 600e9),
    # SXM modules: TF32 and bfloat16 without sparsity, NVLink one way, which ends at 8 GPUs; not checked against data
    # sheets, and in no table of the document.
    "A100": Chip(156e12, 312e12, 80e9, 2039e9, 300e9),
    "H100": Chip(494.7e12, 989.4e12, 80e9, 3350e9, 450e9),
}


class Assumed(NamedTuple):
    """Utilisations and delays that no data sheet gives. They are guesses, not measurements."""

    compute: float = 0.4  # share of the peak that convolutions reach
    bandwidth: float = 0.7
    link: float = 0.7
    message: float = 1e-6  # seconds; a collective over n devices waits for 2 log2(n) of them


class Cost(NamedTuple):
    """The cost of one step on one device."""

    compute: float  # seconds
    selection: float  # seconds of reading scores, pass by pass
    elementwise: float  # seconds of masking weights and updating scores
    wire: float  # seconds of sending bytes
    latency: float  # seconds of waiting for collectives, however small
    sent: float  # bytes
    state: int  # bytes that live from step to step
    temporary: int  # bytes that live within one, without activations
    activations: int  # bytes

    @property
    def apart(self) -> float:
        """Seconds of a step where nothing overlaps."""
        return sum(self[:5])

    @property
    def overlapped(self) -> float:
        """Seconds of a step where sending and computing overlap completely."""
        return max(self.compute + self.selection + self.elementwise, self.wire + self.latency)


def cost_model(
    network: Network,
    devices: int,
    images: float,
    chip: Chip,
    layout: Holding = "replicated",
    split: Collection[str] = (),
    passes: int = 0,
    assumed: Assumed = Assumed(),  # noqa: B008 - immutable
) -> Cost:
    """The cost of a step with SGD and momentum.

    Args:
      network: what is trained.
      devices: how many.
      images: per device.
      chip: the peak figures of each device.
      layout: "replicated", or "gathered": scores, weights and momentum are split over the devices, and masked weights
        are gathered whole, once, before the forward pass.
      split: paths of the layers that are split; ignored where replicated.
      passes: of selection's search.
      assumed: how much of the peaks is reached.
    """
    moved = collective_bytes(network, layout, split, passes)
    own = own_scores(network, devices, layout, split)
    total = sum(map(math.prod, network.scores.values()))
    sent = sum(wire_bytes(kind, size, devices) for part in moved.values() for kind, size in part.items())
    # A collective for each BatchNorm, forward and back; one for the gradients; those of the layers that are split.
    waits = 2 * network.norms + 1 + (len(split) + passes if layout == "gathered" and split else 0)
    bandwidth = chip.bandwidth * assumed.bandwidth
    return Cost(
        compute=3 * network.flops * images / (chip.flops * assumed.compute),
        selection=passes * FLOAT * own / bandwidth,
        elementwise=8 * FLOAT * own / bandwidth,
        wire=sent / (chip.link * assumed.link),
        latency=waits * 2 * math.log2(devices) * assumed.message,
        sent=sent,
        state=state_bytes(network, devices, layout, split),
        temporary=FLOAT * (2 * total + own),
        activations=int(FLOAT * network.activations * images),
    )


def own_scores(network: Network, devices: int, layout: Holding, split: Collection[str]) -> int:
    """The number of scores on each device."""
    parts = set(split) if layout == "gathered" else set()
    sizes = {path: math.prod(shape) for path, shape in network.scores.items()}
    return sum(size // devices if path in parts else size for path, size in sizes.items())


def state_bytes(network: Network, devices: int, layout: Holding, split: Collection[str] = ()) -> int:
    """Bytes of a device's weights, scores and momentum, and of the running statistics, which are whole everywhere."""
    return FLOAT * (3 * own_scores(network, devices, layout, split) + 2 * network.channels)


def collective_bytes(
    network: Network, layout: Holding, split: Collection[str] = (), passes: int = 0
) -> dict[str, dict[str, int]]:
    """{part of the step: {kind: bytes of the collectives' results, per device}}; without selection's samples.

    A mean and a mean of squares of every channel go forward, and the gradients of both go back. With the gradients goes
    the loss.
    """
    total = sum(map(math.prod, network.scores.values()))
    parts = {
        "gradients and loss": {"all-reduce": FLOAT * (total + 1)},
        "batch statistics": {"all-reduce": 4 * FLOAT * network.channels},
    }
    if layout == "gathered":
        parts["weights"] = {"all-gather": FLOAT * sum(math.prod(network.scores[path]) for path in split)}
        parts["selection"] = {"all-reduce": FLOAT * passes * len(split)}
    return parts


def most_passes(scores: int) -> int:
    """The most passes that selection can need in a layer of so many scores; all layers share each pass.

    The search has rounds. A round of two or three probes (aim, overshoot, farther) leaves at most a quarter of the
    scores between the ends of the bracket; where it does not, three more halve the bracket's width. There are less than
    2**32 keys, so 32 halvings end a search, and log4(scores) quarterings do. While few scores are left, every probe is
    a halving. Two probes from the sample come first. Where equal scores straddle the cut, a second search runs over
    their flat indices.
    """
    quarterings = math.ceil(math.log(max(scores, 1), 4)) + 1
    by_key, by_index = (2 + 3 * quarterings + 6 * halvings for halvings in (32, math.ceil(math.log2(scores + 1)) + 1))
    return by_key + by_index
