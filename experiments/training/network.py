"""A network as pure functions. This is the only room that knows Flax."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError

import supermask_jax as sm
from experiments.config.registry import INITIALIZERS, MODELS
from experiments.config.sections import Init, Model
from experiments.run.errors import UserError, brief
from supermask_jax import initializers
from supermask_jax.initializers import Density
from supermask_jax.trees import Tree, by_path, map_with_name, prunable


@dataclasses.dataclass(frozen=True)
class Network:
    """A Flax Linen module for images of one shape.

    Fields:
      module: takes [n, h, w, c] floats and `train`, and returns [n, classes] logits.
      first, last: the paths of its first and its last kernel.
      image_shape: (h, w, c).
      draw: (key, weights) -> weights with new kernels.
      on_host: whether `draw` computes with values, and so cannot be compiled.
      dtype: what it computes in. Parameters, logits and batch statistics are float32 all the same.
    """

    module: nn.Module
    first: str
    last: str
    image_shape: tuple[int, int, int]
    draw: Callable[[jax.Array, Tree], Tree] = initializers.signed_constant
    on_host: bool = False
    dtype: Any = jnp.float32

    @property
    def has_state(self) -> bool:
        """Whether it carries batch statistics or the like beside its parameters."""
        return self._shapes()[1] is not None

    @property
    def prunable(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of its kernels."""
        return prunable(self._shapes()[0])

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """(params, model_state): kernels drawn by `draw`, all other leaves as the module says.

        model_state: {collection: tree}, or None of a network that has no state.
        """
        blank, state = self.blank(key)
        if self.on_host:
            return self.draw(key, blank), state
        # The blank tree is made inside: as an argument its zeros would be read for nothing.
        zeros = self._shapes()[0]
        others = {path: leaf for path, leaf in by_path(blank).items() if not sm.is_kernel(path, leaf)}

        def drawn(key: jax.Array, others: dict[str, jax.Array]) -> Tree:
            return self.draw(key, map_with_name(lambda path, leaf: others.get(path, _zeros(leaf)), zeros))

        return sm.jit(drawn)(key, others), state

    def blank(self, key: jax.Array) -> tuple[Tree, Tree]:
        """(params, model_state) with kernels of 0, all other leaves as the module says: a BatchNorm scale is 1."""
        params, state = self._shapes()
        if state is None and all(sm.is_kernel(path, leaf) for path, leaf in by_path(params).items()):
            return jax.tree.map(_zeros, params), None

        def others(key: jax.Array) -> tuple[dict[str, jax.Array], Tree]:
            params, state = self._variables(key)
            return {path: leaf for path, leaf in by_path(params).items() if not sm.is_kernel(path, leaf)}, state

        leaves, state = sm.jit(others)(key)  # what draws the kernels is not among its results, and not compiled
        return map_with_name(lambda path, leaf: leaves[path] if path in leaves else _zeros(leaf), params), state

    def apply(
        self, params: Tree, state: Tree, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """(logits, model_state) of normalised images [n, h, w, c].

        Args:
          params: every parameter, after masking.
          state: as `init` makes it.
          images: all of them enter the batch statistics, so a padded batch must not come here with `train`.
          train: whether dropout drops, and batch statistics are those of the batch and are updated.
          key: of dropout, where `train`.
        """
        variables, images = {"params": self._computed_in(params), **(state or {})}, self._computed_in(images)
        options: dict[str, Any] = {"train": True, "rngs": {"dropout": key}} if train else {}
        if train and state is not None:
            logits, state = self.module.apply(variables, images, mutable=list(state), **options)
        else:
            logits = self.module.apply(variables, images, **options)
        return logits.astype(jnp.float32), state

    def logits(self, params: Tree, state: Tree, images: jax.Array) -> jax.Array:
        """Logits of normalised images, in evaluation."""
        return self.apply(params, state, images)[0]

    def on_axis(self, name: str) -> "Network":
        """The same network for training under pmap: batch statistics are those of all devices of this axis."""
        if not hasattr(self.module, "axis_name"):
            return self
        return dataclasses.replace(self, module=self.module.clone(axis_name=name))

    def _computed_in(self, tree: Tree) -> Tree:
        return tree if self.dtype == jnp.float32 else jax.tree.map(lambda leaf: leaf.astype(self.dtype), tree)

    def _variables(self, key: jax.Array) -> tuple[Tree, Tree]:
        variables = dict(self.module.init(key, jnp.zeros((1, *self.image_shape))))
        return variables.pop("params"), variables or None

    def _shapes(self) -> tuple[Tree, Tree]:
        return jax.eval_shape(self._variables, jax.random.key(0))


def network(
    model: Model,
    init: Init,
    classes: int,
    image_shape: tuple[int, int, int],
    density: Density = None,
) -> Network:
    """The network that the settings name.

    Args:
      model: which network, and its options.
      init: what its kernels are drawn from.
      classes: of the last layer.
      image_shape: (h, w, c).
      density: the fraction that is kept, or that of each layer, by which the weights are scaled; None for no scaling.

    Raises:
      UserError: the network does not take images of this shape.
    """
    entry, drawn_from = MODELS[model.model], INITIALIZERS[init.init]
    module, first, last = entry.resolve()(classes, **{name: getattr(model, name) for name in entry.reads})
    draw = partial(drawn_from.resolve(), density=density)
    dtype = jnp.bfloat16 if model.bfloat16 else jnp.float32
    made = Network(module, first, last, tuple(image_shape), draw, drawn_from.on_host, dtype)
    try:
        made.has_state  # noqa: B018 - traces the module on one image
    except (ArithmeticError, ValueError, TypeError, FlaxError) as error:
        size = " x ".join(map(str, image_shape))
        raise UserError(f"--model {model.model} does not take images of {size} ({brief(error)}).") from error
    return made


def signed_deviation(key: jax.Array, weights: Tree, density: float | None = None) -> Tree:
    """Weights with the signs and the standard deviations of a Glorot normal draw, as Zhou et al. 2019 take them."""
    return initializers.signed_deviation(initializers.glorot_normal(key, weights, density))


def _zeros(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype)
