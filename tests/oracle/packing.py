"""Bit packing, one bit at a time, in NumPy."""

import numpy as np


def packed_rows(k, bits):
  """Bytes of k codes: whole units of eight codes unless dense in one byte."""
  unit = {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}.get(bits, 8)
  padded = k
  while padded % unit:
    padded += 1
  return padded * bits // 8


def pack(q, bits):
  """Writes bit b of code i at stream position i * bits + b."""
  q = np.asarray(q)
  *lead, k, n = q.shape
  stream = np.zeros((*lead, 8 * packed_rows(k, bits), n), np.uint8)
  for i in range(k):
    for b in range(bits):
      bit = (q[..., i, :].astype(np.int64) // 2**b) % 2
      stream[..., i * bits + b, :] = bit
  out = np.packbits(
    stream.reshape(*lead, packed_rows(k, bits), 8, n),
    axis=-2,
    bitorder='little',
  )
  return out[..., 0, :]


def unpack(p, bits, k):
  """Reads bit b of code i at stream position i * bits + b."""
  p = np.asarray(p)
  *lead, _, n = p.shape
  stream = np.unpackbits(p, axis=-2, bitorder='little').astype(np.int64)
  out = np.zeros((*lead, k, n), np.int64)
  for i in range(k):
    for b in range(bits):
      out[..., i, :] += stream[..., i * bits + b, :] * 2**b
  return out


def panels(w):
  """int8 or uint8 (K, N) as the cpu kernels read it: (panels, words, 256)."""
  k, n = w.shape
  more = 128 if w.dtype == np.int8 else 0
  out = np.full((-(-n // 64), -(-k // 4), 256), more, np.uint8)
  for row in range(k):
    for column in range(n):
      p, c = divmod(column, 64)
      lane, c = divmod(c, 16)
      vector, c = divmod(c, 4)
      at = 64 * vector + 16 * lane + 4 * c + row % 4
      out[p, row // 4, at] = int(w[row, column]) + more
  return out
