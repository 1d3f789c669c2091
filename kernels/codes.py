"""What a packed code means as an integer."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32, UInt8

from quantlab_kernels import packing


def to_int8(q: UInt8[Array, '...'], bits: int, signed: bool):
  """Returns the integers of unpacked codes, 8-bit unsigned ones less 128.

  Args:
    q: uint8 codes of 1 to 8 bits.
    bits: width of a code.
    signed: two's complement in the lowest bits, else plain.
  """
  if signed:
    shift = jnp.uint8(8 - bits)
    return lax.bitcast_convert_type(q << shift, jnp.int8) >> (8 - bits)
  if bits == 8:
    q = q ^ jnp.uint8(128)
  return lax.bitcast_convert_type(q, jnp.int8)


def offset(bits: int, signed: bool) -> int:
  """Returns what `to_int8` has subtracted."""
  return 128 if bits == 8 and not signed else 0


def largest(bits: int, signed: bool, zero: bool) -> int:
  """Returns a bound on |code - zero point|."""
  return 2**bits - 1 if zero or not signed else 2 ** (bits - 1)


def unpack_int8(
  p: UInt8[Array, 'kp n'], bits: int, k: int, signed: bool
) -> Int8[Array, 'k n']:
  """Returns the integers of packed codes, 8-bit unsigned ones less 128."""
  return to_int8(packing.unpack(p, bits, k), bits, signed)


def unpack_int32(
  p: UInt8[Array, 'kp n'], bits: int, k: int, signed: bool
) -> Int32[Array, 'k n']:
  """Returns the integers of packed codes, by arithmetic: the definition."""
  q = packing.unpack(p, bits, k).astype(jnp.int32)
  return jnp.where(q >= 2 ** (bits - 1), q - 2**bits, q) if signed else q
