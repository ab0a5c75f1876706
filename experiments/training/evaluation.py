"""How good a network is: on all examples of a held-out set, and, beside accuracy, how far it can be trusted."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data import load as data
from experiments.run.placement import Layout
from experiments.training import recipe
from experiments.training.stepper import compiling
from supermask_jax import metrics
from supermask_jax.trees import Tree, apply_masks

BATCH = 250  # or the next number that the devices divide
EPSILON = 8 / 255  # of the adversarial images, in pixel space


class Held(NamedTuple):
    """Images that are evaluated after each epoch: "validation" or "test"."""

    name: str
    images: np.ndarray
    labels: np.ndarray


class Evaluator:
    """Masks, parameters and figures of networks of one shape; each is compiled once.

    Args:
      mask_fn: what the masks are, exactly 0 or 1.
      forward: what the weights are multiplied by.
      model, dataset: the network, and the images whose mean and deviation it sees.
      layout: where the networks are; each of its devices evaluates its share of the images. One device, if None.
    """

    def __init__(
        self, mask_fn: sm.MaskFn, forward: sm.MaskFn, model, dataset: data.Dataset, layout: Layout | None = None
    ):
        self._model, self._dataset, self._batches = model, dataset, {}
        self._layout = layout or Layout()
        self._batch = BATCH + -BATCH % self._layout.size

        def found(subnet, key):
            factors = forward(subnet.scores, key)
            masks = factors if forward is mask_fn else mask_fn(subnet.scores, key)
            # Copies: masks that are the scores themselves would be given away with the state at the next step.
            return jax.tree.map(jnp.copy, (masks, apply_masks(subnet.weights, factors)))

        def sums(params, images, labels, weights):
            def one(batch):
                images, labels, weights = batch
                losses, hits = recipe.losses_and_hits(self._logits(params, images), labels)
                return jnp.sum(losses * weights), jnp.sum(hits * weights)

            losses, hits = jax.lax.map(one, (images, labels, weights))
            return jnp.sum(losses), jnp.sum(hits)

        self._found, self._sums = compiling(found, (None, self._layout.everywhere)), compiling(sums)
        self._judged = compiling(self._judge, self._layout.everywhere)

    def found(self, subnet: sm.Subnet, key: jax.Array | None = None) -> tuple[Tree, Tree]:
        """(masks, parameters) of the network: the deterministic one, or the one that a key draws."""
        return self._found(subnet, key)

    def figures(self, params: Tree, held: Held) -> dict[str, float]:
        """{"<held>_loss": mean cross-entropy in nats, "<held>_accuracy": fraction}, over all its examples."""
        examples = len(held.labels)
        if held.name not in self._batches:
            self._batches[held.name] = [
                self._layout.split(in_batches(part, self._batch), axis=1)
                for part in (held.images, held.labels, np.ones(examples, np.float32))
            ]
        loss, hits = (float(total) / examples for total in self._sums(params, *self._batches[held.name]))
        return {f"{held.name}_loss": loss, f"{held.name}_accuracy": hits}

    def sampled_figures(self, subnet: sm.Subnet, held: Held, keys) -> dict[str, float]:
        """The means of `figures` over the networks that the keys draw, as "<held>_sampled_..."; {} without keys."""
        drawn = [self.figures(self.found(subnet, key)[1], held) for key in keys]
        return {
            name.replace("_", "_sampled_"): float(np.mean([figures[name] for figures in drawn]))
            for name in (drawn[0] if drawn else ())
        }

    def judge(self, params: Tree, held: Held, others: dict[str, np.ndarray]) -> dict:
        """What is asked of a network beside accuracy; see `supermask_jax.metrics` for each.

        Args:
          params: the network.
          held: the images that it should know.
          others: {name: images} that it should not.

        Returns:
          "ece", "brier", "reliability" (a list for each of count, confidence, accuracy, by bin), "fgsm_accuracy"
          (at `EPSILON`), and "ood_auroc": {name: area under the curve of the highest probability}.
        """
        logits, adversarial = self._all_logits(params, held.images, held.labels)
        confidence = _max_softmax(logits)
        bins = metrics.reliability(logits, held.labels)
        return {
            "ece": float(metrics.expected_calibration_error(logits, held.labels)),
            "brier": float(metrics.brier(logits, held.labels)),
            "reliability": {name: np.asarray(values).tolist() for name, values in bins._asdict().items()},
            "fgsm_accuracy": float(np.mean(np.argmax(adversarial, axis=-1) == held.labels)),
            "ood_auroc": {
                name: float(metrics.auroc(confidence, _max_softmax(self._all_logits(params, images)[0])))
                for name, images in others.items()
            },
        }

    def _all_logits(self, params: Tree, images: np.ndarray, labels: np.ndarray | None = None) -> list[np.ndarray]:
        """`_judge` of all images, batch by batch; its second half means nothing without labels."""
        labels = np.zeros(len(images), np.int32) if labels is None else labels
        batches = zip(in_batches(images, self._batch), in_batches(labels, self._batch), strict=True)
        parts = [self._judged(params, *map(self._layout.split, batch)) for batch in batches]
        return [np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True)]

    def _judge(self, params: Tree, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of images [n, h, w, c] uint8, and of the adversarial images made from them."""

        def loss(pixels, labels):
            return jnp.mean(recipe.losses_and_hits(self._logits(params, pixels, scale=1), labels)[0])

        adversarial = metrics.fgsm(loss, images.astype(jnp.float32) / 255, labels, EPSILON)
        return self._logits(params, images), self._logits(params, adversarial, scale=1)

    def _logits(self, params: Tree, images: jax.Array, scale: float = 255) -> jax.Array:
        images = recipe.normalise(images, self._dataset.mean, self._dataset.std, scale)
        return self._model.apply({"params": params}, images)


def make_flow(loss_fn: Callable, batch: dict) -> Callable[[Tree, Tree], float]:
    """flow(params, masks) -> the norm of the loss's gradient over the active weights, always on the same batch."""

    def norm(params, masks, batch):
        gradient = jax.grad(lambda p: loss_fn(p, None, batch, jax.random.key(0))[0])(params)
        return metrics.gradient_flow(gradient, masks)

    norm = compiling(norm)
    return lambda params, masks: float(norm(params, masks, batch))


def noise_like(dataset: data.Dataset, seed: int, examples: int = 2000) -> np.ndarray:
    """uint8 images of Gaussian noise, its mean and deviation those of the data set's pixels before it is clipped."""
    shape = (examples, *dataset.test_images.shape[1:])
    pixels = np.random.default_rng(seed).normal(dataset.mean, dataset.std, shape)
    return np.clip(255 * pixels, 0, 255).round().astype(np.uint8)


def _max_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(metrics.max_softmax(logits))


def in_batches(part: np.ndarray, size: int) -> np.ndarray:
    """[batches, size, ...], padded with zeros."""
    rest = np.zeros((-len(part) % size, *part.shape[1:]), part.dtype)
    return np.concatenate([part, rest]).reshape(-1, size, *part.shape[1:])
