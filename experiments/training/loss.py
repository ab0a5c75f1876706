"""The loss that everything is trained by: mean cross-entropy of images that are changed at random and normalised."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from experiments.config.sections import Augment
from experiments.data.augment import flip_where, normalise, random_cutout, random_flip, random_shift
from experiments.training.loop import Batch
from experiments.training.network import Network
from supermask_jax import parallel


def make_loss(
    network: Network,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Augment = Augment(),
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    axis_name: str | None = None,
) -> Callable:
    """loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)).

    A batch is {"image": uint8 [n, h, w, c], "label": int [n], "weight": float [n]}, and with `augment.flip_alternately`
    also "flipped": bool [n]. The loss is the weighted mean cross-entropy in nats. The metrics are weighted sums:
    "correct" and "count".

    Args:
      network: what is trained.
      mean, std: of each channel, for pixels in [0, 1].
      augment: how the images are changed at random.
      label_smoothing: the part of every label that is spread over all classes.
      temperature: what the logits are divided by.
      axis_name: the axis of pmap, None under jit.
    """

    def loss_fn(params, model_state, batch, key):
        dropout_key, change_key = jax.random.split(key)
        images = normalise(augmented(change_key, batch, augment), mean, std)
        logits, model_state = network.apply(params, model_state, images, train=True, key=dropout_key)
        losses, correct = losses_and_correct(logits / temperature, batch["label"])
        if label_smoothing:
            uniform = jnp.mean(-jax.nn.log_softmax(logits / temperature), axis=-1)
            losses = (1 - label_smoothing) * losses + label_smoothing * uniform
        count = jnp.sum(batch["weight"])
        loss = parallel.weighted_mean(losses, batch["weight"], axis_name)
        return loss, (model_state, {"correct": jnp.sum(correct * batch["weight"]), "count": count})

    return loss_fn


def augmented(key: jax.Array, batch: Batch, augment: Augment) -> jax.Array:
    """The images [n, h, w, c] of a batch, changed at random as the settings say; each change has a key of its own."""
    images = batch["image"]
    # With this very key: settings that have only this change draw as they did before there were others.
    if augment.shift:
        images = random_shift(key, images, augment.shift, augment.border)
    if augment.flip_alternately:
        images = flip_where(images, batch["flipped"])
    elif augment.flip:
        images = random_flip(jax.random.fold_in(key, 1), images)
    if augment.cutout:
        images = random_cutout(jax.random.fold_in(key, 2), images, augment.cutout)
    return images


def losses_and_correct(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n] cross-entropies in nats, and [n] whether the highest logit is the label's."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels
