"""What a weight or an activation becomes, in a few lines of NumPy."""

import numpy as np

F32 = np.float32


def symmetric(x, axes, bits=8):
  """Integers with one scale over `axes`, back in float32.

  The scale is absmax / (2^(bits-1) - 1); ties go to even; x / s is
  x * (1 / s), as the library documents.
  """
  x = np.asarray(x, F32)
  top = 2 ** (bits - 1) - 1
  absmax = np.max(np.abs(x), axis=axes, keepdims=True)
  scale = np.where(absmax == 0, F32(1), absmax * F32(1 / F32(top)))
  codes = np.clip(np.rint(x * (F32(1) / scale)), -top - 1, top)
  return (codes * scale).astype(F32)


def fixed(x, lo, hi):
  """Signed 8-bit codes of the fixed range [lo, hi] with a zero point."""
  lo, hi = min(F32(lo), F32(0)), max(F32(hi), F32(0))
  scale = (F32(hi) - F32(lo)) * F32(1 / F32(255))
  zero = np.clip(np.rint(-lo * (F32(1) / scale)) - 128, -128, 127)
  x = np.asarray(x, F32)
  codes = np.clip(np.rint(x * (F32(1) / scale)) + zero, -128, 127)
  return ((codes - zero) * scale).astype(F32)


def error(got, want):
  """Relative error in the Euclidean norm."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.linalg.norm(got - want) / np.linalg.norm(want)
