"""The exact threshold of the highest scores, without a sort, by counting.

Scores become integer order keys (`order_key`). The search is for a threshold t with exactly `count` keys >= t. Each
pass compares every key with one probe per group and needs only a sum of counts. All layers therefore share a pass,
scores that are sharded over devices stay so, and the result does not depend on their layout.

Probes come first from a small sample, which is all that a mesh gathers, then from interpolating the counts, which is
fast on any smooth distribution. Whenever that stalls, a bisection follows, so that the number of passes is bounded for
any scores. Probes only guide the search; the exact count ends it. Where equal scores lie on both sides of the cut, a
second search of the same kind runs over their flat indices.

On a single CPU, a pass leaves out the layers whose search has ended. On one device, small layers of one shape are
ranked as a stack, so that the program grows with the number of shapes, not of layers.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT32_MIN, INT32_MAX = np.int32(-(2**31)), np.int32(2**31 - 1)
EXACT_IN_FLOAT32 = 2**24
SAMPLE = 2**9  # keys per group that guide the search
SMALL = 2**16  # keys of the largest layers that are ranked in a stack with others of their shape


def order_key(score: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """int32 in the order of the floats, 0.0 = -0.0; the lowest int32, which no float has, where not allowed."""
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    key = jnp.where(bits >= 0, bits, INT32_MIN - bits)
    return key if allowed is None else jnp.where(allowed != 0, key, INT32_MIN)


class _Place(NamedTuple):
    """Where an array's rankings are in the vectors of the search: one, or one for each layer that it stacks."""

    first: int
    stack: tuple[int, ...]  # the shape of its leading axes that count layers

    def of(self, vector: jax.Array, rank: int) -> jax.Array:
        """The array's entries of a vector, of a shape that combines with an array of that rank."""
        if not self.stack:
            return vector[self.first]
        own = vector[self.first : self.first + math.prod(self.stack)]
        return own.reshape(self.stack + (1,) * (rank - len(self.stack)))


# Compiled, so that a call outside jit costs one compilation per set of shapes and not one per call.
@partial(jax.jit, static_argnames=("groups", "stacks"), inline=True)
def highest(
    keys: list[jax.Array], counts: list[Any], groups: tuple[int, ...], stacks: tuple[int, ...] | None = None
) -> list[jax.Array]:
    """Boolean masks of the counts[g] highest keys among the arrays whose group is g; ties by flat index.

    stacks[i]: how many leading axes of keys[i] count layers, each of which is ranked by itself; such an array is alone
    in its group, and counts[g] is one number for all of them, or an array of those axes.
    """
    stacks = stacks or (0,) * len(keys)
    if jax.device_count() > 1:  # arrays of one shape may lie on a mesh in different ways
        return _ranked(keys, counts, groups, stacks)
    # Small arrays of one shape, each ranked by itself, become a stack: the program grows with the number of shapes.
    like: dict[Any, list[int]] = {}
    for at, (key, group, leading) in enumerate(zip(keys, groups, stacks, strict=True)):
        alone = 0 < key.size <= SMALL and not leading and groups.count(group) == 1
        like.setdefault(key.shape if alone else at, []).append(at)
    single = [same[0] for same in like.values() if len(same) == 1]
    several = [same for same in like.values() if len(same) > 1]
    masks = _ranked(
        [*(keys[at] for at in single), *(jnp.stack([keys[at] for at in same]) for same in several)],
        [*counts, *(jnp.stack([jnp.int32(counts[groups[at]]) for at in same]) for same in several)],
        (*(groups[at] for at in single), *range(len(counts), len(counts) + len(several))),
        (*(stacks[at] for at in single), *(1 for _ in several)),
    )
    of = dict(zip(single, masks, strict=False))
    for same, mask in zip(several, masks[len(single) :], strict=True):
        of |= {at: mask[row] for row, at in enumerate(same)}
    return [of[at] for at in range(len(keys))]


def _ranked(
    keys: list[jax.Array], counts: list[Any], groups: tuple[int, ...], stacks: tuple[int, ...]
) -> list[jax.Array]:
    """The masks of `highest`, every array by itself."""
    whole = [(key, g, key.shape[:leading]) for key, g, leading in zip(keys, groups, stacks, strict=True) if key.size]
    if not whole:
        return [jnp.zeros(key.shape, bool) for key in keys]
    arrays = [key for key, _, _ in whole]
    numbers: list[jax.Array] = []
    starts: dict[int, int] = {}
    for _, g, stack in whole:
        if g not in starts:
            starts[g] = sum(part.size for part in numbers)
            numbers.append(jnp.broadcast_to(jnp.asarray(counts[g], jnp.int32), stack).ravel())
    places = [_Place(starts[g], stack) for _, g, stack in whole]
    wanted = jnp.concatenate(numbers)
    bracket = _search(arrays, places, wanted)
    straddles = (bracket.at_low > wanted) & (wanted > 0)

    def cut(_):
        return [
            (key >= place.of(bracket.low, key.ndim)) & (place.of(wanted, key.ndim) > 0)
            for key, place in zip(arrays, places, strict=True)
        ]

    def cut_ties(_):
        tied = [
            jnp.where(key == place.of(bracket.low, key.ndim), index, -1)
            for key, place, index in zip(arrays, places, _flat_indices(arrays, places), strict=True)
        ]
        sizes = jnp.array(_sizes(arrays, places), jnp.int32)
        # A group whose cut is clean asks for all its indices, which ends its search before it begins.
        lowest = jnp.where(straddles, wanted - bracket.at_high, sizes)
        first = _search(tied, places, lowest, ends=(jnp.full_like(sizes, -1), sizes)).low
        masks = []
        for key, place, index in zip(arrays, places, tied, strict=True):
            low, least, some = (place.of(vector, key.ndim) for vector in (bracket.low, first, wanted > 0))
            masks.append(((key > low) | ((key == low) & (index >= least))) & some)
        return masks

    masks = iter(lax.cond(jnp.any(straddles), cut_ties, cut, None))
    return [next(masks) if key.size else jnp.zeros(key.shape, bool) for key in keys]


class _Bracket(NamedTuple):
    """Per group: count(key >= low) = at_low >= wanted > at_high = count(key >= high)."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    turn: jax.Array  # what the next probe does: one of the turns below
    before: jax.Array  # at_low - at_high when the current round of turns began


HINT_LOW, HINT_HIGH, AIM, OVERSHOOT, SNAP, STEP, HALVE = range(7)


def _search(
    keys: list[jax.Array], places: list[_Place], wanted: jax.Array, ends: tuple[jax.Array, jax.Array] | None = None
) -> _Bracket:
    """The bracket of each group's threshold: at_low == wanted, or high == low + 1 (equal keys straddle the cut).

    keys: int32 arrays; places[i]: where keys[i] is ranked; wanted: int32 [groups], each in [1, keys of the group]
    (a group that wants 0 keys is closed from the start); ends: per group a key that is not above its lowest and one
    that is above its highest, where known.
    """
    sizes = jnp.array(_sizes(keys, places), jnp.int32)
    sample = _sample(keys, places, wanted)
    # A CPU passes over open groups only. On a mesh all counts are one exchange, and a GPU waits for every condition.
    skips = jax.default_backend() == "cpu" and jax.device_count() == 1

    def is_open(b):
        return (b.at_low > wanted) & (_width(b) > 1) & (wanted > 0)

    def step(b):
        probe = _probe(b, wanted, sample)
        counts: dict[int, Any] = {}
        for key, place in zip(keys, places, strict=True):
            count = partial(_count, key, place.of(probe, key.ndim), len(place.stack))
            none = partial(jnp.zeros, place.stack, jnp.int32)
            number = lax.cond(jnp.any(place.of(is_open(b), key.ndim)), count, none) if skips else count()
            counts[place.first] = counts.get(place.first, 0) + number.ravel()
        at = jnp.concatenate([counts[first] for first in sorted(counts)])
        up, down = is_open(b) & (at >= wanted), is_open(b) & (at < wanted)
        at_low, at_high = jnp.where(up, at, b.at_low), jnp.where(down, at, b.at_high)
        stalled = (at_low - at_high) * 4 > b.before
        over = (b.turn == HALVE) | ((b.turn == OVERSHOOT) & ~stalled)
        turn = jnp.where(over, AIM, b.turn + 1)
        return _Bracket(
            jnp.where(up, probe, b.low),
            jnp.where(down, probe, b.high),
            at_low,
            at_high,
            turn,
            jnp.where(turn == AIM, at_low - at_high, b.before),
        )

    low, high = ends or (jnp.full_like(sizes, INT32_MIN), jnp.full_like(sizes, INT32_MAX))
    turn = jnp.full_like(sizes, HINT_LOW)
    start = _Bracket(low, high, at_low=sizes, at_high=jnp.zeros_like(sizes), turn=turn, before=sizes)
    return lax.while_loop(lambda b: jnp.any(is_open(b)), step, start)


class _Sample(NamedTuple):
    """Some keys of each group, and two of them that most likely enclose its threshold."""

    keys: jax.Array  # [groups, drawn], padded with the lowest int32
    low: jax.Array
    high: jax.Array


def _probe(b: _Bracket, wanted: jax.Array, sample: _Sample) -> jax.Array:
    """A key strictly inside each bracket, which the turn chooses.

    HINT_LOW and HINT_HIGH come from the sample. AIM goes where the counts, interpolated, say that the threshold is.
    OVERSHOOT goes as far past it as the nearer end is from it, to bring in the farther end. Where these do not help,
    many keys are equal: SNAP goes to a sampled key near the aim, STEP leaves the lower end just out. HALVE bisects.
    """
    width = _width(b)
    near = jnp.maximum(jnp.minimum(b.at_low - wanted, wanted - b.at_high), 1)
    past = jnp.where(b.at_low - wanted > wanted - b.at_high, near, -near)
    aim = wanted + jnp.where(b.turn == OVERSHOOT, past, 0)
    above, between = (difference.astype(jnp.float32) for difference in (b.at_low - aim, b.at_low - b.at_high))
    share = jnp.clip(above / jnp.maximum(between, 1), 0, 1)
    offset = jnp.where(b.turn == HALVE, width >> 1, (width.astype(jnp.float32) * share).astype(jnp.uint32))
    offset = jnp.where(b.turn == STEP, 1, offset)
    probe = b.low + jnp.clip(offset, 1, jnp.maximum(width, 2) - 1).astype(jnp.int32)
    at_least = sample.keys >= probe[:, None]
    above = jnp.min(jnp.where(at_least, sample.keys, INT32_MAX), axis=1)
    below = jnp.max(jnp.where(at_least, INT32_MIN, sample.keys), axis=1)
    probe = jnp.where(b.turn == SNAP, jnp.where(above < b.high, above, below), probe)
    probe = jnp.where(b.turn == HINT_LOW, sample.low, jnp.where(b.turn == HINT_HIGH, sample.high, probe))
    return jnp.clip(probe, b.low + 1, b.high - 1)


def _sample(keys: list[jax.Array], places: list[_Place], wanted: jax.Array) -> _Sample:
    """About SAMPLE keys of each group, with quantiles three deviations apart around the threshold's.

    Where the sample is the whole group, both are the threshold itself.
    """
    rows: list[jax.Array] = []
    lows: list[jax.Array] = []
    highs: list[jax.Array] = []
    sizes = _sizes(keys, places)
    for first in sorted({place.first for place in places}):
        own = [(key, len(place.stack)) for key, place in zip(keys, places, strict=True) if place.first == first]
        size, stack = sizes[first], own[0][0].shape[: own[0][1]]
        shape = (math.prod(stack), -1) if stack else (-1,)
        parts = [_slice(key, SAMPLE / size, leading).reshape(shape) for key, leading in own]
        row = jnp.sort(jnp.concatenate(parts, axis=-1))  # sorting also leaves it whole on every device of a mesh
        drawn = row.shape[-1]
        layers = math.prod(stack)
        share = (wanted[first : first + layers] if stack else wanted[first]).astype(jnp.float32) / size
        margin = 3 * jnp.sqrt(drawn * share * (1 - share) * (1 - drawn / size)) + float(drawn < size)
        for side, ends in ((1, lows), (-1, highs)):
            rank = jnp.clip(jnp.round(drawn * share + side * margin), 1, drawn).astype(jnp.int32)  # 1 for the highest
            if stack:
                ends.append(jnp.take_along_axis(row, drawn - rank[:, None], axis=1)[:, 0])
            else:
                ends.append(row[drawn - rank][None])
        rows.append(row if stack else row[None])
    drawn = max(row.shape[1] for row in rows)
    padded = [jnp.pad(row, ((0, 0), (0, drawn - row.shape[1])), constant_values=INT32_MIN) for row in rows]
    return _Sample(jnp.concatenate(padded), jnp.concatenate(lows), jnp.concatenate(highs))


def _slice(key: jax.Array, share: float, leading: int) -> jax.Array:
    """About this share of each layer's keys, and at least one: a slice with strides, which moves little between shards.

    The leading axes count layers, and stay whole.
    """
    layers = math.prod(key.shape[:leading])
    wanted = max(round(share * (key.size // layers)), 1)
    for axis in (leading + np.argsort(key.shape[leading:])[::-1]).tolist():
        stride = min(key.shape[axis], max(key.size // layers // wanted, 1))
        key = lax.slice_in_dim(key, 0, None, stride=stride, axis=axis)
    return key


def _count(key: jax.Array, threshold: jax.Array, leading: int) -> jax.Array:
    """int32 [leading axes]: how many keys of each layer are >= threshold.

    On a CPU the rows are summed by a product with ones, more than twice as fast as an integer sum and, unlike a float
    sum, fast whatever the compiler's options. Elsewhere one sum over all axes, which a mesh exchanges as one number.
    Both are exact: no float exceeds 2**24.
    """
    over = tuple(range(leading, key.ndim))

    def by_rows(part):
        rows = (part @ jnp.ones(part.shape[-1], jnp.float32)).astype(jnp.int32)
        return jnp.sum(rows, axis=over[:-1], dtype=jnp.int32)

    def at_once(part):
        axes, size = [], 1
        for axis in reversed(over):
            if size * part.shape[axis] <= EXACT_IN_FLOAT32:
                axes.append(axis)
                size *= part.shape[axis]
        exact = jnp.sum(part, axis=tuple(axes), keepdims=True).astype(jnp.int32)
        return jnp.sum(exact, axis=over, dtype=jnp.int32)

    part = (key >= threshold).astype(jnp.float32)
    if len(over) < 2 or part.shape[-1] > EXACT_IN_FLOAT32:
        return at_once(part)
    return lax.platform_dependent(part, cpu=by_rows, default=at_once)


def _width(b: _Bracket) -> jax.Array:
    return (b.high - b.low).astype(jnp.uint32)  # up to 2**32 - 1: wraps right only without a sign


def _sizes(keys: list[jax.Array], places: list[_Place]) -> list[int]:
    """How many keys each group has."""
    sizes: dict[int, int] = {}
    for key, place in zip(keys, places, strict=True):
        layers = math.prod(place.stack)
        for group in range(place.first, place.first + layers):
            sizes[group] = sizes.get(group, 0) + key.size // layers
    if max(sizes.values()) > INT32_MAX - 1:
        raise ValueError(
            "more than 2**31 - 2 scores in one ranking: their flat index does not fit in 32 bits. Rank each layer by "
            "itself instead of all together; or divide the leaf: where a leading axis counts layers, say so with "
            "sm.describe(..., axes={path: 'stack in out'}), and each of them is ranked by itself."
        )
    return [sizes[group] for group in sorted(sizes)]


def _flat_indices(arrays: list[jax.Array], places: list[_Place]) -> list[jax.Array]:
    """Flat index of every element within its group, from an iota per axis: a ravel would gather a sharded array."""
    start, indices = {place.first: 0 for place in places}, []
    for array, (first, stack) in zip(arrays, places, strict=True):
        index = jnp.full(array.shape, start[first], jnp.int32)
        for axis in range(len(stack), array.ndim):
            stride = math.prod(array.shape[axis + 1 :])
            index = index + lax.broadcasted_iota(jnp.int32, array.shape, axis) * stride
        indices.append(index)
        start[first] += array.size
    return indices
