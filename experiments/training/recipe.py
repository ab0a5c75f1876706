"""What the settings of a run name: the network, its weights, the schedule, the optimizer, the loss."""

import jax
import jax.numpy as jnp
import optax

from experiments.training.stepper import compiling
from supermask_jax import initializers, models, parallel


def _signed_deviation(key: jax.Array, weights, density=None):
    """Signs and deviations of a Glorot normal draw, as Zhou et al. 2019 take them."""
    return initializers.signed_deviation(initializers.glorot_normal(key, weights, density))


INITIALIZERS = {
    "signed-constant": initializers.signed_constant,
    "unsigned-constant": initializers.unsigned_constant,
    "kaiming-normal": initializers.kaiming_normal,
    "kaiming-uniform": initializers.kaiming_uniform,
    "glorot-normal": initializers.glorot_normal,
    "signed-deviation": _signed_deviation,
}

ON_HOST = ("kaiming-normal", "glorot-normal", "signed-deviation")  # these compute with values


def build_model(config, classes: int):
    """The Flax module that the settings name, without biases."""
    match config.model:
        case "lenet-300-100":
            return models.LeNet300100(classes, use_bias=False)
        case "mlp":
            return models.MLP(classes, use_bias=False, hidden=(config.width,) * config.depth)
        case "cnn":
            return models.ConvNet(classes, channels=(config.width,) * config.depth)
    rates = {"channel_dropout": 0.25, "dropout": 0.5} if config.dropout else {}
    return models.MnistConvNet(classes, **rates)


def end_layers(config) -> tuple[str, str]:
    """The paths of the first and the last kernel of the network that the settings name."""
    match config.model:
        case "lenet-300-100":
            return "Dense_0/kernel", "Dense_2/kernel"
        case "mlp":
            return "Dense_0/kernel", f"Dense_{config.depth}/kernel"
        case "cnn":
            return "Conv_0/kernel", "Dense_0/kernel"
    return "Conv_0/kernel", "Dense_1/kernel"


def steps_per_call(config) -> int | None:
    """How many steps to compile into one call; None for the backend's own number.

    A CPU runs networks without convolutions well inside a loop.
    """
    return 50 if config.model in ("lenet-300-100", "mlp") else None


def draw_weights(config, model, image_shape: tuple[int, ...], key: jax.Array):
    """The model's parameters for images of that shape, its kernels drawn by the initializer that the settings name."""
    density = config.density if config.scale_weights else None

    def draw(key):
        return INITIALIZERS[config.init](key, zero_weights(model, image_shape), density=density)

    return draw(key) if config.init in ON_HOST else compiling(draw)(key)


def zero_weights(model, image_shape: tuple[int, ...]):
    """The model's parameters for images of that shape, all 0; only their shapes are asked for, nothing is compiled.

    Kernels are drawn anew in any case, and the biases of the networks here begin at 0.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def make_schedule(config, steps_per_epoch: int) -> optax.Schedule:
    """step -> learning rate."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps_per_epoch)
    by_epoch = optax.cosine_decay_schedule(config.learning_rate, config.epochs)
    return lambda step: by_epoch(step // steps_per_epoch)


def make_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum or Adam; weight decay is added to the gradient, as the published codes do."""
    rule = optax.sgd(schedule, config.momentum) if config.optimizer == "sgd" else optax.adam(schedule)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), rule)


def make_loss(model, mean: float, std: float, shift: int = 0, temperature: float = 1.0, axis_name: str | None = None):
    """loss_fn of a batch {"image": uint8 [n, h, w, c], "label": int [n], "weight": float [n]}.

    The loss is the weighted mean cross-entropy; the metrics are weighted sums: "correct" and "count". Each image is
    first moved at random by up to `shift` pixels; logits are divided by the temperature. `axis_name`: of pmap.
    """

    def loss_fn(params, model_state, batch, key):
        dropout_key, shift_key = jax.random.split(key)
        images = random_shift(shift_key, batch["image"], shift) if shift else batch["image"]
        images = normalise(images, mean, std)
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
        losses, hits = losses_and_hits(logits / temperature, batch["label"])
        count = jnp.sum(batch["weight"])
        loss = parallel.weighted_mean(losses, batch["weight"], axis_name)
        return loss, (model_state, {"correct": jnp.sum(hits * batch["weight"]), "count": count})

    return loss_fn


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Images [n, h, w, c], each moved by its own whole number of pixels in [-pixels, pixels] per axis; 0 moves in."""
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, corners)


def losses_and_hits(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n] cross-entropies in nats, and [n] whether the highest logit is the label's."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels


def normalise(images: jax.Array, mean: float, std: float, white: float = 255) -> jax.Array:
    """Images as floats, scaled to [0, 1] from [0, white], then by the data set's mean and deviation."""
    return (images.astype(jnp.float32) / white - mean) / std
