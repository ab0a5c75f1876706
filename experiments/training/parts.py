"""What a run is made of, from its settings and its images: network, method, optimizer, stepper, evaluator."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import jax

import supermask_jax as sm
from experiments.config.registry import METHODS
from experiments.config.run import Run
from experiments.data.batches import class_sample
from experiments.data.source import Dataset
from experiments.run.errors import DataError
from experiments.run.placement import Placement
from experiments.training import pretrained, stepper
from experiments.training.evaluation import Evaluator, Split, make_flow
from experiments.training.loop import Batch
from experiments.training.loss import make_loss
from experiments.training.methods import Setup, distributed
from experiments.training.network import Network, network
from experiments.training.optimizer import make_optimizer, make_schedule
from supermask_jax import parallel
from supermask_jax.initializers import Density
from supermask_jax.methods import Method
from supermask_jax.trees import Tree, leaf_key

SAMPLES, SAMPLES_PER_EPOCH = 10, 3  # masks drawn to evaluate a method that draws them: at the end, after each epoch
FLOW_IMAGES = 50  # of each class, that the gradient flow is measured on
# Of a sample, which is one batch: 50 images of each class of CIFAR-100, or 102 photographs of 224 x 224.
SAMPLED_PIXELS = 5000 * 32 * 32


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a run, each made when it is first needed.

    Fields:
      config: the settings.
      dataset: the images that it trains on, and the test images.
      split: what epochs are evaluated on.
      placement: the devices.
    """

    config: Run
    dataset: Dataset
    split: Split
    placement: Placement

    @cached_property
    def key(self) -> jax.Array:
        return jax.random.key(self.config.seed)

    @cached_property
    def network(self) -> Network:
        config, dataset = self.config, self.dataset
        return network(config.model, config.init, dataset.classes, dataset.image_shape, self.scale)

    @cached_property
    def scale(self) -> Density:
        """The density, or that of each layer, by which the weights are scaled; None for no scaling."""
        config, dataset = self.config, self.dataset
        if config.init.scale_layers:
            bare = network(config.model, config.init, dataset.classes, dataset.image_shape)
            return distributed(config.masks, bare, bare.prunable)
        return config.masks.density if config.init.scale_weights else None

    @cached_property
    def initial(self) -> tuple[Tree, Tree]:
        """(weights, model_state) before training: drawn, or from the file that the settings name."""
        if self.config.weights:
            return pretrained.load(self.config.weights, self.network)
        return self.network.init(leaf_key(self.key, "weights"))

    @cached_property
    def epochs(self) -> stepper.Epochs:
        config, alternate = self.config, self.config.augment.flip_alternately
        epochs = stepper.epochs_of(self.dataset.train, config.optim.batch_size, self.network.has_state, alternate)
        if not epochs.steps:
            raise DataError(
                f"--batch-size {epochs.batch_size} needs as many training images, and there are {epochs.examples}: "
                f"{config.model.model} has batch statistics, and trains on whole batches only."
            )
        return epochs

    @property
    def last_step(self) -> int:
        return self.config.epochs * self.epochs.steps

    @cached_property
    def schedule(self) -> Callable:
        return make_schedule(self.config.optim, self.last_step, self.epochs.steps)

    @cached_property
    def tx(self):
        return make_optimizer(self.config.optim, self.schedule)

    def loss(self, net: Network | None = None, **options) -> Callable:
        """The loss of the network, or of the same network as it is under pmap."""
        return make_loss(net or self.network, self.dataset.mean, self.dataset.std, **options)

    def sample(self, per_class: int) -> Batch:
        """So many training images of each class, in the order of the classes; no more than one batch can hold.

        Where one of each class is too much already, the images are of classes at even distances.
        """
        height, width, _ = self.dataset.image_shape
        classes, most = self.dataset.classes, max(SAMPLED_PIXELS // (height * width) // 2 * 2, 2)
        per_class = min(per_class, max(most // classes, 1))
        return class_sample(self.dataset.train, classes, leaf_key(self.key, "sample"), per_class, most)

    @cached_property
    def method(self) -> Method:
        config, (weights, state) = self.config, self.initial
        key = leaf_key(self.key, "scores")
        setup = Setup(config.masks, self.network, weights, state, key, self.tx, self.loss, self.sample, self.last_step)
        return METHODS[config.masks.method].resolve()(setup)

    def state(self) -> sm.TrainState:
        """The state before the first step, on the devices."""
        key, method = leaf_key(self.key, "train"), self.method
        return self.placement.place(sm.init_state(method.subnet, self.tx, key, self.initial[1], learns=method.learns))

    @cached_property
    def stepper(self) -> stepper.Stepper:
        method, placement = self.method, self.placement
        trained = {"augment": self.config.augment, "label_smoothing": self.config.optim.label_smoothing}
        options = {"learns": method.learns, "product": method.product}
        if self.config.machine.parallel == "pmap":
            loss_fn = self.loss(self.network.on_axis(parallel.AXIS), axis_name=parallel.AXIS, **trained)
            step = parallel.pmap_step(method.mask_fn, loss_fn, self.tx, devices=placement.size, donate=True, **options)
            return stepper.Pmapped(step, method.learns, self.dataset.train, placement, self.config.machine.workers)
        step = sm.make_train_step(method.mask_fn, placement.loss(self.loss(**trained)), self.tx, **options)
        calls = stepper.steps_per_call(self.initial[0])
        workers = self.config.machine.workers
        return stepper.make_stepper(step, method.learns, self.dataset.train, placement, calls, workers)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.method, self.network, self.dataset, self.placement)

    @cached_property
    def sample_keys(self) -> list[jax.Array]:
        """The keys of the masks that a method that draws them is evaluated with."""
        keys = jax.random.split(leaf_key(self.key, "evaluation"), SAMPLES) if self.method.sampled else ()
        return [self.placement.replicate(key) for key in keys]

    @cached_property
    def flow(self) -> Callable[[Tree, Tree, Tree], float] | None:
        if not self.config.evaluation.assess:
            return None
        return make_flow(self.loss(), self.placement.replicate(self.sample(FLOW_IMAGES)))

    def measured(self, state: sm.TrainState) -> tuple[Tree, dict]:
        """The masks, and what is recorded of them after an epoch."""
        masks, params = self.evaluator.masked(state.subnet)
        figures = self.evaluator.figures(params, state.model_state, self.split)
        keys = self.sample_keys[:SAMPLES_PER_EPOCH]
        figures |= self.evaluator.sampled_figures(state.subnet, state.model_state, self.split, keys)
        flow = {"gradient_flow": self.flow(params, state.model_state, masks)} if self.flow else {}
        return masks, figures | flow
