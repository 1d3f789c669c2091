"""Every code of every format, written from the definitions in plain Python.

Nothing here calls quantlab or JAX. `table(name)` lists the value of each code;
`nearest` is exhaustive search in exact arithmetic.
"""

import functools
import re
from fractions import Fraction

import ml_dtypes
import numpy as np

# (exponent bits, mantissa bits, bias)
MINIFLOATS = {
  'fp8_e4m3': (4, 3, 7),
  'fp8_e5m2': (5, 2, 15),
  'fp6_e3m2': (3, 2, 3),
  'fp6_e2m3': (2, 3, 1),
  'fp4_e2m1': (2, 1, 1),
}
DTYPES = {
  'fp8_e4m3': ml_dtypes.float8_e4m3fn,
  'fp8_e5m2': ml_dtypes.float8_e5m2,
  'fp6_e3m2': ml_dtypes.float6_e3m2fn,
  'fp6_e2m3': ml_dtypes.float6_e2m3fn,
  'fp4_e2m1': ml_dtypes.float4_e2m1fn,
}
MAXIMA = {
  'fp8_e4m3': 448.0,
  'fp8_e5m2': 57344.0,
  'fp6_e3m2': 28.0,
  'fp6_e2m3': 7.5,
  'fp4_e2m1': 6.0,
}
# As released with arXiv 2305.14314.
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)


def minifloat(code, ebits, mbits, bias):
  """Value of a code, special codes aside."""
  sign = -1.0 if code >> (ebits + mbits) else 1.0
  e = (code >> mbits) % 2**ebits
  m = code % 2**mbits
  if e == 0:
    return sign * m * 2.0 ** (1 - bias - mbits)
  return sign * (2**mbits + m) * 2.0 ** (e - bias - mbits)


def odd_bits(name):
  """Bits of a format of odd integers, or 0."""
  if name == 'binary':
    return 1
  found = re.fullmatch(r'odd_(\d+)', name)
  return int(found[1]) if found else 0


def dynamic(code, signed):
  """Value of a bit pattern of dynamic tree quantization, exactly.

  Bit by bit as drawn in arXiv 2110.02861, figure 2: a sign (signed) or a last
  bit that belongs to the fraction (unsigned), and seven bits of which the
  zeros in front count decades, the first one ends them, the rest is fraction.
  """
  bits = f'{code:08b}'
  sign = Fraction(-1 if signed and bits[0] == '1' else 1)
  tree, last = (bits[1:], '') if signed else (bits[:7], bits[7])
  if '1' not in tree:  # what would be -0, or a second 0, stands for 1
    return Fraction(1) if (bits[0] if signed else last) == '1' else Fraction(0)
  decades = tree.index('1')
  fraction = tree[decades + 1 :] + last
  parts = 2 ** len(fraction)
  middle = Fraction(int(fraction or '0', 2)) + Fraction(1, 2)
  inside = Fraction(1, 10) + Fraction(9, 10) * middle / parts
  return sign * inside / 10**decades


@functools.cache
def table(name):
  """Value of every code; NaN and infinities where the format has them."""
  if found := re.fullmatch(r'(u?)int(\d+)', name):
    bits = int(found[2])
    codes = np.arange(2**bits)
    if found[1]:
      return codes.astype(np.float64)
    return np.where(codes < 2 ** (bits - 1), codes, codes - 2.0**bits)
  if name == 'ternary':
    return np.array([0.0, 1.0, np.nan, -1.0])  # code 2 is unused
  if bits := odd_bits(name):
    return np.arange(1.0 - 2**bits, 2**bits, 2)
  if name == 'nf4':
    return np.asarray(NF4, np.float32).astype(np.float64)
  if name in ('dynamic8', 'udynamic8'):  # codes are numbered as values rise
    exact = sorted(dynamic(c, name == 'dynamic8') for c in range(256))
    return np.array([np.float32(float(v)) for v in exact], np.float64)
  if found := re.fullmatch(r'pow2_(\d+)', name):
    half = 2 ** (int(found[1]) - 1)
    positive = [0.0, *(2.0 ** (i - half + 1) for i in range(1, half))]
    return np.array(positive + [-v for v in positive])
  ebits, mbits, bias = MINIFLOATS[name]
  values = np.array(
    [minifloat(c, ebits, mbits, bias) for c in range(2 ** (1 + ebits + mbits))]
  )
  if name == 'fp8_e4m3':
    values[[0x7F, 0xFF]] = np.nan
  if name == 'fp8_e5m2':
    values[[0x7C, 0xFC]] = np.inf, -np.inf
    values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
  return values


def nearest(name, x):
  """Code of the value nearest to each x; a tie goes to the even code.

  Among codes of one value (0 and -0) the one with the sign of x is taken.
  Integers tie to the even integer, which is the even code. Powers of two have
  no even mantissa: halfway between two of them the larger one is taken.
  """
  values = table(name)
  usable = np.isfinite(values)
  x = np.asarray(x, np.float64)
  if odd_bits(name):  # halfway between two odd integers is an even one: up
    return np.searchsorted((values[1:] + values[:-1]) / 2, x, side='right')
  distance = np.abs(np.clip(x, -1e30, 1e30)[..., None] - values)
  distance = np.where(usable, distance, np.inf)
  least = distance.min(-1, keepdims=True)
  codes = np.arange(len(values))
  same_sign = np.signbit(values) == np.signbit(x)[..., None]
  # Rank the tied codes: the even one first, then the one of x's sign.
  even = codes % 2 == 0
  if name.startswith('pow2'):
    size, ax = np.abs(values), np.abs(x)[..., None]
    even = np.where(ax > size[size > 0].min(), size >= ax, size == 0)
  rank = np.where(even, 0, 2) + np.where(same_sign, 0, 1)
  rank = np.where(distance == least, rank, 9)
  return rank.argmin(-1)
