"""The exact threshold of the highest scores, without a sort, by counting.

Scores become integer order keys (`order_key`). The search is for a threshold t with exactly `count` keys >= t. Each
pass compares every key with one probe per group and needs only a sum of counts. All layers therefore share a pass,
scores that are sharded over devices stay so, and the result does not depend on their layout.

Probes come first from a small sample, which is all that a mesh gathers, then from interpolating the counts between
two scores, which is fast on smooth distributions, and less so on scores of many orders of magnitude. Whenever that
stalls, a bisection follows, so that the number of passes is bounded for any scores. Probes only guide the search; the
exact count ends it. Where equal scores lie on both sides of the cut, the same search runs again over their flat
indices.

On a single CPU, a pass counts only arrays in which a search is still open. On one device, small layers share an array,
so that the program hardly grows with their number.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT32_MIN, INT32_MAX = np.int32(-(2**31)), np.int32(2**31 - 1)
FINITE = np.finfo(np.float32).max.view(np.int32)  # the order key of the highest finite float; the lowest has -FINITE
EXACT_IN_FLOAT32 = 2**24
SAMPLE = 2**9  # keys per group that guide the search
SMALL = 2**16  # keys of the largest layers that share an array with others
ROW = 2**9  # keys of a row of such an array
FEW = 8  # keys in a bracket that are not worth an interpolation


def order_key(score: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """int32 in the order of the floats, 0.0 = -0.0; the lowest int32, which no float has, where not allowed.

    The highest int32 is no key either: the search takes it for a number above all keys. One NaN would have it.
    """
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    key = jnp.where(bits >= 0, jnp.minimum(bits, INT32_MAX - 1), INT32_MIN - bits)
    return key if allowed is None else jnp.where(jnp.asarray(allowed).astype(bool), key, INT32_MIN)


def _score(key: jax.Array) -> jax.Array:
    """float32 of these order keys; the finite one of the same sign that is nearest, where no finite float has it."""
    key = jnp.clip(key, -FINITE, FINITE)
    return lax.bitcast_convert_type(jnp.where(key >= 0, key, INT32_MIN - key), jnp.float32)


class _Place(NamedTuple):
    """Where an array's rankings are in the vectors of the search: one, or one for each layer that it stacks."""

    first: int
    stack: tuple[int, ...]  # the shape of its leading axes that count layers

    def sizes(self, key: jax.Array) -> list[int]:
        """How many keys each of its layers has."""
        layers = math.prod(self.stack)
        return [key.size // layers] * layers

    def of(self, vector: jax.Array, rank: int) -> jax.Array:
        """Its entries of a vector, of a shape that combines with an array of that rank."""
        if not self.stack:
            return vector[self.first]
        own = vector[self.first : self.first + math.prod(self.stack)]
        return own.reshape(self.stack + (1,) * (rank - len(self.stack)))

    def at_least(self, key: jax.Array, threshold: jax.Array) -> jax.Array:
        """int32 [layers]: how many keys of each are >= threshold, which `of` has made."""
        return _count(key, threshold, len(self.stack)).ravel()

    def indices(self, key: jax.Array) -> jax.Array:
        """Flat index of every key within its layer, from an iota per axis: a ravel would gather a sharded array."""
        index = jnp.zeros(key.shape, jnp.int32)
        for axis in range(len(self.stack), key.ndim):
            stride = math.prod(key.shape[axis + 1 :])
            index = index + lax.broadcasted_iota(jnp.int32, key.shape, axis) * stride
        return index

    def sample(self, key: jax.Array, share: float) -> jax.Array:
        """[layers, drawn]: about this share of each layer's keys, and at least one.

        A slice with strides, which moves little between shards. The leading axes count layers, and stay whole.
        """
        leading, layers = len(self.stack), math.prod(self.stack)
        wanted = max(round(share * (key.size // layers)), 1)
        for axis in (leading + np.argsort(key.shape[leading:])[::-1]).tolist():
            stride = min(key.shape[axis], max(key.size // layers // wanted, 1))
            key = lax.slice_in_dim(key, 0, None, stride=stride, axis=axis)
        return key.reshape(layers, -1)


class _Pack:
    """A place like `_Place`, of an array that holds several small layers: each fills rows of ROW keys.

    The lowest int32 pads a layer's last row.
    """

    def __init__(self, first: int, sizes: list[int]):
        rows = np.array([-(-size // ROW) for size in sizes])
        self.first, self._sizes = first, np.array(sizes)
        self._starts, self._ends = np.cumsum(rows) - rows, np.cumsum(rows)
        self._layer = np.repeat(np.arange(len(sizes)), rows)  # of each row

    def pack(self, keys: list[jax.Array]) -> jax.Array:
        """[rows, ROW]: the layers' keys."""
        parts = [part for key in keys for part in (key.ravel(), jnp.full(-key.size % ROW, INT32_MIN))]
        return jnp.concatenate(parts).reshape(-1, ROW)

    def unpack(self, packed: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
        """The layers again, in their own shapes."""
        layers = [packed[start:end].ravel() for start, end in zip(self._starts, self._ends, strict=True)]
        return [layer[: math.prod(shape)].reshape(shape) for layer, shape in zip(layers, shapes, strict=True)]

    def sizes(self, key: jax.Array) -> list[int]:
        return self._sizes.tolist()

    def of(self, vector: jax.Array, rank: int) -> jax.Array:
        return vector[self.first + self._layer][:, None]

    def at_least(self, key: jax.Array, threshold: jax.Array) -> jax.Array:
        rows = self._starts[:, None] + np.arange(np.max(self._ends - self._starts))
        none = len(self._layer)  # a further row, in which nothing is counted
        of_rows = jnp.pad(_count(key, threshold, 1), (0, 1))
        return jnp.sum(of_rows[np.where(rows < self._ends[:, None], rows, none)], axis=1, dtype=jnp.int32)

    def indices(self, key: jax.Array) -> jax.Array:
        """Flat index of every key within its layer; -1 where a row is padded."""
        row = jnp.asarray(np.arange(len(self._layer)) - self._starts[self._layer], jnp.int32)
        index = row[:, None] * ROW + lax.broadcasted_iota(jnp.int32, key.shape, 1)
        return jnp.where(index < jnp.asarray(self._sizes[self._layer], jnp.int32)[:, None], index, -1)

    def sample(self, key: jax.Array, share: float) -> jax.Array:
        """[layers, drawn]: keys of each layer at equal distances, padded with the lowest int32.

        All keys where they are less than twice SAMPLE, as a slice with strides has them.
        """
        sizes = self._sizes[:, None]
        place = np.arange(np.max(sizes[sizes < 2 * SAMPLE], initial=SAMPLE))
        drawn = np.minimum(sizes, len(place))
        at = self._starts[:, None] * ROW + np.minimum(place, drawn - 1) * sizes // drawn
        return jnp.where(place < drawn, key[at // ROW, at % ROW], INT32_MIN)


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
    packed = _small(keys, groups, stacks)
    alone = [at for at, key in enumerate(keys) if key.size and at not in packed]
    arrays = [keys[at] for at in alone]
    places: list[_Place | _Pack] = []
    wanted: list[jax.Array] = []
    starts: dict[int, int] = {}
    for at in alone:
        g, stack = groups[at], keys[at].shape[: stacks[at]]
        if g not in starts:
            starts[g] = sum(part.size for part in wanted)
            wanted.append(jnp.broadcast_to(jnp.asarray(counts[g], jnp.int32), stack).ravel())
        places.append(_Place(starts[g], stack))
    if packed:
        pack = _Pack(sum(part.size for part in wanted), [keys[at].size for at in packed])
        arrays.append(pack.pack([keys[at] for at in packed]))
        places.append(pack)
        wanted.append(jnp.stack([jnp.asarray(counts[groups[at]], jnp.int32) for at in packed]))
    found = _ranked(arrays, places, jnp.concatenate(wanted)) if arrays else []
    masks = dict(zip(alone, found, strict=False))
    if packed:
        masks |= zip(packed, pack.unpack(found[-1], [keys[at].shape for at in packed]), strict=True)
    return [masks[at] if key.size else jnp.zeros(key.shape, bool) for at, key in enumerate(keys)]


def _small(keys: list[jax.Array], groups: tuple[int, ...], stacks: tuple[int, ...]) -> list[int]:
    """Which arrays are packed: on one device, at least two small ones that are each ranked by itself."""
    if jax.device_count() > 1:  # arrays may lie on a mesh in different ways
        return []
    each = enumerate(zip(keys, groups, stacks, strict=True))
    small = [at for at, (key, g, leading) in each if 0 < key.size <= SMALL and not leading and groups.count(g) == 1]
    return small if len(small) > 1 else []


def _ranked(keys: list[jax.Array], places: list[_Place | _Pack], wanted: jax.Array) -> list[jax.Array]:
    """The masks of the wanted[g] highest keys of each group.

    Where equal keys straddle the cut, the same program searches once more, among numbers that rank as the keys with
    their flat indices do. These take the place of the keys; on a CPU, the masks do so in the end.
    """
    sizes = jnp.array(_sizes(keys, places), jnp.int32)

    def search(state):
        keys, bracket = state
        bracket = _search(keys, places, wanted, bracket)
        straddles = (bracket.at_low > wanted) & (wanted > 0)

        def among_ties():
            indices = _flat_indices(keys, places)
            numbers = []
            for key, place, index in zip(keys, places, indices, strict=True):
                low, tied = (place.of(vector, key.ndim) for vector in (bracket.low, straddles))
                number = jnp.where(key > low, INT32_MAX, jnp.where(key == low, index, -1))
                numbers.append(jnp.where(tied, number, key))
            return numbers, bracket._replace(
                low=jnp.where(straddles, 0, bracket.low),
                high=jnp.where(straddles, sizes, bracket.high),
                by_index=bracket.by_index | straddles,
            )

        return lax.cond(jnp.any(straddles), among_ties, lambda: (keys, bracket))

    start = _Bracket(
        low=jnp.full_like(sizes, INT32_MIN),
        high=jnp.full_like(sizes, INT32_MAX),
        at_low=sizes,
        at_high=jnp.zeros_like(sizes),
        turn=jnp.zeros_like(sizes),
        before=jnp.zeros_like(sizes),
        by_index=sizes < 0,  # False, as many as there are groups
    )
    keys, bracket = lax.while_loop(lambda state: jnp.any(_is_open(state[1], wanted)), search, (keys, start))
    return [
        (key >= place.of(bracket.low, key.ndim)) & (place.of(wanted, key.ndim) > 0)
        for key, place in zip(keys, places, strict=True)
    ]


class _Bracket(NamedTuple):
    """Per group: count(key >= low) = at_low >= wanted > at_high = count(key >= high)."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    turn: jax.Array  # what the next probe does: one of the turns below
    before: jax.Array  # at_low - at_high when the current round of turns began
    by_index: jax.Array  # whether the keys are flat indices, and no scores


HINT_LOW, HINT_HIGH, AIM, OVERSHOOT, FARTHER, SNAP, STEP, HALVE = range(8)


def _is_open(b: _Bracket, wanted: jax.Array) -> jax.Array:
    return (b.at_low > wanted) & (_width(b) > 1) & (wanted > 0)


def _search(keys: list[jax.Array], places: list[_Place | _Pack], wanted: jax.Array, start: _Bracket) -> _Bracket:
    """The bracket of each group's threshold: at_low == wanted, or high == low + 1 (equal keys straddle the cut).

    keys: int32 arrays; places[i]: where keys[i] is ranked; wanted: int32 [groups], each in [1, keys of the group]
    (a group that wants 0 keys is closed from the start); start: brackets that hold the thresholds, at any turn.
    """
    sample = _sample(keys, places, wanted)
    # Equal scores lie anywhere, so that interpolating their indices needs no hint.
    first = jnp.where(start.by_index & ~sample.whole, AIM, jnp.full_like(start.turn, HINT_LOW))
    start = start._replace(turn=first, before=start.at_low - start.at_high)
    # A CPU counts only arrays that have an open group. On a mesh all counts are one exchange, and a GPU waits for every
    # condition.
    skips = jax.default_backend() == "cpu" and jax.device_count() == 1

    def step(b):
        probe = _probe(b, wanted, sample)
        counts: dict[int, Any] = {}
        for key, place in zip(keys, places, strict=True):
            count = partial(place.at_least, key, place.of(probe, key.ndim))
            if skips:
                none = partial(jnp.zeros, len(place.sizes(key)), jnp.int32)
                number = lax.cond(jnp.any(place.of(_is_open(b, wanted), key.ndim)), count, none)
            else:
                number = count()
            counts[place.first] = counts.get(place.first, 0) + number
        at = jnp.concatenate([counts[first] for first in sorted(counts)])
        up, down = _is_open(b, wanted) & (at >= wanted), _is_open(b, wanted) & (at < wanted)
        at_low, at_high = jnp.where(up, at, b.at_low), jnp.where(down, at, b.at_high)
        stalled = at_low - at_high > b.before // 4
        over = (b.turn == HALVE) | (~stalled & ((b.turn == OVERSHOOT) | (b.turn == FARTHER)))
        turn = jnp.where(over, AIM, b.turn + 1)
        return _Bracket(
            jnp.where(up, probe, b.low),
            jnp.where(down, probe, b.high),
            at_low,
            at_high,
            turn,
            jnp.where(turn == AIM, at_low - at_high, b.before),
            b.by_index,
        )

    return lax.while_loop(lambda b: jnp.any(_is_open(b, wanted)), step, start)


class _Sample(NamedTuple):
    """Some keys of each group, and two of them that most likely enclose its threshold."""

    keys: jax.Array  # [groups, drawn], padded with the lowest int32
    low: jax.Array
    high: jax.Array
    whole: jax.Array  # whether `keys` are all of the group's; `low` and `high` are then the threshold


def _probe(b: _Bracket, wanted: jax.Array, sample: _Sample) -> jax.Array:
    """A key strictly inside each bracket, which the turn chooses.

    HINT_LOW and HINT_HIGH come from the sample. AIM goes where the counts, interpolated, say that the threshold is.
    OVERSHOOT goes past it, to bring in the farther end: by the root of the nearer end's distance, by which smooth
    scores make an aim miss. FARTHER goes past by all of that distance. Where these do not help, many keys are equal:
    SNAP goes to a sampled key near the aim, STEP leaves the lower end just out. HALVE bisects, and so does every probe
    while few keys are left, unless the sample tells the threshold.
    """
    width = _width(b)
    near = jnp.maximum(jnp.minimum(b.at_low - wanted, wanted - b.at_high), 1).astype(jnp.float32)
    past = jnp.where(b.turn == OVERSHOOT, jnp.sqrt(near), jnp.where(b.turn == FARTHER, near, 0))
    past = jnp.where(b.at_low - wanted > wanted - b.at_high, past, -past)
    above, between = ((b.at_low - count).astype(jnp.float32) for count in (wanted, b.at_high))
    share = jnp.clip((above - past) / jnp.maximum(between, 1), 0, 1)
    few = (b.at_low - b.at_high <= FEW) & ~sample.whole
    offset = jnp.where(b.turn == STEP, 1, (width.astype(jnp.float32) * share).astype(jnp.uint32))
    offset = jnp.where(few | (b.turn == HALVE), width >> 1, offset)
    probe = b.low + jnp.clip(offset, 1, jnp.maximum(width, 2) - 1).astype(jnp.int32)
    scored = order_key(_score(b.low) * (1 - share) + _score(b.high) * share)
    by_key = few | b.by_index | (b.turn == STEP) | (b.turn == HALVE)
    probe = jnp.clip(jnp.where(by_key, probe, scored), b.low + 1, b.high - 1)
    at_least = sample.keys >= probe[:, None]
    above = jnp.min(jnp.where(at_least, sample.keys, INT32_MAX), axis=1)
    below = jnp.max(jnp.where(at_least, INT32_MIN, sample.keys), axis=1)
    sampled = jnp.where(above < b.high, above, below)
    sampled = jnp.where(b.turn == HINT_LOW, sample.low, jnp.where(b.turn == HINT_HIGH, sample.high, sampled))
    samples = (b.turn == SNAP) | (b.turn == HINT_LOW) | (b.turn == HINT_HIGH)
    return jnp.clip(jnp.where(samples & ~few, sampled, probe), b.low + 1, b.high - 1)


def _sample(keys: list[jax.Array], places: list[_Place | _Pack], wanted: jax.Array) -> _Sample:
    """About SAMPLE keys of each group, with quantiles three deviations apart around the threshold's."""
    sizes = np.array(_sizes(keys, places), np.float32)
    rows, drawn_of = [], []
    for first in sorted({place.first for place in places}):
        own = [(key, place) for key, place in zip(keys, places, strict=True) if place.first == first]
        share = SAMPLE / float(sizes[first])
        row = jnp.concatenate([place.sample(key, share) for key, place in own], axis=1)
        layers, own_width = row.shape
        # A sort along the only axis also leaves it whole on every device of a mesh.
        rows.append(jnp.sort(row, axis=1) if layers > 1 else jnp.sort(row[0])[None])
        drawn_of.append(np.minimum(sizes[first : first + layers], np.float32(own_width)))
    width = max(row.shape[1] for row in rows)
    padded = [jnp.pad(row, ((0, 0), (width - row.shape[1], 0)), constant_values=INT32_MIN) for row in rows]
    sample, drawn = jnp.concatenate(padded), np.concatenate(drawn_of)
    part = wanted.astype(jnp.float32) / sizes
    margin = 3 * jnp.sqrt(drawn * part * (1 - part) * (1 - drawn / sizes)) + np.float32(drawn < sizes)

    def quantile(side):
        rank = jnp.clip(jnp.round(drawn * part + side * margin), 1, drawn).astype(jnp.int32)  # 1 for the highest
        return jnp.take_along_axis(sample, width - rank[:, None], axis=1)[:, 0]

    return _Sample(sample, quantile(1), quantile(-1), jnp.asarray(drawn >= sizes))


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
    if key.ndim < 2 or not over or part.shape[-1] > EXACT_IN_FLOAT32:
        return at_once(part)
    return lax.platform_dependent(part, cpu=by_rows, default=at_once)


def _width(b: _Bracket) -> jax.Array:
    return (b.high - b.low).astype(jnp.uint32)  # up to 2**32 - 1: wraps right only without a sign


def _sizes(keys: list[jax.Array], places: list[_Place | _Pack]) -> list[int]:
    """How many keys each group has."""
    sizes: dict[int, int] = {}
    for key, place in zip(keys, places, strict=True):
        for group, size in enumerate(place.sizes(key), place.first):
            sizes[group] = sizes.get(group, 0) + size
    if max(sizes.values()) > INT32_MAX - 1:
        raise ValueError(
            "more than 2**31 - 2 scores in one ranking: their flat index does not fit in 32 bits. Rank each layer by "
            "itself instead of all together; or divide the leaf: where a leading axis counts layers, say so with "
            "sm.describe(..., axes={path: 'stack in out'}), and each of them is ranked by itself."
        )
    return [sizes[group] for group in sorted(sizes)]


def _flat_indices(keys: list[jax.Array], places: list[_Place | _Pack]) -> list[jax.Array]:
    """Flat index of every key within its group, whose arrays count as one that joins them.

    A pack, which begins with index 0, has -1 where it is padded.
    """
    start, indices = {place.first: 0 for place in places}, []
    for key, place in zip(keys, places, strict=True):
        indices.append(place.indices(key) + start[place.first])
        start[place.first] += key.size
    return indices
