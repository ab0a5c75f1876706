"""Weights that were trained elsewhere, in PyTorch, as parameters of the ResNets of `supermask_jax.models`.

Files are `.safetensors`, or what `torch.save` wrote. The names in them follow one of two conventions: that of
torchvision, timm and the released code of Ramanujan et al. 2020, or that of Hugging Face. What a model needs is read
from the model itself, leaf by leaf, and each leaf is looked up by the name that it has in the file.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from supermask_jax import container, torch_files
from supermask_jax.supermask import Masks, Params, Scores
from supermask_jax.trees import Tree, by_path, map_with_name

IMAGE = (1, 224, 224, 3)  # what a model is traced with; no shape of its weights depends on height and width
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
BLOCK = re.compile(r"stage_(\d+)_block_(\d+)/(conv|norm|shortcut|shortcut_norm)(?:_(\d+))?")
SHOWN = 4  # names in an error
WRAPPED = ("module.", "_orig_mod.")  # how names begin that DataParallel and torch.compile saved
STANDARD: dict[
    tuple[tuple[int, ...], bool, int], str
] = {  # by blocks, whether they are bottlenecks, and the factor on their inner width
    ((2, 2, 2, 2), False, 1): "ResNet18",
    ((3, 4, 6, 3), False, 1): "ResNet34",
    ((3, 4, 6, 3), True, 1): "ResNet50",
    ((3, 4, 23, 3), True, 1): "ResNet101",
    ((3, 4, 6, 3), True, 2): "WideResNet50",
}
COUNTED, SCORES = ".num_batches_tracked", ".scores"

Arrays = dict[str, np.ndarray]


class Model(Protocol):
    """A Flax Linen module."""

    def init(self, key: jax.Array, images: jax.Array, /) -> Any: ...


class Pretrained(NamedTuple):
    """A trained network.

    Fields:
      params: its parameters, in float32; the weights that a method prunes or masks.
      model_state: {"batch_stats": running means and variances}.
    """

    params: Params
    model_state: Tree


class HiddenNetwork(NamedTuple):
    """A subnetwork that the released code of Ramanujan et al. 2020 left.

    Fields:
      weights: every parameter, in float32, before the masks.
      masks: exactly 0 or 1, None at leaves that have no scores.
      scores: what the masks were computed from, as the file has them; None at leaves that have none.
      model_state: {"batch_stats": running means and variances}.
    """

    weights: Params
    masks: Masks
    scores: Scores
    model_state: Tree


def load_pretrained(path: str | Path, model: Model) -> Pretrained:
    """Reads the weights that torchvision, timm or Hugging Face trained a ResNet to: (params, model_state).

        model = sm.models.ResNet50(affine=True, bias=True)  # as all of them have it
        params, model_state = sm.load_pretrained("resnet50.safetensors", model)
        logits = model.apply({"params": params, **model_state}, images)

    The images are [n, h, w, 3] in RGB, normalised as the weights were trained: for ImageNet, pixels from 0 to 1, minus
    (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225). The logits are then those of the network in PyTorch.

    Args:
      path: of a `.safetensors` file, or of a file that `torch.save` wrote (`.pth`, `.pt`, `.bin`). Nothing in it is
        executed, and PyTorch is not needed.
      model: a ResNet of `supermask_jax.models` with as many classes as the file has: ResNet18, ResNet34, ResNet50,
        ResNet101, WideResNet50, or ResNet with its own blocks. Most files need affine=True and bias=True.

    Raises:
      ValueError: the file is damaged, or names anything but tensors; it lacks weights of the model, has weights that
        the model lacks, or has them in other shapes. The message names the file, what differs, and the model that the
        file looks like.
      TypeError: the model is no Flax module, or has layers that are not of a ResNet.
      OSError: the file cannot be read.

    Source: He et al. 2016, with the stride in the 3x3 convolution of a bottleneck, which all three have.
    """
    checkpoint = _Checkpoint(path, model)
    if checkpoint.scores:
        raise ValueError(f"{path} holds scores beside its weights: read it with load_hidden_network")
    variables = checkpoint.variables()
    return Pretrained(variables.pop("params"), variables)


def load_hidden_network(path: str | Path, model: Model, density: float | None = None) -> HiddenNetwork:
    """Reads a subnetwork that the code of Ramanujan et al. 2020 found: (weights, masks, scores, model_state).

        model = sm.models.ResNet50()  # its batch normalisation learned nothing
        found = sm.load_hidden_network("model_best.pth", model, density=0.3)
        params = sm.subnetwork(sm.identity, sm.Subnet(found.weights, found.masks))
        logits = model.apply({"params": params, **found.model_state}, images)

    The masks are those of the released code: a layer of n weights keeps the n - int((1 - density) * n) scores of
    largest magnitude, in Python's floats. `sm.edge_popup(density)` on the scores keeps the same weights, but where this
    count and ceil(density * n) on the decimal differ by one, or where scores tie.

    Args:
      path: of a `.pth` file with a weight and scores for each layer, under "state_dict". Nothing in it is executed,
        and PyTorch is not needed.
      model: a ResNet of `supermask_jax.models` with as many classes as the file has: ResNet18, ResNet50, ResNet101 or
        WideResNet50; affine=True if its batch normalisation learned.
      density: the fraction that each layer keeps, in (0, 1]. The released code calls it `prune_rate`, and no file holds
        it. None means that the scores are masks already, 0 or 1, as its `FixedSubnetConv` saves them. Those of its
        `SampleSubnetConv`, which the file does not tell apart, are logits, and have no density.

    Raises:
      ValueError: the file is damaged, or names anything but tensors; it has no scores; it does not fit the model; a
        density out of range, or None with scores that are not 0 or 1; NaN scores. The message names the file.
      TypeError: the model is no Flax module, or has layers that are not of a ResNet.
      OSError: the file cannot be read.

    Source: models/resnet.py and utils/conv_type.py (`SubnetConv`) in the released code.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    checkpoint = _Checkpoint(path, model)
    if not checkpoint.scores:
        raise ValueError(f"{path} holds no scores: read its weights with load_pretrained")
    masks, scores = {}, {}
    for leaf, score in checkpoint.scores.items():
        scores[leaf] = _ours(score)
        try:
            masks[leaf] = _ours(_mask(score, density))
        except ValueError as error:
            raise ValueError(f"{path}: the scores of {leaf}: {error}") from error
    variables = checkpoint.variables()
    weights = variables.pop("params")

    def tree(leaves: Arrays) -> Tree:
        return map_with_name(lambda leaf, _: jnp.asarray(leaves[leaf]) if leaf in leaves else None, weights)

    return HiddenNetwork(weights, tree(masks), tree(scores), variables)


def _mask(score: np.ndarray, density: float | None) -> np.ndarray:
    """The mask of a layer, in the layout of the file, whose order of the weights decides ties."""
    if density is None:
        if not np.isin(score, (0, 1)).all():
            raise ValueError("they are not 0 or 1: give density, which the released code calls prune_rate")
        return score
    if np.isnan(score).any():
        raise ValueError("they hold NaN")
    pruned = np.argsort(np.abs(score), axis=None, kind="stable")[: int((1 - density) * score.size)]
    mask = np.ones(score.size, np.float32)
    mask[pruned] = 0
    return mask.reshape(score.shape)


class _Checkpoint:
    """A file beside the model that it is for: every leaf of the model has its array, and every array its leaf.

    `scores` are {path of the weight: scores} in the layout of the file.
    """

    def __init__(self, path: str | Path, model: Model):
        self.path = Path(path).expanduser()
        if not hasattr(model, "init"):
            raise TypeError(
                f"model is a Flax module, such as models.ResNet50(affine=True, bias=True), not {model!r:.100}"
            )
        self.wanted = dict(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(IMAGE))))
        arrays = _read(self.path)
        self.model, self.looks = type(model).__name__, _looks_like(arrays)
        self.shapes = {leaf: _shape_there(made.shape) for leaf, made in by_path(self.wanted).items()}
        self.names = _names(self.shapes, arrays, self.model)
        held = {name: array for name, array in arrays.items() if not name.endswith((COUNTED, SCORES))}
        self._check_names(held.keys())
        self.arrays = {leaf: self._fitting(leaf, name, held[name]) for leaf, name in self.names.items()}
        self.scores = self._scores({name: array for name, array in arrays.items() if name.endswith(SCORES)})

    def variables(self) -> dict[str, Any]:
        """The variables of the model, in its layouts."""
        return map_with_name(lambda leaf, _: jnp.asarray(_ours(self.arrays[leaf])), self.wanted)

    def _check_names(self, held: Iterable[str]) -> None:
        names = set(self.names.values())
        lacks, more = sorted(names - set(held)), sorted(set(held) - names)
        if lacks or more:
            parts = [f"it lacks {_some(lacks)}"] * bool(lacks) + [f"the model has no place for {_some(more)}"] * bool(
                more
            )
            raise self._error("; ".join(parts))

    def _scores(self, scores: Arrays) -> Arrays:
        kernels = {name: leaf for leaf, name in self.names.items() if leaf.endswith("/kernel")}
        owners = {name: name.removesuffix(SCORES) + ".weight" for name in scores}
        if other := [name for name, owner in owners.items() if owner not in kernels]:
            raise self._error(f"it has scores of no kernel: {_some(other)}")
        found = {kernels[owners[name]]: (name, array) for name, array in scores.items()}
        return {leaf.removeprefix("params/"): self._fitting(leaf, name, array) for leaf, (name, array) in found.items()}

    def _fitting(self, leaf: str, name: str, array: np.ndarray) -> np.ndarray:
        """An array of floats of the shape that a leaf has in PyTorch, in float32."""
        shape = self.shapes[leaf]
        if len(shape) == 2 and array.shape == (*shape, 1, 1):  # a dense layer as a convolution on one pixel
            array = array[..., 0, 0]
        if array.shape != shape:
            raise self._error(f"{name} has the shape {array.shape}, and the model needs {shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise self._error(f"{name} has {array.dtype} numbers, and weights are floats")
        return array.astype(np.float32, copy=False)

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} does not fit the {self.model} that was given: {what}. {self.looks}")


def _shape_there(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of what is (h, w, in, out) or (in, out) here: (out, in, h, w), or (out, in)."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    return tuple(shape[axis] for axis in axes)


def _ours(array: np.ndarray) -> np.ndarray:
    """An array in the layout of Flax: (h, w, in, out), or (in, out)."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(axes)) if axes else array


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:100].encode("unicode_escape").decode() for name in names[:SHOWN]) + more


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# Files.


def _read(path: Path) -> Arrays:
    """{name: array} of a file, without what wrappers of a network put in front of all names."""
    arrays = _safetensors(path) if path.suffix == ".safetensors" else torch_files.read(path)
    for prefix in WRAPPED:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _safetensors(path: Path) -> Arrays:
    try:
        found = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no whole .safetensors file ({_brief(error)}); fetch or copy this file again"
        ) from error
    if other := [name for name, tensor in found if tensor["dtype"] not in container.DTYPES]:
        raise ValueError(f"{path} has numbers of a kind that is not read here, in {_some(other)}: save them as float32")
    return {name: container.array(tensor) for name, tensor in found}


# Names.


def _names(leaves: Iterable[str], arrays: Iterable[str], model: str) -> dict[str, str]:
    """{leaf: its name in a file} by the convention of the names that the file has."""
    prefix = "resnet." if any(name.startswith("resnet.") for name in arrays) else ""
    hugging = any(re.match(r"(resnet\.)?(embedder|encoder)\.", name) for name in arrays)
    convention: Callable[[str], str | None] = (lambda layer: _hugging_face(layer, prefix)) if hugging else _torchvision
    found = {}
    for leaf in leaves:
        _, layer, kind = re.fullmatch(r"(\w+)/(?:(.*)/)?(.*)", leaf, re.DOTALL).groups("")  # type: ignore[union-attr]
        name = convention(layer)
        if name is None or kind not in LEAVES:
            raise TypeError(
                f"weights are read into the ResNets of supermask_jax.models; this {model} has a leaf {leaf!r}"
            )
        found[leaf] = f"{name}.{LEAVES[kind]}"
    return found


def _torchvision(layer: str) -> str | None:
    """The name of a layer in torchvision, timm, and the code of Ramanujan et al. 2020."""
    ends = {"conv": "conv1", "norm": "bn1", "dense": "fc"}
    if (block := BLOCK.fullmatch(layer)) is None:
        return ends.get(layer)
    stage, index, part, number = block.groups()
    parts = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
    own = parts.get(part) or f"{ {'conv': 'conv', 'norm': 'bn'}[part] }{int(number) + 1}"
    return f"layer{int(stage) + 1}.{index}.{own}"


def _hugging_face(layer: str, prefix: str) -> str | None:
    """The name of a layer in Hugging Face's `ResNetForImageClassification`."""
    stem = f"{prefix}embedder.embedder"
    ends = {"conv": f"{stem}.convolution", "norm": f"{stem}.normalization", "dense": "classifier.1"}
    if (block := BLOCK.fullmatch(layer)) is None:
        return ends.get(layer)
    stage, index, part, number = block.groups()
    of = "normalization" if part in ("norm", "shortcut_norm") else "convolution"
    place = f"layer.{number}" if number else "shortcut"
    return f"{prefix}encoder.stages.{stage}.layers.{index}.{place}.{of}"


def _looks_like(arrays: Mapping[str, np.ndarray]) -> str:
    """A sentence that tells the model of a file, as far as its names and shapes tell it."""
    at = r"(?:layer|(?:resnet\.)?encoder\.stages\.)([0-9]{1,3})\.(?:layers\.)?([0-9]{1,3})\."
    places = {(int(match[1]), int(match[2])) for name in arrays if (match := re.match(at, name))}
    heads = [name for name in ("fc.weight", "classifier.1.weight") if name in arrays and arrays[name].ndim > 1]
    if not places or not heads:
        return f"It does not look like a ResNet with a last layer: it has {_some(sorted(arrays)) or 'nothing'}"
    blocks = tuple(count for _, count in sorted(Counter(stage for stage, _ in places).items()))
    ends = [array for name, array in arrays.items() if re.match(at + r"(conv3|layer\.2\.convolution)\.weight", name)]
    widen = next((4 * end.shape[1] // end.shape[0] for end in ends if end.ndim == 4 and end.size), 1)
    stems = [array for name, array in arrays.items() if re.match(r"conv1\.|(resnet\.)?embedder\..*convolution", name)]
    width = next((stem.shape[0] for stem in stems if stem.ndim == 4), 64)
    name = STANDARD.get((blocks, bool(ends), widen))
    said = [str(arrays[heads[0]].shape[0])]
    if name is None:
        said += [f"blocks={blocks}"] + ["bottleneck=True"] * bool(ends) + [f"widen={widen}"] * (widen > 1)
    said += [f"width={width}"] * (width != 64)
    said += ["affine=True"] * any(re.search(r"(bn1|normalization)\.weight", name) for name in arrays)
    said += ["bias=True"] * (heads[0].removesuffix("weight") + "bias" in arrays)
    return f"The file looks like models.{name or 'ResNet'}({', '.join(said)})"
