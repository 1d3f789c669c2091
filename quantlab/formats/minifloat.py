"""Small floating-point formats ExMy (sign, exponent, mantissa).

  value = (-1)^S 2^(E - bias) (1 + m / 2^M)   for E > 0
          (-1)^S 2^(1 - bias) m / 2^M          for E = 0 (subnormals)

References:
  OCP 8-bit floating point specification (OFP8), revision 1.0.
  OCP microscaling formats (MX) specification, version 1.0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantlab.formats import base


@dataclasses.dataclass(frozen=True)
class Minifloat(base.Format):
  """A sign bit, `ebits` of exponent, `mbits` of mantissa; saturating.

  Rounding is to nearest, ties to the even code, and always saturates: a cast
  to float8_e4m3fn would give NaN above 464, a cast to float8_e5m2 infinity.
  -0 is a code of its own, and a small negative value rounds to it.

  Attributes:
    ebits: exponent bits.
    mbits: mantissa bits (0: powers of two and zero).
    bias: exponent bias.
    largest: largest finite value, below what the fields could hold where
      the format keeps codes for NaN and infinity.
    nan_code: code that NaN takes, where there is one.
    native: the dtype with the same bit patterns, where decoding by it is
      exact on every backend (the FP6 and FP4 conversions are not on CPU).
  """

  ebits: int = 0
  mbits: int = 0
  bias: int = 0
  largest: float = 0.0
  nan_code: int | None = None
  native: str | None = None

  @property
  def max(self) -> float:
    return self.largest

  @property
  def min(self) -> float:
    return -self.largest

  @property
  def edge(self) -> float:
    return 2.0 ** (self.emax - self.mbits - 1)

  def _step(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    """Distance of representable values around x, 2^(max(e, 1-bias) - M)."""
    power = base.power_of_two_below(x)
    least = np.float32(2.0 ** (1 - self.bias))
    return lax.max(power, least) * np.float32(2.0**-self.mbits)

  def round(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    x = base.clamp(self.min, x, self.max)
    step = self._step(x)
    inverse = base.reciprocal_of_power(step)
    return base.nearest_even(x * inverse) * step  # both exact: step is 2^e

  def stochastic_round(
    self, key: Array, x: Float[Array, '*s']
  ) -> Float[Array, '*s']:
    x = base.clamp(self.min, x, self.max)
    step = self._step(x)
    # The neighbour away from zero may open the next binade: representable.
    inverse = base.reciprocal_of_power(step)
    up = base.stochastic_floor(key, jnp.abs(x) * inverse) * step
    return lax.select(jnp.signbit(x), -up, up)

  def encode(self, x: Float[Array, '*s']) -> base.Codes:
    c = base.clamp(self.min, x, self.max)
    step = self._step(c)
    inverse = base.reciprocal_of_power(step)
    m = base.nearest_even(jnp.abs(c) * inverse).astype(jnp.int32)
    # m carries the hidden bit, which is what adds one to the exponent field;
    # a mantissa rounded up to 2^(M+1) carries into it once more.
    e = base.exponent_of(step) + (self.mbits + self.bias - 1)
    code = (e << self.mbits) + m
    code |= jnp.signbit(c).astype(jnp.int32) << (self.ebits + self.mbits)
    if self.nan_code is not None:
      code = jnp.where(jnp.isnan(x), self.nan_code, code)
    return code.astype(self.code_dtype)

  def decode(self, codes: base.Codes) -> Float[Array, '*s']:
    if self.native is not None:
      dtype = jnp.dtype(self.native)
      return lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)
    c = codes.astype(jnp.int32)
    e = (c >> self.mbits) & (2**self.ebits - 1)
    m = c & (2**self.mbits - 1)
    m = m + (jnp.minimum(e, 1) << self.mbits)
    step = base.exact_exp2(jnp.maximum(e, 1) - (self.bias + self.mbits))
    value = m.astype(jnp.float32) * step
    negative = (c >> (self.ebits + self.mbits)) != 0
    return lax.select(negative, -value, value)


FP8_E4M3 = base.register(
  Minifloat('fp8_e4m3', 8, 4, 3, 7, 448.0, 0x7F, 'float8_e4m3fn')
)
FP8_E5M2 = base.register(
  Minifloat('fp8_e5m2', 8, 5, 2, 15, 57344.0, 0x7F, 'float8_e5m2')
)
FP6_E3M2 = base.register(Minifloat('fp6_e3m2', 6, 3, 2, 3, 28.0))
FP6_E2M3 = base.register(Minifloat('fp6_e2m3', 6, 2, 3, 1, 7.5))
FP4_E2M1 = base.register(Minifloat('fp4_e2m1', 4, 2, 1, 1, 6.0))
