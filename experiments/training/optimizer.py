"""The optimizer that the settings name, and its learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config.registry import OPTIMIZERS
from experiments.config.sections import Optim

DROP = 0.1  # what a learning rate is multiplied by at each of --drop-at


def make_schedule(optim: Optim, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """step -> learning rate. Of a warm-up, the rate is the schedule's times the part of it that is over."""
    schedule, warmup = _without_warmup(optim, steps, steps_per_epoch), optim.warmup_epochs * steps_per_epoch
    if warmup <= 1:  # over before the first step ends
        return schedule
    return lambda step: schedule(step) * optax.linear_schedule(1 / warmup, 1.0, max(round(warmup) - 1, 1))(step)


def _without_warmup(optim: Optim, steps: int, steps_per_epoch: int) -> optax.Schedule:
    match optim.schedule:
        case "constant":
            return optax.constant_schedule(optim.learning_rate)
        case "cosine":
            return optax.cosine_decay_schedule(optim.learning_rate, steps)
        case "cosine-epoch":
            by_epoch = optax.cosine_decay_schedule(optim.learning_rate, max(steps // steps_per_epoch, 1))
            return lambda step: by_epoch(step // steps_per_epoch)
        case "steps":
            drops: dict[int, float] = {}
            for part in optim.drop_at:
                at = round(part * steps)
                drops[at] = drops.get(at, 1.0) * DROP
            return optax.piecewise_constant_schedule(optim.learning_rate, drops)
        case "exponential":
            return optax.exponential_decay(optim.learning_rate, steps, optim.final_rate)
    raise ValueError(f"there is no schedule {optim.schedule!r}")


def make_optimizer(optim: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer; weight decay is added to the gradient, as the published codes do."""
    entry = OPTIMIZERS[optim.optimizer]
    rule = entry.resolve()(schedule, **{name: getattr(optim, name) for name in entry.reads})
    return optax.chain(optax.add_decayed_weights(optim.weight_decay), rule)


def begin_schedule_at(step: int, opt_state: Any) -> Any:
    """A state of the optimizer whose schedule goes on from this step. All else, momentum say, is as it was."""

    def moved(part: Any) -> Any:
        return part._replace(count=jnp.int32(step)) if _counts_the_schedule(part) else part

    return jax.tree.map(moved, opt_state, is_leaf=_counts_the_schedule)


def hold_last_rate(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule of so many steps that stays at the rate of its last step from then on."""
    return lambda step: schedule(jnp.minimum(step, steps - 1))


def _counts_the_schedule(part: Any) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)
