"""Ternary {-1, 0, 1} and binary {-1, 1} weights.

References:
  BitNet b1.58, arXiv 2402.17764 (ternary); BitNet, arXiv 2310.11453 (binary).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from quantlab.formats import base, integer


@dataclasses.dataclass(frozen=True)
class Binary(base.Format):
  """-1 (code 0) and +1 (code 1). It has no zero: zero rounds to +1."""

  @property
  def max(self) -> float:
    return 1.0

  @property
  def min(self) -> float:
    return -1.0

  @property
  def is_integer(self) -> bool:
    return True

  @property
  def has_zero(self) -> bool:
    return False

  def round(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    sign = jnp.where(x >= 0, np.float32(1), np.float32(-1))
    return lax.select(jnp.isnan(x), x, sign)

  def stochastic_round(
    self, key: Array, x: Float[Array, '*s']
  ) -> Float[Array, '*s']:
    x = base.clamp(-1.0, x, 1.0)
    u = jax.random.uniform(key, x.shape, jnp.float32)
    sign = jnp.where(2 * u - 1 < x, np.float32(1), np.float32(-1))
    return lax.select(jnp.isnan(x), x, sign)

  def encode(self, x: Float[Array, '*s']) -> base.Codes:
    return (x >= 0).astype(jnp.uint8)

  def decode(self, codes: base.Codes) -> Float[Array, '*s']:
    return self.to_int8(codes).astype(jnp.float32)

  def to_int8(self, codes: base.Codes) -> Int8[Array, '*s']:
    return codes.astype(jnp.int8) * np.int8(2) - np.int8(1)


# Two's complement in two bits: -1 is code 3, and code 2 is unused.
TERNARY = base.register(integer.Integer('ternary', 2, narrow=True))
BINARY = base.register(Binary('binary', 1))
