"""How many weights a density keeps. Host arithmetic, exact; no JAX."""

import math
from fractions import Fraction


def keep_count(density, n: int) -> int:
    """Number of weights kept of `n` at `density`: ceil(density * n), exactly.

    The density is taken as the decimal that is written: 0.1 is one tenth, not the binary float next to it,
    so 0.1 of 30 is 3. This is the only place where a density becomes a count. Published codes differ from it:
    hidden-networks keeps n - int((1 - k) * n), which equals ceil(k * n) up to floating-point slips.

    Args:
      density: fraction kept, in [0, 1]; a number or a fractions.Fraction.
      n: number of weights, >= 0.

    Raises:
      ValueError: density is not a number in [0, 1], or n is not a whole number >= 0.
    """
    if int(n) != n or n < 0:
        raise ValueError(f"the number of weights must be a whole number >= 0, got {n}")
    return math.ceil(exact(density) * int(n))


def exact(density) -> Fraction:
    """The density as an exact fraction of its decimal form; ValueError outside [0, 1]."""
    try:
        value = Fraction(str(density))  # str gives the shortest decimal, also of NumPy and JAX scalars
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"density must be a number in [0, 1] (the fraction kept), got {density!r}")
    return value
