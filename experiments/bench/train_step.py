"""A network's train step as the commands run it, on random images. The benchmark times it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.config.sections import Init, Model, Optim
from experiments.data.batches import epoch_order
from experiments.data.source import Arrays, Dataset, arrays_dataset
from experiments.training import stepper
from experiments.training.loss import make_loss
from experiments.training.network import Network, network
from experiments.training.optimizer import make_optimizer, make_schedule
from supermask_jax.methods import Method
from supermask_jax.trees import Tree

DENSITY = 0.5
LEARNING_RATE = 0.01  # low: nothing can be learned from noise, and large steps diverge on it
EPOCHS = 10  # over which the learning rate falls


class Sizes(NamedTuple):
    """What is measured, and how large it is. The defaults are MNIST's; tests take smaller ones."""

    model: Model = Model()
    images: int = 60_000
    image_shape: tuple[int, int, int] = (28, 28, 1)
    examples_per_turn: int = 1024  # that a candidate trains on before the next one's turn
    streamed: tuple[int, int] = (2**16, 2**10)  # scores for bandwidth: more than any cache holds


class Start(NamedTuple):
    """What every method's training starts from."""

    dataset: Dataset  # random images: a step's time depends on no content
    network: Network
    weights: Tree  # on the host
    model_state: Tree


def noise(sizes: Sizes) -> Start:
    """Random images of these sizes, and the network for them as training would start with."""
    rng, channels = np.random.default_rng(0), sizes.image_shape[-1]
    images = rng.integers(0, 256, (sizes.images, *sizes.image_shape), np.uint8)
    labels = rng.integers(0, 10, sizes.images, np.int32)
    uniform = {"mean": (0.5,) * channels, "std": (12**-0.5,) * channels}
    dataset = arrays_dataset("noise", (images, labels, images[:1], labels[:1]), "random", **uniform)
    made = network(sizes.model, Init(), dataset.classes, dataset.image_shape)
    return Start(dataset, made, *jax.device_get(made.init(jax.random.key(0))))


def make_method(name: str, weights: Tree) -> Method:
    """Edge-popup or dense training, from these weights and from the same scores each time."""
    if name == "dense":
        return sm.methods.dense(weights)
    return sm.methods.edge_popup(jax.random.key(0), weights, DENSITY)


class OurStep:
    """A method's train step as the commands run it. Each call trains for `steps` steps.

    Args:
      name: "edge-popup" or "dense".
      start: of `noise`.
      batch: images per step.
      sizes: how many examples a call trains on.
    """

    def __init__(self, name: str, start: Start, batch: int, sizes: Sizes):
        self.optim = Optim(batch_size=batch, learning_rate=LEARNING_RATE)
        dataset, examples, key = start.dataset, len(start.dataset.train), jax.random.key(0)
        weights, model_state = jax.tree.map(jnp.array, (start.weights, start.model_state))  # the step donates its state
        loss_fn = make_loss(start.network, dataset.mean, dataset.std)
        steps = max(examples // batch, 1)
        tx = make_optimizer(self.optim, make_schedule(self.optim, EPOCHS * steps, steps))
        method = make_method(name, weights)
        self.step = sm.make_train_step(method.mask_fn, loss_fn, tx, learns=method.learns)
        self.state = sm.init_state(method.subnet, tx, key, model_state, learns=method.learns)
        self.totals = stepper.zero_totals()
        self.advance = stepper.OnDevice(self.step, method.learns, dataset.train)
        self._order = epoch_order(key, 0, examples, batch)
        self.steps = max(self.advance.steps_per_call, sizes.examples_per_turn // batch)
        self.steps = min(self.steps, len(self._order[0]))

    def __call__(self):
        self.state, self.totals, _, _ = self.advance(self.state, self.totals, self._order, 0, self.steps)
        return self.state, self.totals


def first_batch(train: Arrays, batch: int) -> dict[str, np.ndarray]:
    """The first images of a source, as a train step takes them."""
    examples = train.read(np.arange(min(batch, len(train))))
    return {**examples, "weight": np.ones(len(examples["label"]), np.float32)}
