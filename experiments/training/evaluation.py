"""How good a network is: on all examples of an evaluation split, and, beside accuracy, how far it can be trusted."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data.augment import normalise
from experiments.data.batches import in_batches
from experiments.data.source import Arrays, Dataset, Shifted, Source
from experiments.run.placement import Placement
from experiments.training.loss import losses_and_correct
from experiments.training.network import Network
from supermask_jax import metrics
from supermask_jax.methods import Method
from supermask_jax.trees import Tree, apply_masks

BATCH = 250  # or the next number that the devices divide
EPSILON = 8 / 255  # of the adversarial images, in pixel space
OOD_IMAGES = 2000  # of noise


class Split(NamedTuple):
    """Examples that a network is evaluated on: "validation" or "test"."""

    name: str
    source: Source


class Evaluator:
    """Masks, parameters and figures of the networks of one method; each is compiled once.

    Args:
      method: what the masks are, and what the model is given.
      network: the model.
      dataset: whose mean and deviation the model's images are normalised by.
      placement: where the networks are; each of its devices evaluates its share of the images. One device, if None.
    """

    def __init__(self, method: Method, network: Network, dataset: Dataset, placement: Placement | None = None):
        self._network, self._mean, self._std = network, dataset.mean, dataset.std
        self._placement, self._batches = placement or Placement(), {}
        self._batch = BATCH + -BATCH % self._placement.size

        def masked(subnet, key):
            masks = method.mask_fn(subnet.scores, key)
            params = apply_masks(subnet.weights, masks) if method.product is None else method.product(subnet, key)
            # Copies: masks that are the scores themselves would be given away with the state at the next step.
            return jax.tree.map(jnp.copy, (masks, params))

        def sums(params, state, classes, images, labels, weights):
            def one(batch):
                images, labels, weights = batch
                logits = self._logits(params, state, images)
                losses, correct = losses_and_correct(logits if classes is None else logits[:, classes], labels)
                return jnp.sum(losses * weights), jnp.sum(correct * weights)

            losses, correct = jax.lax.map(one, (images, labels, weights))
            return jnp.sum(losses), jnp.sum(correct)

        everywhere = self._placement.everywhere
        self._masked, self._sums = sm.jit(masked, out_shardings=(None, everywhere)), sm.jit(sums)
        self._logits_twice = sm.jit(self._clean_and_adversarial, out_shardings=everywhere)

    def masked(self, subnet: sm.Subnet, key: jax.Array | None = None) -> tuple[Tree, Tree]:
        """(masks, parameters) of the network: the deterministic one, or the one that a key draws."""
        return self._masked(subnet, key)

    def figures(self, params: Tree, state: Tree, split: Split, classes: jax.Array | None = None) -> dict[str, float]:
        """{"<split>_loss": mean cross-entropy in nats, "<split>_accuracy": fraction}, over all its examples.

        With `classes`, int32 [k], only the logits of these count, and the labels of the split are places among them.
        """
        loss, correct = 0.0, 0.0
        for batches in self._all_batches(split):
            sums = self._sums(params, state, classes, *batches)
            loss, correct = loss + float(sums[0]), correct + float(sums[1])
        examples = len(split.source)
        return {f"{split.name}_loss": loss / examples, f"{split.name}_accuracy": correct / examples}

    def shifted_figures(self, params: Tree, state: Tree, shifted: Shifted) -> dict[str, float]:
        """What `experiments.run.schemas.Shifted` holds, over all images and the classes of a shifted set."""
        name, source = shifted.dataset.name, shifted.dataset.test
        classes = self._placement.replicate(shifted.classes)
        got = self.figures(params, state, Split(name, source), classes)
        figures = {f"test_{figure}": got[f"{name}_{figure}"] for figure in ("accuracy", "loss")}
        return figures | {"images": len(source), "classes": len(shifted.classes)}

    def sampled_figures(self, subnet: sm.Subnet, state: Tree, split: Split, keys) -> dict[str, float]:
        """The means of `figures` over the networks that the keys draw, as "<split>_sampled_..."; {} without keys."""
        drawn = [self.figures(self.masked(subnet, key)[1], state, split) for key in keys]
        return {
            name.replace("_", "_sampled_"): float(np.mean([figures[name] for figures in drawn]))
            for name in (drawn[0] if drawn else ())
        }

    def assess(self, params: Tree, state: Tree, split: Split, others: Mapping[str, Source]) -> dict:
        """What is measured beside accuracy; `supermask_jax.metrics` says what each figure is.

        Args:
          params, state: the network.
          split: images of the distribution that it was trained on.
          others: {name: out-of-distribution images}.

        Returns:
          "ece", "brier", "reliability" (for each of count, confidence, accuracy a list by bin), "fgsm_accuracy" (at
          `EPSILON`), and "ood_auroc": {name: area under the curve of the highest probability}.
        """
        logits, adversarial, labels = self._all_logits(params, state, split.source)
        confidence = np.asarray(metrics.max_softmax(logits))
        bins = metrics.reliability(logits, labels)
        return {
            "ece": float(metrics.expected_calibration_error(logits, labels)),
            "brier": float(metrics.brier(logits, labels)),
            "reliability": {name: np.asarray(values).tolist() for name, values in bins._asdict().items()},
            "fgsm_accuracy": float(np.mean(np.argmax(adversarial, axis=-1) == labels)),
            "ood_auroc": {
                name: float(
                    metrics.auroc(
                        confidence, np.asarray(metrics.max_softmax(self._all_logits(params, state, other)[0]))
                    )
                )
                for name, other in others.items()
            },
        }

    def _all_batches(self, split: Split) -> Iterator[tuple[jax.Array, ...]]:
        """(images, labels, weights), each [batches, batch, ...], of all examples: at once, if they are in memory."""
        source = split.source
        if isinstance(source, Arrays):
            if split.name not in self._batches:
                self._batches[split.name] = self._placed(source.images, source.labels)
            yield self._batches[split.name]
            return
        for part in self._read(source):
            yield self._placed(part["image"], part["label"])

    def _placed(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, ...]:
        parts = images, labels, np.ones(len(labels), np.float32)
        return tuple(self._placement.split(in_batches(part, self._batch), axis=1) for part in parts)

    def _read(self, source: Source) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(source), self._batch):
            yield source.read(np.arange(start, min(start + self._batch, len(source))))

    def _all_logits(self, params: Tree, state: Tree, source: Source) -> list[np.ndarray]:
        """The logits of all images, those of the adversarial images made from them and their labels, and the labels."""
        parts = []
        for part in self._read(source):
            [images], [labels] = in_batches(part["image"], self._batch), in_batches(part["label"], self._batch)
            both = self._logits_twice(params, state, *map(self._placement.split, (images, labels)))
            parts.append([np.asarray(logits)[: len(part["label"])] for logits in both] + [part["label"]])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _clean_and_adversarial(
        self, params: Tree, state: Tree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of images [n, h, w, c] uint8, and of the adversarial images made from them."""

        def loss(pixels, labels):
            return jnp.mean(losses_and_correct(self._logits(params, state, pixels, white=1), labels)[0])

        adversarial = metrics.fgsm(loss, images.astype(jnp.float32) / 255, labels, EPSILON)
        return self._logits(params, state, images), self._logits(params, state, adversarial, white=1)

    def _logits(self, params: Tree, state: Tree, images: jax.Array, white: float = 255) -> jax.Array:
        return self._network.logits(params, state, normalise(images, self._mean, self._std, white))


def make_flow(loss_fn: Callable, batch: dict) -> Callable[[Tree, Tree, Tree], float]:
    """flow(params, model_state, masks) -> the norm of the loss's gradient over the kept weights, on one batch."""

    def norm(params, state, masks, batch):
        gradient = jax.grad(lambda p: loss_fn(p, state, batch, jax.random.key(0))[0])(params)
        return metrics.gradient_flow(gradient, masks)

    norm = sm.jit(norm)
    return lambda params, state, masks: float(norm(params, state, masks, batch))


def noise_like(dataset: Dataset, seed: int, examples: int = OOD_IMAGES) -> Arrays:
    """uint8 images of Gaussian noise, with the mean and deviation of the data set's channels before clipping."""
    shape = (examples, *dataset.image_shape)
    pixels = np.random.default_rng(seed).normal(np.array(dataset.mean), np.array(dataset.std), shape)
    return Arrays(np.clip(255 * pixels, 0, 255).round().astype(np.uint8), np.zeros(examples, np.int32))
