"""Integer formats, signed (two's complement) and unsigned."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from quantlab.formats import base


@dataclasses.dataclass(frozen=True)
class Integer(base.Format):
  """Integers of b bits: round half to even, saturate.

  Signed codes are the low b bits of two's complement, unsigned ones plain.

  Attributes:
    unsigned: values 0 .. 2^b - 1 instead of -2^(b-1) .. 2^(b-1) - 1.
    narrow: the lowest signed code is left unused, so that the values are
      symmetric: -(2^(b-1) - 1) .. 2^(b-1) - 1.
  """

  unsigned: bool = False
  narrow: bool = False

  @property
  def max(self) -> float:
    return float(2 ** (self.bits - (not self.unsigned)) - 1)

  @property
  def min(self) -> float:
    return 0.0 if self.unsigned else -self.max - (not self.narrow)

  @property
  def is_integer(self) -> bool:
    return True

  @property
  def edge(self) -> float:
    return 0.5

  @property
  def stored_dtype(self) -> type:
    # Operands of a product as they are: a view would be a copy in each call.
    return jnp.int8 if self.signed and self.bits == 8 else jnp.uint8

  def round(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    return positive_zero(base.nearest_even(base.clamp(self.min, x, self.max)))

  def stochastic_round(
    self, key: Array, x: Float[Array, '*s']
  ) -> Float[Array, '*s']:
    x = base.clamp(self.min, x, self.max)
    return positive_zero(base.stochastic_floor(key, x))

  def encode(self, x: Float[Array, '*s']) -> base.Codes:
    q = base.nearest_even(base.clamp(self.min, x, self.max))
    if self.unsigned:
      return q.astype(self.code_dtype)
    wide = jnp.int16 if self.bits > 8 else jnp.int8
    q = lax.bitcast_convert_type(q.astype(wide), self.code_dtype)
    whole = jnp.iinfo(wide).bits == self.bits
    return q if whole else q & q.dtype.type(2**self.bits - 1)

  def decode(self, codes: base.Codes) -> Float[Array, '*s']:
    if self.unsigned:
      return codes.astype(jnp.float32)
    if self.bits <= 8:
      return self.to_int8(codes).astype(jnp.float32)
    return sign_extend(codes, self.bits, jnp.int16).astype(jnp.float32)

  def to_int8(self, codes: base.Codes) -> Int8[Array, '*s']:
    if self.max > 127:
      raise TypeError(
        f'{self.name} reaches {self.max:.0f} and does not fit int8; use '
        'int8(symmetric=False), whose codes are signed'
      )
    if self.unsigned:
      return codes.astype(jnp.int8)
    return sign_extend(codes, self.bits, jnp.int8)


def sign_extend(codes: Array, bits: int, dtype: type) -> Array:
  """Two's complement codes of `bits` bits as integers of `dtype`."""
  wide = jnp.iinfo(dtype).bits
  shift = wide - bits
  if not shift:
    return lax.bitcast_convert_type(codes, dtype)
  q = lax.bitcast_convert_type(codes << codes.dtype.type(shift), dtype)
  return q >> q.dtype.type(shift)


def positive_zero(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """Turns -0.0 into 0.0: two's complement has one zero."""
  return lax.select(x == 0, jnp.zeros_like(x), x)


INT2, INT3, INT4, INT5, INT6, INT7, INT8, INT16 = (
  base.register(Integer(f'int{b}', b)) for b in (2, 3, 4, 5, 6, 7, 8, 16)
)
UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (
  base.register(Integer(f'uint{b}', b, unsigned=True)) for b in range(2, 9)
)
