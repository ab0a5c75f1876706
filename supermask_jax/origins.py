"""What the weights in a file come from: a seed, the file itself, or somebody else.

Each origin describes weights as entries of the file's header and arrays (`store`), from which they come back bit for
bit (`restore`).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax import codes
from supermask_jax.draws import DRAWS, GENERATOR, bits
from supermask_jax.header import Header
from supermask_jax.initializers import Density, recipe
from supermask_jax.leaves import FanIn, FanOut, flax_fan_in, named_fan_in
from supermask_jax.supermask import Params
from supermask_jax.trees import Tree, Where, by_path, fan_in_of, is_kernel, leaf_key

Leaves = dict[str, np.ndarray]
REDRAWS = "redraws"  # the name of their array
LEVELS = {"int8": 127, "int4": 7}  # the largest number of each
CHUNK = 2**16  # weights
NARROW = ("float32", "bfloat16", "float16", *LEVELS)  # what trained weights can be stored in
Positions = np.ndarray  # flat, of a leaf


class Drawn(NamedTuple):
    """Where frozen weights come from: an initializer and its key.

    Fields:
      initializer: the name of a function of `initializers`: "signed_constant".
      key: what the weights were drawn with: a `jax.random.key` of the implementation threefry2x32 or rbg, which draw
        the same here, or the seed of one.
      stream: with a seed, the name whose CRC-32 was folded into its key, if one was.
      density: what the initializer was given to scale by.
      where: (path, leaf) -> whether the leaf was drawn, or the `Layout` that the initializer was given. The others are
        stored.
      fan_in: what the initializer was given.
      fan_out: what the initializer was given.
      redraws: how often each weight was drawn anew since, 0 to 255: a tree like the masks, or None. For the n-th time,
        n was folded into the key of the leaf. Only drawn leaves can have them.
      partition: {path: (pruned, locked)}: so many positions of a leaf were pruned and kept for good before training, as
        `partition` chooses them. They take no bits of the file.
    """

    initializer: str
    key: jax.Array | int
    stream: str = ""
    density: Density = None
    where: Where = is_kernel
    fan_in: FanIn | None = None
    fan_out: FanOut | None = None
    redraws: Tree = None
    partition: Mapping[str, tuple[int, int]] | None = None


class Stored(NamedTuple):
    """Trained weights, which the file itself holds: those that the masks keep.

    Fields:
      dtype: what they are stored in. None: their own dtype. "int8" or "int4": whole numbers of 8 or 4 bits, and one
        float32 scale for each index of the last axis, where the largest magnitude becomes 127 or 7.
    """

    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None


class Base(NamedTuple):
    """Somebody else's weights: the file holds their hash, and who loads it must have them.

    Fields:
      source: where they can be had: an address, a name and a version.
    """

    source: str


Origin = Drawn | Stored | Base


def arrays_of(tree: Tree) -> Leaves:
    """Returns {path: NumPy array} of a tree."""
    return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def partition(
    key: jax.Array, path: str, size: int, pruned: int, locked: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the flat positions of a leaf that are pruned for good, kept for good, and free, as a seed chooses them.

    Args:
      key: what the weights are drawn with.
      path: of the leaf.
      size: of the leaf.
      pruned: how many positions are pruned.
      locked: how many are kept.

    Raises:
      ValueError: there are not so many positions.

    Source: Otsuka et al. (arXiv 2402.14029), for the idea of freezing parts by a seed.
    """
    if min(pruned, locked) < 0 or pruned + locked > size:
        raise ValueError(f"{path!r} has {size} positions: {pruned} cannot be pruned and {locked} locked")
    drawn = np.asarray(bits(leaf_key(leaf_key(key, "partition"), path), (size,))) >> 9
    order = np.argsort(drawn, kind="stable")
    return order[:pruned], order[pruned : pruned + locked], np.sort(order[pruned + locked :])


def parts(origin: Header, path: str, size: int, pruned: int, locked: int) -> tuple[Positions, Positions, Positions]:
    """Returns `partition` for the key of an origin as the header has it."""
    return partition(_wrapped(origin), path, size, pruned, locked)


def store(origin: Origin, weights: Params, kept: Leaves) -> tuple[Header, Leaves, Leaves]:
    """Returns (header, arrays, the weights as they will be loaded) of weights and what keeps them.

    Args:
      origin: what they come from.
      weights: every parameter.
      kept: {path: bool} where a mask keeps the weight.

    Raises:
      ValueError: a `Drawn` origin draws other weights; `redraws` that are no whole numbers from 0 to 255, or of leaves
        that are not drawn; a `partition` of leaves without a mask; a `Stored` dtype that cannot hold the weights.
    """
    leaves = arrays_of(weights)
    entries: Header = {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in leaves.items()}
    arrays: Leaves = {}
    if isinstance(origin, Base):
        return {"origin": {"kind": "base", "source": origin.source}, "leaves": entries}, arrays, leaves
    if isinstance(origin, Stored):
        if origin.dtype not in (None, *NARROW):
            raise ValueError(f"dtype must be None or one of {', '.join(NARROW)}, got {origin.dtype!r}")
        for path, leaf in leaves.items():
            leaves[path] = _store_kept(origin.dtype, path, leaf, kept.get(path), arrays)
        return {"origin": {"kind": "stored"}, "leaves": entries}, arrays, leaves
    key = _key_of(origin)
    drawn = recipe(origin.initializer, weights, origin.density, origin.where, origin.fan_in, origin.fan_out)
    redraws, times = arrays_of(origin.redraws), b""
    if unmasked := set(origin.partition or {}) - kept.keys():
        raise ValueError(f"no mask has the path {min(unmasked)!r}, which `partition` names")
    for path, times_of in redraws.items():
        if path not in drawn or times_of.shape != leaves[path].shape or (times_of < 0).any():
            raise ValueError(f"the redraws of {path!r} are not whole numbers from 0 to 255, one for each drawn weight")
    for path, leaf in leaves.items():
        if path in drawn:
            entries[path]["draw"] = [drawn[path][0], float(drawn[path][1])]
            if path in redraws:
                kind, planes, payload = codes.encode(redraws[path])
                entries[path]["redraws"] = [kind, planes]
                times += payload
        elif (fill := _fill(leaf)) is not None:
            entries[path]["fill"] = fill
        else:
            arrays[f"weights/{path}"] = leaf
    if redraws:
        arrays[REDRAWS] = np.frombuffer(times, np.uint8)
    header = {"origin": _describe(origin, key), "leaves": entries}
    for path, again in restore(header, dict(arrays), {}).items():
        if again.tobytes() != leaves[path].tobytes():
            raise ValueError(
                f"{origin.initializer} with this key draws other weights at {path!r} than there are. Give the key, the "
                "density, the fan-in and the predicate that the weights were drawn with; trained weights are Stored()."
            )
    return header, arrays, leaves


@np.errstate(over="ignore", invalid="ignore")  # numbers of a damaged file, which its hash tells
def restore(header: Header, arrays: Leaves, kept: Leaves) -> Leaves:
    """Returns the weights that `store` described. Not of a `Base`, whose weights are not in the file.

    Args:
      header: as `store` made it, with checked entries.
      arrays: as `store` made them; those that are used are taken out.
      kept: {path: bool} where a mask keeps the weight.

    Raises:
      ValueError: arrays that do not fit the header.
    """
    weights = {}
    times = take_stream(arrays, REDRAWS) if REDRAWS in arrays else codes.Stream(b"")
    for path, entry in header["leaves"].items():
        shape, dtype = tuple(entry["shape"]), jnp.dtype(entry["dtype"])
        if "draw" in entry:
            weights[path] = _draw(header["origin"], path, entry, times)
        elif "fill" in entry:
            weights[path] = np.full(shape, entry["fill"], dtype)
        else:  # of drawn weights, those that are neither drawn nor equal are stored whole
            of_mask = kept.get(path) if header["origin"]["kind"] == "stored" else None
            weights[path] = _load_kept(path, shape, dtype, arrays, np.ones(shape, bool) if of_mask is None else of_mask)
    times.end()
    return weights


def _key_of(origin: Drawn) -> jax.Array:
    if isinstance(origin.key, int | np.integer):
        if not 0 <= origin.key < 2**32:
            raise ValueError(f"a seed is a whole number in [0, 2**32), got {origin.key}")
        key = jax.random.key(origin.key, impl=GENERATOR)
        return leaf_key(key, origin.stream) if origin.stream else key
    typed = isinstance(origin.key, jax.Array) and jnp.issubdtype(origin.key.dtype, jax.dtypes.prng_key)
    if not typed or origin.key.shape or str(jax.random.key_impl(origin.key)) not in (GENERATOR, "rbg"):
        raise ValueError(
            f"the key must be a seed, or one jax.random.key of {GENERATOR}: jax.random.key(seed, impl={GENERATOR!r}). "
            "Of other implementations, only rbg draws the same"
        )
    return jax.random.wrap_key_data(jax.random.key_data(origin.key)[:2], impl=GENERATOR)  # what `draws.bits` counts


def _describe(origin: Drawn, key: jax.Array) -> Header:
    described: Header = {
        "kind": "drawn",
        "initializer": origin.initializer,
        "generator": GENERATOR,
        "key": [int(word) for word in jax.random.key_data(key)],
    }
    if isinstance(origin.key, int | np.integer):
        described |= {"seed": int(origin.key), "stream": origin.stream}
    if origin.density is not None and not isinstance(origin.density, Mapping):
        described["density"] = float(origin.density)
    fan_in = fan_in_of(origin.fan_in, origin.where)
    described["fan_in"] = getattr(flax_fan_in if fan_in is named_fan_in else fan_in, "__name__", "")
    return described


def _wrapped(origin: Header) -> jax.Array:
    return jax.random.wrap_key_data(jnp.array(origin["key"], jnp.uint32), impl=GENERATOR)


def _draw(origin: Header, path: str, entry: Header, stream: codes.Stream) -> np.ndarray:
    key = leaf_key(_wrapped(origin), path)
    name, scale = entry["draw"]
    shape, size = tuple(entry["shape"]), math.prod(entry["shape"])
    # A little too many, of one axis: one compilation serves many leaves. An element depends on its flat index alone.
    many = min(1 << (size - 1).bit_length() if size <= CHUNK else -(-size // CHUNK) * CHUNK, 2**32 - 1)
    if "redraws" in entry:
        kind, planes = entry["redraws"]
        times = np.zeros(many, np.uint8)
        times[:size] = codes.decode(kind, planes, stream.take(planes), (size,))
        again = [jax.random.fold_in(key, n) for n in range(1, int(times.max(initial=0)) + 1)]
        words = np.stack([jax.random.key_data(one) for one in (key, *again)])
        key = jnp.asarray(words[times].T)  # a key for each element: one draw, however many redraws
    drawn = np.asarray(DRAWS[name](key, (many,), np.float32(scale)))[:size]
    return drawn.reshape(shape).astype(jnp.dtype(entry["dtype"]))


@np.errstate(over="ignore", invalid="ignore")
def _fill(leaf: np.ndarray) -> float | None:
    """The number that all of a leaf equals, bit for bit, if there is one."""
    if not leaf.size or not np.isfinite(leaf.flat[0]):
        return None
    value = float(leaf.flat[0])
    return value if np.full(leaf.shape, value, leaf.dtype).tobytes() == leaf.tobytes() else None


def _store_kept(dtype: str | None, path: str, leaf: np.ndarray, kept: np.ndarray | None, arrays: Leaves) -> np.ndarray:
    """Adds the kept weights of a leaf to the arrays; returns the leaf as it will be loaded."""
    if kept is None:  # biases and the like: few, and kept whole
        arrays[f"weights/{path}"] = leaf
        return leaf
    if dtype is not None and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{path!r} has {leaf.dtype} numbers, which {dtype} cannot hold")
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        if dtype in LEVELS:
            wide = np.where(kept, leaf, 0).astype(np.float32)
            scale = np.abs(wide).max(axis=tuple(range(leaf.ndim - 1)), initial=0) / np.float32(LEVELS[dtype])
            quotient = np.divide(wide, scale, out=np.zeros(leaf.shape, np.float32), where=scale > 0)
            arrays[f"scales/{path}"] = scale
            numbers = np.clip(np.rint(quotient), -LEVELS[dtype], LEVELS[dtype]).astype(np.int8)[kept]
            arrays[f"weights/{path}"] = numbers if dtype == "int8" else _in_pairs(numbers)
        else:
            arrays[f"weights/{path}"] = leaf[kept].astype(leaf.dtype if dtype is None else jnp.dtype(dtype))
        loaded = _load_kept(path, leaf.shape, leaf.dtype, dict(arrays), kept)
    if dtype is not None and not np.isfinite(loaded).all():
        raise ValueError(f"{path!r} holds weights that are too large for {dtype}, or not finite")
    return loaded


def _load_kept(path: str, shape: tuple[int, ...], dtype: Any, arrays: Leaves, kept: np.ndarray) -> np.ndarray:
    values, scale = arrays.pop(f"weights/{path}", None), arrays.pop(f"scales/{path}", None)
    count = int(np.count_nonzero(kept))
    if scale is not None and values is not None and values.dtype == np.uint8 and values.size == -(-count // 2):
        values = _out_of_pairs(values, count)
    if values is None or values.size != count:
        raise ValueError(f"{count} weights of {path!r} are kept, and other numbers stored")
    values = values.ravel()
    if scale is not None:
        if scale.shape != shape[-1:] or scale.dtype != np.float32 or values.dtype != np.int8:
            raise ValueError(
                f"the scales of {path!r} are not float32, one for each of its last axis, or not of 8 or 4 bits"
            )
        values = values * np.broadcast_to(scale, shape)[kept]
    whole = np.zeros(shape, dtype)
    whole[kept] = values.astype(dtype)
    return whole


def _in_pairs(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers from -8 to 7, two in a byte: the first in the lower half, in two's complement."""
    halves = np.append(numbers, np.zeros(numbers.size % 2, np.int8)).view(np.uint8) & 15
    return halves[::2] | halves[1::2] << 4


def _out_of_pairs(stored: np.ndarray, count: int) -> np.ndarray:
    halves = np.stack([stored.ravel() & 15, stored.ravel() >> 4], axis=1).ravel()[:count]
    return (halves ^ 8).astype(np.int8) - np.int8(8)


def take_stream(arrays: Leaves, name: str) -> codes.Stream:
    """Returns the bytes of an array of uint8, which is taken out of `arrays`; ValueError if it is missing."""
    if name not in arrays or arrays[name].dtype != np.uint8:
        raise ValueError(f"the bytes of {name!r} are missing")
    return codes.Stream(arrays.pop(name).tobytes())
