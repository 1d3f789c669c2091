"""Dense storage of low-bit codes along the contraction axis.

The codes of one column, read along axis -2 (K), form one little-endian bit
stream: code i holds bits [i * bits, (i + 1) * bits) of the stream, and byte j
holds bits [8 j, 8 j + 8), lowest bit first. K is padded with zero codes to
whole units, where a unit is the least number of codes that fills whole bytes
for the dense widths (1, 2, 4, 8 and 16 bits) and eight codes otherwise:

  bits     1  2  3  4  5  6  7  8  16
  codes    8  4  8  2  8  8  8  1   1   in one unit
  bytes    1  1  3  1  5  6  7  1   2   of one unit

Everything is shifts and masks on whole arrays, so that it runs under jit,
vmap and scan, and leading axes are free.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt16

_DENSE_UNITS = {1: (8, 1), 2: (4, 1), 4: (2, 1), 8: (1, 1), 16: (1, 2)}


def _unit(bits: int) -> tuple[int, int]:
  """Returns (codes, bytes) of one packing unit."""
  if bits in _DENSE_UNITS:
    return _DENSE_UNITS[bits]
  if bits in (3, 5, 6, 7):
    return 8, bits
  raise ValueError(f'cannot pack {bits=}: expected 1 to 8, or 16')


def packed_rows(k: int, bits: int) -> int:
  """Returns Kp, the number of bytes that k codes of one column take."""
  codes, size = _unit(bits)
  return -(-k // codes) * size


def pack(
  q: UInt8[Array, '*b k n'] | UInt16[Array, '*b k n'], bits: int
) -> UInt8[Array, '*b kp n']:
  """Packs codes along axis -2 into bytes (see the module docstring).

  Args:
    q: codes, shape (..., K, N); uint8, or uint16 when bits is 16. Bits above
      the lowest `bits` are dropped, so that they cannot reach a neighbour.
    bits: width of one code, 1 to 8, or 16.

  Returns:
    uint8 array of shape (..., packed_rows(K, bits), N).
  """
  codes, size = _unit(bits)
  want = jnp.uint16 if bits == 16 else jnp.uint8
  if q.dtype != want:
    raise TypeError(
      f'pack(bits={bits}) takes {want.__name__} codes, found {q.dtype}; '
      f'reinterpret signed codes first: q.view({want.__name__})'
    )
  if q.ndim < 2:
    raise ValueError(f'pack takes codes of shape (..., K, N), found {q.shape=}')
  if bits == 8:
    return jnp.asarray(q)
  *lead, k, n = q.shape
  units = -(-k // codes)
  q = jnp.pad(q, [(0, 0)] * len(lead) + [(0, units * codes - k), (0, 0)])
  q = (q & want(2**bits - 1)).reshape(*lead, units, codes, n)
  out = []
  for j in range(size):
    byte = jnp.zeros((*lead, units, n), want)
    for i in range(codes):
      shift = i * bits - 8 * j  # where code i starts, seen from byte j
      if -bits < shift < 8:
        c = q[..., i, :]
        byte |= c << want(shift) if shift >= 0 else c >> want(-shift)
    out.append(byte.astype(jnp.uint8))
  return jnp.stack(out, axis=-2).reshape(*lead, units * size, n)


def unpack(
  p: UInt8[Array, '*b kp n'], bits: int, k: int
) -> UInt8[Array, '*b k n'] | UInt16[Array, '*b k n']:
  """Undoes `pack`.

  Args:
    p: packed bytes, shape (..., packed_rows(k, bits), N).
    bits: width of one code, 1 to 8, or 16.
    k: the true K, since packing rounds up.

  Returns:
    Codes of shape (..., k, N); uint16 when bits is 16, else uint8.
  """
  codes, size = _unit(bits)
  if p.dtype != jnp.uint8:
    raise TypeError(f'unpack takes uint8 bytes, found {p.dtype}')
  if p.ndim < 2 or p.shape[-2] != packed_rows(k, bits):
    raise ValueError(
      f'unpack({bits=}, {k=}) takes {packed_rows(k, bits)} bytes along axis '
      f'-2 of (..., Kp, N), found {p.shape=}'
    )
  if bits == 8:
    return jnp.asarray(p)
  *lead, kp, n = p.shape
  units = kp // size
  dtype = jnp.uint16 if bits == 16 else jnp.uint8
  p = p.reshape(*lead, units, size, n).astype(dtype)
  out = []
  for i in range(codes):
    code = jnp.zeros((*lead, units, n), dtype)
    for j in range(size):
      shift = i * bits - 8 * j
      if -bits < shift < 8:
        b = p[..., j, :]
        code |= b >> dtype(shift) if shift >= 0 else b << dtype(-shift)
    out.append(code & dtype(2**bits - 1))
  q = jnp.stack(out, axis=-2).reshape(*lead, units * codes, n)
  return q[..., :k, :]
