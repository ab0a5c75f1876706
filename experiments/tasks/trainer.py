"""Trains the mask of one task after the other in one random network. One compiled step serves all tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.config.registry import METHODS
from experiments.config.sections import Init, Masks, Model
from experiments.config.tasks import ManyTasks
from experiments.data.augment import normalise
from experiments.data.source import Dataset
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted
from experiments.run.placement import Placement
from experiments.tasks.permuted import for_tasks, permutation
from experiments.training import stepper
from experiments.training.evaluation import Evaluator, Split
from experiments.training.loop import Batch, Event, train
from experiments.training.loss import make_loss
from experiments.training.methods import Setup
from experiments.training.network import network
from experiments.training.optimizer import make_optimizer, make_schedule
from supermask_jax.trees import Tree, leaf_key

Report = Callable[[int, int, float], None]

AT_ONCE = 200  # steps between reports, and until a signal is noticed


class Progress(NamedTuple):
    """What training changes."""

    state: sm.TrainState
    totals: dict[str, jax.Array]
    seconds: float


class Trainer:
    """Trains masks for the tasks of a data set.

    All tasks have the weights in common, and the scores that they start from: the mask of a task then differs from the
    others only in what it has learned, which makes the task easier to infer.

    Args:
      config: the settings, as `named` makes them.
      dataset: what to train on.
      split: what the masks are evaluated on.
      stop_requested: whether a signal asked this process to stop.
    """

    def __init__(
        self,
        config: ManyTasks,
        dataset: Dataset,
        split: Split,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self._dataset, self._split, self._stop_requested = dataset, split, stop_requested
        self._key = jax.random.key(config.seed)
        if config.outputs < dataset.classes:
            raise UserError(f"--outputs {config.outputs}: {dataset.name} has {dataset.classes} classes.")
        model = Model(model="mlp", width=config.width, depth=config.depth)
        self.network = network(model, Init(), config.outputs, dataset.image_shape)
        self.weights, _ = self.network.init(leaf_key(self._key, "weights"))
        self._epochs = stepper.epochs_of(dataset.train, config.optim.batch_size)
        self.steps = config.epochs * self._epochs.steps
        self._tx = make_optimizer(config.optim, make_schedule(config.optim, self.steps, self._epochs.steps))
        of_tasks, masks = for_tasks(self.network), Masks(method=config.method, density=config.density)
        setup = Setup(masks, of_tasks, self.weights, None, leaf_key(self._key, "scores"), self._tx)
        self._method = METHODS[config.method].resolve()(setup)
        loss_fn = make_loss(of_tasks, dataset.mean, dataset.std)
        learns, product = self._method.learns, self._method.product
        step = sm.make_train_step(self._method.mask_fn, loss_fn, self._tx, learns=learns, product=product)
        self._place = Placement()
        calls = stepper.steps_per_call(self.weights)
        self._stepper = stepper.make_stepper(step, learns, dataset.train, self._place, calls)
        self._evaluator = Evaluator(self._method, of_tasks, dataset)

    @property
    def compile_seconds(self) -> float:
        return self._stepper.compile_seconds

    def permutation(self, task: int) -> np.ndarray:
        """int32 [pixels]: where each pixel of a task comes from."""
        return permutation(self._key, task, int(np.prod(self._dataset.image_shape)))

    def logits(self, params: Tree, images: jax.Array) -> jax.Array:
        """The outputs for images [n, h, w, c] of bytes, whose pixels are read as they are."""
        return self.network.logits(params, None, normalise(images, self._dataset.mean, self._dataset.std))

    def train(self, task: int, report: Report = lambda *_: None) -> tuple[Tree, dict[str, Any]]:
        """Trains one task from its start; returns its masks and its figures.

        Args:
          task: its number, from 0 on.
          report: called with (task, step, mean training loss).

        Raises:
          Interrupted: a signal came; nothing of this task is kept.
          UserError: the loss or the scores are not finite.
        """
        learns = self._method.learns
        order = jax.random.fold_in(leaf_key(self._key, "order"), task)
        pixels = jnp.asarray(self.permutation(task))
        state = sm.init_state(self._method.subnet, self._tx, leaf_key(self._key, "train"), pixels, learns=learns)
        totals = self._place.replicate(stepper.zero_totals())
        start = Progress(self._place.place(state), totals, 0.0)
        advance = stepper.over(self._stepper, self._epochs, order)
        end = train(advance, start, 0, self.steps, self._events(task, report), AT_ONCE)
        masks, params = self._evaluator.masked(end.state.subnet)
        figures = self._evaluator.figures(params, end.state.model_state, self._split)
        loss = float(end.totals["loss"]) / float(end.totals["count"])
        record = {"task": task, **figures, "density": sm.density(masks), "train_loss": loss}
        return masks, record | {"steps": self.steps, "train_seconds": end.seconds}

    def _events(self, task: int, report: Report) -> list[Event]:
        def watch(step: int, progress: Progress, batch: Batch) -> Progress:
            totals = progress.totals
            if int(totals["bad_step"]) >= 0:
                raise UserError(
                    f"the loss or the scores of task {task} are not finite at step {int(totals['bad_step'])}. Try a "
                    "lower --learning-rate with another --workdir."
                )
            report(task, step, float(totals["loss"]) / float(totals["count"]))
            if self._stop_requested():
                raise Interrupted(f"stopped by a signal in task {task}; the tasks before it are saved.")
            return progress

        return [Event(None, watch)]
