"""A network that was trained in PyTorch, pruned and written as a subnetwork."""

import shlex
from typing import Any

import jax

import supermask_jax as sm
from experiments.config.imported import Imported
from experiments.config.sections import Init, Model
from experiments.data.blank import blank_imagenet
from experiments.run import display, files
from experiments.run.errors import UserError
from experiments.training import stored, summary
from experiments.training.network import network
from experiments.training.pretrained import require_finite
from supermask_jax import artifact
from supermask_jax.trees import Tree


def convert(config: Imported) -> int:
    """Reads the file, prunes it as the settings say, and writes the output; returns its bytes.

    Raises:
      UserError: the file cannot be read, or is of another network.
    """
    try:
        files.require_writable(config.output.expanduser().parent)
    except OSError as error:
        raise UserError(f"cannot write {config.output} ({error.strerror or error}): name another file.") from error
    model = Model(config.model, affine=config.affine, biases=config.biases)
    dataset = blank_imagenet(config.image_size, config.classes)
    net = network(model, Init(), dataset.classes, dataset.image_shape)
    try:
        weights, masks, state = _read(config, net.module)
    except OSError as error:
        raise UserError(f"cannot read {config.file} ({error.strerror or error}).") from error
    except (ValueError, TypeError) as error:
        says = str(error).replace("read it with load_hidden_network", "say --hidden-network")
        says = says.replace("read its weights with load_pretrained", "leave out --hidden-network")
        raise UserError(
            f"{says}. If it is another network, say so with --model, --classes, --no-affine and --no-biases. What "
            "these experiments wrote needs no import (--evaluate)."
        ) from error
    about: dict[str, Any] = stored.describe(model, dataset) | {"imported": config.file.name, "density": config.density}
    size = sm.save_subnetwork(
        config.output, sm.Subnet(weights, masks), artifact.Stored(), model_state=state, about=about
    )
    sizes = summary.sizes(net, weights, state, masks)
    display.say(
        f"{config.output}: {size:,} bytes; {sizes['density']:.2%} of the weights under masks are kept, "
        f"{sizes['parameters']:,} parameters in all, {sizes['flops'] / 1e9:,.2f} GFLOPs an image"
    )
    display.say(
        "Its accuracy: python -m experiments.imagenet --data-dir DIRECTORY --evaluate "
        + shlex.quote(str(config.output))
    )
    return size


def _read(config: Imported, module: Any) -> tuple[Tree, Tree, Tree]:
    """(weights, masks, model_state) of the file; all is kept where it is not pruned."""
    path = config.file.expanduser()
    if config.hidden_network:
        found = sm.load_hidden_network(path, module, config.density)
        return found.weights, found.masks, found.model_state
    weights, state = require_finite(sm.load_pretrained(path, module))
    if config.density is None:
        return weights, jax.tree.map(lambda leaf: None, weights), state
    scores = sm.saliency.magnitude(weights)
    rank = sm.global_masks if config.scope == "global" else sm.layerwise_masks
    return weights, rank(scores, config.density), state
