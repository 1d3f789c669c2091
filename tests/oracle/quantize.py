"""Quantization of a matrix in NumPy, unit by unit, in plain loops.

Written from ptq.md (F1 to F5) independently of quantlab: units are Python
slices, values are looked up by exhaustive search over the code table, and
arithmetic that must agree in the last bit is float32 in the stated order:
x / s is x * (1 / s).
"""

import math

import numpy as np
from oracle import formats

F32 = np.float32
TINY = F32(2.0**-126)


def rectangles(k, n, per=None, group=None, block=None):
  """Slices of every unit as a (G, Nb) nested list, last ones shorter."""
  if group is not None:
    rows, cols = group, 1
  elif block is not None:
    rows, cols = block
  elif per in ('tensor', 'head'):
    rows, cols = k, n
  else:
    rows, cols = k, 1
  return [
    [
      (slice(i, min(i + rows, k)), slice(j, min(j + cols, n)))
      for j in range(0, n, cols)
    ]
    for i in range(0, k, rows)
  ]


def reciprocal(v):
  return F32(1) / F32(v)


def power_of_two(span, levels, rule):
  """2^e by the exponent rule, from exact binary fractions."""
  if span == 0:
    return F32(2.0**-126)
  m, i = math.frexp(float(span))
  n, j = math.frexp(float(levels))
  e = i - j
  if rule == 'ceil':
    e += m > n
  if rule == 'nearest':
    e = round(math.log2(float(span)) - math.log2(float(levels)))
  return F32(2.0 ** min(max(e, -126), 127))


def bfloat16(s):
  """Round to nearest even at 8 significant bits."""
  m, e = math.frexp(float(s))
  return F32(math.ldexp(np.round(m * 256), e - 8))


def e4m3(s):
  code = formats.nearest('fp8_e4m3', np.asarray(s, np.float64))
  return F32(formats.table('fp8_e4m3')[code])


def scale_of(span, levels, scale_format, exponent, second):
  """One scale from the width of its range."""
  if scale_format in ('pow2', 'e8m0'):
    return power_of_two(span, levels, exponent)
  s = F32(span) * reciprocal(levels)
  if scale_format == 'e4m3':
    return e4m3(s * (F32(1) / second))
  if scale_format == 'bfloat16':
    s = bfloat16(s)
  return max(s, TINY)


def code_range(name, narrow):
  values = formats.table(name)
  values = values[np.isfinite(values)]
  lo, hi = values.min(), values.max()
  return (-hi if narrow else lo), hi


def fit(
  w,
  name,
  *,
  symmetric=True,
  narrow=False,
  scale_format='float32',
  exponent='ceil',
  ratio=None,
  **granularity,
):
  """(scale, zero point, second level) for absmax or minmax ranges.

  Args:
    w: (K, N) float32.
    name: the format.
    ratio: (G, Nb) factors on the ranges; 1 by default.
    **granularity: per, group or block.

  Returns:
    scale (G, Nb) float32, zero (G, Nb) float32 or None, second level or None.
  """
  units = rectangles(*w.shape, **granularity)
  lo_code, hi_code = code_range(name, narrow)
  levels = hi_code if symmetric else hi_code - lo_code
  shape = len(units), len(units[0])
  lo, hi = np.zeros(shape, F32), np.zeros(shape, F32)
  for i, row in enumerate(units):
    for j, unit in enumerate(row):
      part = w[unit]
      if symmetric and lo_code == 0:
        part = np.maximum(part, 0)
      hi[i, j] = np.abs(part).max() if symmetric else max(part.max(), 0)
      lo[i, j] = min(part.min(), 0)
  span = hi if symmetric else hi - lo
  second = None
  if scale_format == 'e4m3':
    top = span.max()
    second = max(top * reciprocal(levels * 448), TINY) if top > 0 else F32(1)
  if ratio is not None:
    lo, hi = lo * ratio, hi * ratio
    span = hi if symmetric else hi - lo
  scale = np.array(
    [
      [scale_of(s, levels, scale_format, exponent, second) for s in row]
      for row in span
    ],
    F32,
  )
  zero = None
  if not symmetric:
    z = np.round(-lo * (F32(1) / scale)) + F32(lo_code)
    zero = np.clip(z, lo_code, hi_code).astype(F32)
  return scale, zero, second


def codes_of(
  w, name, scale, zero=None, second=None, narrow=False, **granularity
):
  """Codes (K, N) by exhaustive search."""
  out = np.zeros(w.shape, np.int64)
  lo, hi = code_range(name, narrow)
  for i, row in enumerate(rectangles(*w.shape, **granularity)):
    for j, unit in enumerate(row):
      step = scale[i, j] if second is None else scale[i, j] * second
      y = w[unit] * (F32(1) / step) if step > 0 else w[unit] * F32(0)
      if zero is not None:
        y = np.round(y) + zero[i, j]
      out[unit] = formats.nearest(name, np.clip(y, lo, hi))
  return out


def values_of(codes, name, scale, zero=None, second=None, **granularity):
  """Numbers (K, N) float32 that codes stand for."""
  table = formats.table(name).astype(F32)
  out = np.zeros(codes.shape, F32)
  for i, row in enumerate(rectangles(*codes.shape, **granularity)):
    for j, unit in enumerate(row):
      step = scale[i, j] if second is None else scale[i, j] * second
      q = table[codes[unit]]
      if zero is not None:
        q = q - zero[i, j]
      out[unit] = q * step
  return out
