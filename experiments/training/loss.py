"""The loss that everything is trained by: mean cross-entropy of images that are changed at random and normalised."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from experiments.data.augment import normalise, random_shift
from experiments.training.network import Network
from supermask_jax import parallel


def make_loss(
    network: Network,
    mean: Sequence[float],
    std: Sequence[float],
    shift: int = 0,
    temperature: float = 1.0,
    axis_name: str | None = None,
) -> Callable:
    """loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)).

    A batch is {"image": uint8 [n, h, w, c], "label": int [n], "weight": float [n]}. The loss is the weighted mean
    cross-entropy in nats. The metrics are weighted sums: "correct" and "count".

    Args:
      network: what is trained.
      mean, std: of each channel, for pixels in [0, 1].
      shift: pixels that each image is moved by at most, along each axis.
      temperature: what the logits are divided by.
      axis_name: the axis of pmap, None under jit.
    """

    def loss_fn(params, model_state, batch, key):
        dropout_key, shift_key = jax.random.split(key)
        images = random_shift(shift_key, batch["image"], shift) if shift else batch["image"]
        images = normalise(images, mean, std)
        logits, model_state = network.apply(params, model_state, images, train=True, key=dropout_key)
        losses, correct = losses_and_correct(logits / temperature, batch["label"])
        count = jnp.sum(batch["weight"])
        loss = parallel.weighted_mean(losses, batch["weight"], axis_name)
        return loss, (model_state, {"correct": jnp.sum(correct * batch["weight"]), "count": count})

    return loss_fn


def losses_and_correct(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n] cross-entropies in nats, and [n] whether the highest logit is the label's."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels
