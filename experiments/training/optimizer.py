"""The optimizer that the settings name, and its learning rate."""

import optax

from experiments.config.registry import OPTIMIZERS
from experiments.config.sections import Optim


def make_schedule(optim: Optim, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """step -> learning rate."""
    match optim.schedule:
        case "constant":
            return optax.constant_schedule(optim.learning_rate)
        case "cosine":
            return optax.cosine_decay_schedule(optim.learning_rate, steps)
        case "cosine-epoch":
            by_epoch = optax.cosine_decay_schedule(optim.learning_rate, max(steps // steps_per_epoch, 1))
            return lambda step: by_epoch(step // steps_per_epoch)
    raise ValueError(f"there is no schedule {optim.schedule!r}")


def make_optimizer(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer; weight decay is added to the gradient, as the published codes do."""
    entry = OPTIMIZERS[optim.optimizer]
    rule = entry.resolve()(schedule, **{name: getattr(optim, name) for name in entry.reads})
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), rule)
