"""What a scale may be: float32, bfloat16, a power of two, E8M0, E4M3.

`of_range` computes scales that are already rounded to their format, as
float32; `store` and `load` turn them into the dtype they are kept in and back,
without loss.

  name      stored as      values
  float32   float32        any
  bfloat16  bfloat16       8 bits of mantissa
  pow2      int8           2^e, e in [-126, 127]
  e8m0      uint8          2^(c - 127), c in [1, 254] (OCP MX; 0 and NaN unused)
  e4m3      float8_e4m3fn  0 .. 448, times a float32 for the whole tensor

References:
  OCP microscaling formats (MX) specification, version 1.0, section 6.3.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantlab.formats import base, minifloat

NAMES = ('float32', 'bfloat16', 'pow2', 'e8m0', 'e4m3')
EXPONENT_RULES = ('floor', 'ceil', 'nearest')

# Smallest normal float32: XLA flushes what lies below to zero.
TINY = np.float32(2.0**-126)


def of_range(
  span: Float[Array, '*s'],
  levels: float | Array,
  name: str,
  exponent: str,
  scale2: Float[Array, '*t'] | None = None,
) -> Float[Array, '*s']:
  """The scale that maps `span` onto `levels`, rounded to its format.

  Args:
    span: width of the range, >= 0: the largest magnitude, or hi - lo.
    levels: width of the codes: the largest value, or largest - smallest.
    name: one of `NAMES`.
    exponent: how powers of two are chosen: 'floor' is the OCP rule
      2^(floor(log2 span) - floor(log2 levels)), 'ceil' the smallest that
      clips nothing, 'nearest' the nearest exponent.
    scale2: the second level of 'e4m3' (see `second_level`).

  Returns:
    s of the shape of span. Where span is zero: the smallest normal float32, or
    power of two, or 0 for 'e4m3'.
  """
  if name in ('pow2', 'e8m0'):
    return _power_of_two(span, levels, exponent)
  s = span * _reciprocal(levels)
  if name == 'e4m3':
    if scale2 is None:
      raise ValueError("'e4m3' scales need scale2: see second_level()")
    return minifloat.FP8_E4M3.round(s * (1 / scale2))
  if name == 'bfloat16':
    # Not two casts: XLA may drop the pair as excess precision.
    s = lax.reduce_precision(s, exponent_bits=8, mantissa_bits=7)
  return jnp.maximum(s, TINY)


def second_level(
  span: Float[Array, '*s'], levels: float | Array
) -> Float[Array, '*s 1 1']:
  """The float32 scale over E4M3 scales: max(span) / (448 levels).

  Args:
    span: width of the range of each unit, (loops..., count0, count1).
    levels: as in `of_range`.

  Returns:
    One number for each pair of trailing axes, (loops..., 1, 1).
  """
  top = jnp.max(span, axis=(-2, -1), keepdims=True, initial=0)
  g = top * _reciprocal(levels * 448.0)
  return jnp.where(top == 0, np.float32(1), jnp.maximum(g, TINY))


def store(s: Float[Array, '*s'], name: str, offset: int = 0) -> Array:
  """Scales as they are kept; `offset` is added to an E8M0 exponent."""
  if name == 'pow2':
    return base.exponent_of(s).astype(jnp.int8)
  if name == 'e8m0':
    return (base.exponent_of(s) + (127 + offset)).astype(jnp.uint8)
  return s.astype(storage_dtype(name))


def load(stored: Array, name: str, offset: int = 0) -> Float[Array, '*s']:
  """Undoes `store`, exactly; also reads E8M0 code 0 of other encoders."""
  if name == 'pow2':
    return base.exact_exp2(stored)
  if name == 'e8m0':
    e = stored.astype(jnp.int32) - (127 + offset)
    # Below 2^-126 a product with any element is flushed to zero anyway.
    return base.exact_exp2(jnp.maximum(e, -126))
  return stored.astype(jnp.float32)


def storage_dtype(name: str) -> np.dtype:
  """Type in which scales of this format are kept."""
  return jnp.dtype(
    {
      'float32': jnp.float32,
      'bfloat16': jnp.bfloat16,
      'pow2': jnp.int8,
      'e8m0': jnp.uint8,
      'e4m3': jnp.float8_e4m3fn,
    }[name]
  )


def _reciprocal(levels: float | Array) -> np.float32 | Array:
  """1 / levels in float32, the same whether levels is traced or not.

  Every division by a scale or by a number of levels is a multiplication by
  its reciprocal: XLA makes that change by itself in some programs (wherever
  the divisor is broadcast) and not in others, and results would depend on
  what surrounds them.
  """
  if isinstance(levels, (int, float)):
    return np.float32(1) / np.float32(levels)
  return 1 / levels


def _power_of_two(span: Array, levels: float | Array, exponent: str) -> Array:
  """Power-of-two scale by exponent arithmetic alone (no log2, no exp2)."""
  n, j = _mantissa_exponent(levels)
  # span = m 2^i and levels = n 2^j with m, n in [1, 2): log2 of their ratio
  # is i - j + log2(m / n), the last between -1 and 1.
  e = base.exponent_of(span) - j
  if exponent != 'floor':
    m = base.mantissa_of(span)
    if exponent == 'ceil':
      e += (m > n).astype(jnp.int32)
    else:
      root = np.float32(math.sqrt(2))
      e += (m > n * root).astype(jnp.int32)
      e -= (m * root < n).astype(jnp.int32)
  return base.exact_exp2(jnp.clip(e, -126, 127))


def _mantissa_exponent(levels: float | Array) -> tuple[Any, Any]:
  """(n, j) with levels = n 2^j and n in [1, 2)."""
  if isinstance(levels, (int, float)):
    half, j = math.frexp(levels)
    return np.float32(2 * half), j - 1
  return base.mantissa_of(levels), base.exponent_of(levels)
