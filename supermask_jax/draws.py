"""From a key to numbers: draws that depend on no machine, backend, mesh or version of JAX.

A supermask network is its seed and one bit a weight, so the numbers that a seed stands for must never move. They are
defined here, and `docs/format.md` tells how to compute them without JAX:

- The generator is `threefry2x32` (Salmon et al. 2011, 20 rounds) in counter mode: element i of an array is the
  exclusive or of the two words that the cipher makes of the counter (0, i).
- `jax.random.bits` computes the same for a threefry2x32 key, as long as `jax_threefry_partitionable` is on and the
  default implementation is threefry2x32. These draws do not depend on such settings.
- Tests hold them to golden hashes; `docs/format.md` has the versions of JAX that passed, on x86-64 CPUs.
- `jax.random.normal` and `uniform(minval, maxval)` are not used: their last bit depends on the machine's code
  generation. Here bits become integers, and integers are scaled by one constant.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

Draw = Callable[[jax.Array, tuple[int, ...], np.float32], jax.Array]
"""draw(key, shape, scale) -> float32 of that shape."""

GENERATOR = "threefry2x32"


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [shape] uniform uint32.

    Args:
      key: a `jax.random.key`, or its data; of a key with more than two words, the first two count. Data of [2, *shape]
        is a key for each element.
      shape: of fewer than 2**32 elements.

    Raises:
      ValueError: the shape has 2**32 elements or more.
    """
    if math.prod(shape) >= 2**32:
        raise ValueError(f"cannot draw {math.prod(shape)} numbers at once: an array has fewer than 2**32 elements")
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    counter = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):  # the flat index, computed where each element lies
        counter += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(math.prod(shape[axis + 1 :]))
    first, second = (jnp.broadcast_to(words[i].astype(jnp.uint32), shape) for i in (0, 1))
    high, low = threefry2x32_p.bind(first, second, jnp.zeros_like(counter), counter)
    return high ^ low


def unit_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns [shape] float32 from U(0, 1): multiples of 2**-23, 0 included. `jax.random.uniform` draws the same."""
    return (bits(key, shape) >> 9).astype(jnp.float32) * np.float32(2.0**-23)


def symmetric_uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Returns [shape] float32 from U(-bound, bound): odd multiples of bound / 2**24."""
    return _odd_multiples(key, shape, np.float32(bound / 2**24))


# Compiled, so that a draw costs one compilation per shape and not one per operation.


@partial(jax.jit, static_argnums=1)
def _signed(key: jax.Array, shape: tuple[int, ...], scale: np.float32) -> jax.Array:
    return jnp.where(bits(key, shape) >> 31, scale, -scale)


@partial(jax.jit, static_argnums=1)
def _odd_multiples(key: jax.Array, shape: tuple[int, ...], unit: np.float32) -> jax.Array:
    odd = ((bits(key, shape) >> 8) << 1).astype(jnp.int32) + (1 - 2**24)
    return odd.astype(jnp.float32) * unit  # one rounding: there is no sum for a compiler to fuse it with


_bits = partial(jax.jit, static_argnums=1)(bits)


def _normal(key: jax.Array, shape: tuple[int, ...], scale: np.float32) -> jax.Array:
    words = _bits(key, shape)
    if isinstance(words, jax.core.Tracer):
        raise TypeError(
            "normals are drawn on the host: draw the weights outside of jit, or from a uniform or constants"
        )
    return jnp.asarray(standard_normal(np.asarray(words)) * scale)


DRAWS: Mapping[str, Draw] = {
    "full": lambda key, shape, scale: jnp.full(shape, scale),
    "sign": _signed,
    "normal": _normal,
    "uniform": lambda key, shape, scale: _odd_multiples(key, shape, np.float32(scale) / np.float32(2**24)),
}
"""{name: draw}: all scale; scale with a random sign; N(0, scale**2), on the host; U(-scale, scale)."""


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
