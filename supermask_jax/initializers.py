"""Random weights that a seed regenerates on every machine: drawn from integers, scaled by one host constant.

Each initializer takes a key and the weights, and draws the chosen leaves anew (by default the kernels); the other
leaves come back unchanged. A leaf's draw depends only on its path and the key. `jax.random.normal` and
`uniform(minval, maxval)` are not used: their last bit depends on the machine's code generation.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.densities import exact
from supermask_jax.trees import Tree, Where, is_kernel, leaf_key, map_with_name, per_path, prunable

FanIn = Callable[[str, tuple[int, ...]], int]
"""fan_in(path, shape) -> how many inputs each output of the leaf sums."""
FanOut = Callable[[str, tuple[int, ...]], int]
"""fan_out(path, shape) -> how many outputs each input of the leaf goes to."""
Density = float | Mapping[str, float] | None
Draw = Callable[[jax.Array, tuple[int, ...], np.float32], jax.Array]  # (key, shape, scale)

ATTENTION_INPUTS, ATTENTION_OUTPUT = ("query", "key", "value"), "out"


def flax_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of a Flax kernel sums: the product of all axes but the last.

    That is right for (in, out), (width, in, out), (height, width, in, out) and attention's output kernel (heads,
    size, out). For attention's query, key and value kernels (in, heads, size) it is the first axis only.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its parent's name tells attention's kernels.
      shape: the leaf's shape.
    """
    return shape[0] if _attention(path, shape) == "in" else math.prod(shape[:-1])


def flax_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of a Flax kernel goes to: the product of all axes but the last but one.

    That is right for (in, out), (width, in, out) and (height, width, in, out). For attention's query, key and value
    kernels (in, heads, size) it is heads * size. For attention's output kernel (heads, size, out) it is the last axis
    only; a convolution of one axis looks the same, so the parent's name `out` decides.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its parent's name tells attention's kernels.
      shape: the leaf's shape.
    """
    match _attention(path, shape):
        case "in":
            return math.prod(shape[1:])
        case "out":
            return shape[-1]
    return shape[-1] * math.prod(shape[:-2])


def equinox_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of an Equinox or PyTorch weight sums: the product of all axes but the first.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return math.prod(shape[1:])


def equinox_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of an Equinox or PyTorch weight goes to: all axes but the second.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return shape[0] * math.prod(shape[2:])


def signed_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights of one magnitude per layer, sqrt(2 / fan_in), and random sign.

    Zhou et al. 2019 use another magnitude: see `signed_deviation`.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: Ramanujan et al. 2020, section 4 ("signed Kaiming constant") and section 3.1 (scaling). The released code
    scales by sqrt(1 / (1 - density)); that agrees with the paper at 0.5.
    """

    return _redraw(_signed, key, weights, density, where, fan_in)


def unsigned_constant(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights all equal to sqrt(2 / fan_in); nothing is random.

    Args:
      key: a `jax.random.key`, which does not matter; all initializers take one.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: the released code of Ramanujan et al. 2020 (unsigned_constant); section 3.1 of the paper (scaling).
    """
    return _redraw(lambda key, shape, scale: jnp.full(shape, scale), key, weights, density, where, fan_in)


def kaiming_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights from N(0, 2 / fan_in).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete (not under jit).
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: He et al. 2015, equation 10, for ReLU; the scaling by the density, Ramanujan et al. 2020, section 3.1.
    """
    return _redraw(_normal, key, weights, density, where, fan_in)


def glorot_normal(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
    fan_out: FanOut = flax_fan_out,
) -> Tree:
    """Returns weights from N(0, 2 / (fan_in + fan_out)).

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with. It must be concrete (not under jit).
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.
      fan_out: (path, shape) -> the leaf's fan-out; for Equinox or PyTorch layouts, `equinox_fan_out`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: Glorot and Bengio 2010, equation 12 (the variance). Keras's, which Zhou et al. 2019 draw from, cuts the
    normal's tails off at two deviations and widens the rest to this variance; here the tails stay.
    """

    def fans(path, shape):
        return fan_in(path, shape) + fan_out(path, shape)

    return _redraw(_normal, key, weights, density, where, fans)


def kaiming_uniform(
    key: jax.Array,
    weights: Tree,
    density: Density = None,
    where: Where = is_kernel,
    fan_in: FanIn = flax_fan_in,
) -> Tree:
    """Returns weights from U(-b, b), b = sqrt(6 / fan_in), whose variance is 2 / fan_in.

    Args:
      key: a `jax.random.key`, not the one the scores are drawn with.
      weights: tree whose shapes and dtypes are kept.
      density: None, or the fraction that will be kept, in (0, 1]: one for all leaves, or {path: fraction}. The weights
        are then scaled by sqrt(1 / density).
      where: (path, leaf) -> whether the leaf is drawn anew.
      fan_in: (path, shape) -> the leaf's fan-in; for Equinox or PyTorch layouts, `equinox_fan_in`.

    Raises:
      ValueError: `where` chooses no leaf, or a density is outside (0, 1] or names a path that does not exist.

    Source: He et al. 2015, equation 10 (the variance), for ReLU.
    """

    def draw(key, shape, scale):
        return symmetric_uniform(key, shape, float(scale) * math.sqrt(3))

    return _redraw(draw, key, weights, density, where, fan_in)


def signed_deviation(weights: Tree, where: Where = is_kernel) -> Tree:
    """Returns each chosen weight's sign times the standard deviation of its leaf; a weight of 0 stays 0.

    This is the second published magnitude of a signed constant. `signed_constant`, of Ramanujan et al., computes it
    from the fan-in and draws the signs. This one, of Zhou et al., takes both from weights that were drawn before
    (there, Glorot normal).

    Args:
      weights: tree of concrete arrays (not under jit). The deviation is that of the population: of n, not of n - 1. It
        is computed in float64 and rounded to float32.
      where: (path, leaf) -> whether the leaf is replaced.

    Raises:
      ValueError: `where` chooses no leaf.

    Source: Zhou et al. 2019, section 5, and its released code (make_signed_consts).
    """
    chosen = prunable(weights, where)

    def replace(path: str, leaf: jax.Array) -> jax.Array:
        if path not in chosen:
            return leaf
        values = np.asarray(leaf, np.float64)
        return jnp.asarray(np.sign(values).astype(np.float32) * np.float32(values.std())).astype(leaf.dtype)

    return map_with_name(replace, weights)


def symmetric_uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Returns [shape] float32 from U(-bound, bound): odd multiples of bound / 2**24, the same on every machine."""
    return _odd_multiples(key, shape, np.float32(bound / 2**24))


# Compiled, so that a draw costs one compilation per shape and not one per operation.


@partial(jax.jit, static_argnums=1)
def _signed(key: jax.Array, shape: tuple[int, ...], scale: np.float32) -> jax.Array:
    return jnp.where(jax.random.bits(key, shape, jnp.uint32) >> 31, scale, -scale)


@partial(jax.jit, static_argnums=1)
def _odd_multiples(key: jax.Array, shape: tuple[int, ...], unit: np.float32) -> jax.Array:
    odd = ((jax.random.bits(key, shape, jnp.uint32) >> 8) << 1).astype(jnp.int32) + (1 - 2**24)
    return odd.astype(jnp.float32) * unit  # one rounding: there is no sum for a compiler to fuse it with


def _normal(key: jax.Array, shape: tuple[int, ...], scale: np.float32) -> jax.Array:
    return jnp.asarray(standard_normal(np.asarray(jax.random.bits(key, shape, jnp.uint32))) * scale)


def standard_normal(bits: np.ndarray) -> np.ndarray:
    """Returns float32 standard normals from uint32 bits, by inverting the distribution function on the host.

    Args:
      bits: uint32 of any shape, uniform.

    Returns:
      float32 of that shape. Only +, -, *, / and sqrt of doubles are used, which IEEE 754 rounds alike everywhere;
      library logarithms differ.

    Source: Wichura 1988, algorithm AS 241 (PPND16), relative accuracy about 1e-16.
    """
    p = (bits.astype(np.float64) + 0.5) / 2.0**32
    q = p - 0.5
    central = 0.180625 - q * q
    tail = np.sqrt(-_log(np.minimum(p, 1.0 - p)))  # below 4.8 for 32 bits: AS 241's far tail is out of reach
    x = np.where(central >= 0, q * _ratio(CENTRE, central), np.copysign(_ratio(TAIL, tail - 1.6), q))
    return x.astype(np.float32)


def _redraw(draw: Draw, key: jax.Array, weights: Tree, density: Density, where: Where, fan: FanIn) -> Tree:
    """`weights` with draw(key of the leaf, shape, float32 sqrt(2 / fan / density)) in place of each chosen leaf."""
    shapes = prunable(weights, where)
    densities = per_path(1.0 if density is None else density, shapes)
    for path, kept in densities.items():
        if exact(kept) == 0:
            raise ValueError(f"cannot scale the weights of {path!r} for a density of 0")
    scales = {
        path: np.float32(math.sqrt(2.0 / fan(path, shape) / float(densities[path]))) for path, shape in shapes.items()
    }
    return map_with_name(
        lambda path, leaf: (
            draw(leaf_key(key, path), leaf.shape, scales[path]).astype(leaf.dtype) if path in scales else leaf
        ),
        weights,
    )


def _attention(path: str, shape: tuple[int, ...]) -> str | None:
    """Which side of Flax's attention a kernel is on: "in" (in, heads, size) or "out" (heads, size, out); else None."""
    parent = path.split("/")[-2:-1]
    if len(shape) != 3 or not parent:
        return None
    return "in" if parent[0] in ATTENTION_INPUTS else "out" if parent[0] == ATTENTION_OUTPUT else None


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm in basic arithmetic: x = m * 2**e, log m = 2 atanh((m - 1) / (m + 1)) by its series."""
    mantissa, exponent = np.frexp(x)
    z = (mantissa * math.sqrt(2.0) - 1.0) / (mantissa * math.sqrt(2.0) + 1.0)
    series = np.zeros_like(z)
    for n in range(27, 0, -2):  # |z| < 0.172: the first term left out is below 1e-22
        series = series * (z * z) + 1.0 / n
    return 2.0 * z * series + (exponent - 0.5) * math.log(2.0)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: np.ndarray) -> np.ndarray:
    numerator, denominator = (np.zeros_like(r), np.zeros_like(r))
    for a, b in zip(*coefficients, strict=True):
        numerator, denominator = numerator * r + a, denominator * r + b
    return numerator / denominator


# AS 241's coefficients, highest power first: (numerator, denominator).
CENTRE = (
    (
        2509.0809287301227,
        33430.57558358813,
        67265.7709270087,
        45921.95393154987,
        13731.69376550946,
        1971.5909503065513,
        133.14166789178438,
        3.3871328727963665,
    ),
    (
        5226.495278852854,
        28729.085735721943,
        39307.89580009271,
        21213.794301586597,
        5394.196021424751,
        687.1870074920579,
        42.31333070160091,
        1.0,
    ),
)
TAIL = (
    (
        0.0007745450142783414,
        0.022723844989269184,
        0.2417807251774506,
        1.2704582524523684,
        3.6478483247632045,
        5.769497221460691,
        4.630337846156546,
        1.4234371107496835,
    ),
    (
        1.0507500716444169e-09,
        0.0005475938084995345,
        0.015198666563616457,
        0.14810397642748008,
        0.6897673349851,
        1.6763848301838038,
        2.053191626637759,
        1.0,
    ),
)
