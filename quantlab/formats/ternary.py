"""Ternary {-1, 0, 1}, binary {-1, 1}, and odd integers of more bits.

References:
  BitNet b1.58, arXiv 2402.17764 (ternary); BitNet, arXiv 2310.11453 (binary);
  DoReFa-Net, arXiv 1606.06160, equation 9 (odd integers, up to a factor).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from quantlab.formats import base, integer


@dataclasses.dataclass(frozen=True)
class Odd(base.Format):
  """2 c - (2^b - 1) for codes c: the odd integers -(2^b - 1) .. 2^b - 1.

  All 2^b codes in a symmetric range, without a zero; zero rounds to 1. One bit
  is binary.
  """

  @property
  def max(self) -> float:
    return float(2**self.bits - 1)

  @property
  def min(self) -> float:
    return -self.max

  @property
  def is_integer(self) -> bool:
    return True

  @property
  def has_zero(self) -> bool:
    return False

  @property
  def edge(self) -> float:
    # The straight-through gradient of sign(x) ends at 1 (arXiv 1602.02830).
    return 0.0 if self.bits == 1 else 1.0

  def round(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    value = 2 * self._code(x) - np.float32(self.max)
    return lax.select(jnp.isnan(x), x, value)

  def stochastic_round(
    self, key: Array, x: Float[Array, '*s']
  ) -> Float[Array, '*s']:
    x = base.clamp(self.min, x, self.max)
    code = base.stochastic_floor(key, (x + np.float32(self.max)) / 2)
    value = 2 * code - np.float32(self.max)
    return lax.select(jnp.isnan(x), x, value)

  def encode(self, x: Float[Array, '*s']) -> base.Codes:
    return self._code(x).astype(jnp.uint8)

  def _code(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    # The odd integers are 2 n + 1; clipped first, so that nothing overflows.
    half = jnp.floor(base.clamp(self.min, x, self.max) / 2)
    top = np.float32(2 ** (self.bits - 1))
    return base.clamp(0.0, half + top, self.max)

  def decode(self, codes: base.Codes) -> Float[Array, '*s']:
    return self.to_int8(codes).astype(jnp.float32)

  def to_int8(self, codes: base.Codes) -> Int8[Array, '*s']:
    top = np.int16(2**self.bits - 1)
    return (codes.astype(jnp.int16) * np.int16(2) - top).astype(jnp.int8)


def odd(bits: int = 2) -> Odd:
  """Odd integers of 2 to 7 bits."""
  if bits not in range(2, 8):
    raise ValueError(f'odd takes 2 to 7 bits, found {bits=}; 1 bit is binary')
  return Odd(f'odd_{bits}', bits)


# Two's complement in two bits: -1 is code 3, and code 2 is unused.
TERNARY = base.register(integer.Integer('ternary', 2, narrow=True))
BINARY = base.register(Odd('binary', 1))
for _bits in range(2, 8):
  base.register(odd(_bits))
