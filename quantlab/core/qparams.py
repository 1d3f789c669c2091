"""Scales, zero points and tables, and how a range becomes them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantlab.core import scale_formats
from quantlab.core.quantizer import Quantizer
from quantlab.core.snap import Bounds
from quantlab.formats import base


class QParams(NamedTuple):
  """What turns codes into numbers, as float32 rounded to the stored format.

  With axis=-2 (weights, (loops..., K, N)): G groups along K, and Nb scales
  along N (N, 1 or N / bn). With axis=-1 (activations, (loops..., M, K)) the
  last two axes of every entry trade places.

  Attributes:
    scale: (loops..., G, Nb).
    zero_point: integers of the same shape; None when symmetric.
    scale2: (loops..., 1, 1), the second level over E4M3 scales.
    codebook: (loops..., 2^bits, Nb), learned tables in units of the scale.
  """

  scale: Array
  zero_point: Array | None = None
  scale2: Array | None = None
  codebook: Array | None = None

  @property
  def step(self) -> Array:
    """The factor of the code values, both levels multiplied."""
    return self.scale if self.scale2 is None else self.scale * self.scale2

  @property
  def inverse(self) -> Array:
    """1 / step; 0 for the E4M3 blocks whose scale rounds to zero."""
    if self.scale2 is None:
      return 1 / self.scale
    step = self.step
    dead = step == 0
    return jnp.where(dead, np.float32(0), 1 / jnp.where(dead, 1, step))


def from_range(
  lo: Float[Array, '*s'],
  hi: Float[Array, '*s'],
  quantizer: Quantizer,
  limits: Bounds,
  scale2: Array | None = None,
) -> QParams:
  """The parameters that map [lo, hi] onto the codes.

  Args:
    lo: lower ends, <= 0; not read when the quantizer is symmetric.
    hi: upper ends, >= 0; the largest magnitude when it is symmetric.
    quantizer: the quantizer.
    limits: smallest and largest code value (see `snap.bounds`).
    scale2: second level, if it is already settled.

  Returns:
    QParams of the shape of lo and hi.
  """
  q, (low, high) = quantizer, limits
  span, levels = (hi, high) if q.symmetric else (hi - lo, high - low)
  if q.scale_format == 'e4m3' and scale2 is None:
    scale2 = scale_formats.second_level(span, levels)
  scale = scale_formats.of_range(
    span, levels, q.scale_format, q.exponent, scale2
  )
  params = QParams(scale, scale2=scale2)
  if q.symmetric:
    return params
  z = base.nearest_even(-lo * params.inverse) + low
  z = jnp.clip(z, low, high)
  return params._replace(zero_point=z)
