"""Formats given by a table: NF4, dynamic, powers of two, learned codebooks."""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantlab.formats import base, minifloat


@dataclasses.dataclass(frozen=True)
class Codebook(base.Format):
  """Code i stands for entry i of a table in rising order.

  A fixed table belongs to the format. A learned one (`table` empty) belongs
  to the tensor: the quantizer hands it to every method as `table`, shape
  (2^bits, *broadcastable to x), entries in [-1, 1] (absmax scaling).

  Attributes:
    table: the entries in rising order; empty for a learned table.
  """

  table: tuple[float, ...] = ()

  @property
  def learned(self) -> bool:
    """Whether the table is fitted to each tensor."""
    return not self.table

  @property
  def max(self) -> float:
    return 1.0 if self.learned else self.table[-1]

  @property
  def min(self) -> float:
    return -1.0 if self.learned else self.table[0]

  @property
  def edge(self) -> float:
    # A learned table ends within [-1, 1], its largest gap is not known.
    return 1e-6 if self.learned else (self.table[-1] - self.table[-2]) / 2

  @property
  def has_zero(self) -> bool:
    return 0.0 in self.table

  def encode(
    self, x: Float[Array, '*s'], table: Array | None = None
  ) -> base.Codes:
    if table is None and self.bits > 4:
      # Bisection: 255 comparisons an element were 46 times slower on a CPU.
      cuts = jnp.asarray(_cuts(tuple(self._entries().tolist())))
      code = jnp.searchsorted(cuts, x, side='left', method='scan_unrolled')
      return code.astype(jnp.uint8)
    above = x[None] > self._thresholds(x, table)
    return jnp.sum(above, axis=0, dtype=jnp.uint8)

  def decode(
    self, codes: base.Codes, table: Array | None = None
  ) -> Float[Array, '*s']:
    if table is None:
      entries = jnp.asarray(self._entries())
      return entries.at[codes.astype(jnp.int32)].get(mode='clip')

    table = jnp.asarray(table)

    def pick(j, value):
      return jnp.where(codes == j.astype(codes.dtype), table[j], value)

    # A table for each column: selecting by passes broadcasts, a gather not.
    first = jnp.broadcast_to(table[0], codes.shape)
    return lax.fori_loop(1, 2**self.bits, pick, first)

  def round(
    self, x: Float[Array, '*s'], table: Array | None = None
  ) -> Float[Array, '*s']:
    return jnp.where(jnp.isnan(x), x, self.decode(self.encode(x, table), table))

  def stochastic_round(
    self, key: Array, x: Float[Array, '*s'], table: Array | None = None
  ) -> Float[Array, '*s']:
    entries = self._column(x) if table is None else table
    x = jnp.clip(x, entries[0], entries[-1])
    low = jnp.sum(x[None] >= entries[1:-1], axis=0, dtype=jnp.uint8)
    a, b = self.decode(low, table), self.decode(low + np.uint8(1), table)
    u = jax.random.uniform(key, x.shape, jnp.float32)
    value = jnp.where(u * (b - a) < x - a, b, a)
    return jnp.where(jnp.isnan(x), x, value)

  def _entries(self) -> np.ndarray:
    if self.learned:
      raise ValueError(
        f'{self.name} has no table of its own: pass table=, or quantize with '
        'qparams from fit(), which learns one'
      )
    return np.asarray(self.table, np.float32)

  def _column(self, x: Array) -> np.ndarray:
    return self._entries().reshape((-1,) + (1,) * x.ndim)

  def _thresholds(self, x: Array, table: Array | None) -> Array | np.ndarray:
    if table is None:
      cut = _cuts(tuple(self._entries().tolist()))
      return cut.reshape((-1,) + (1,) * x.ndim)
    return np.float32(0.5) * table[:-1] + np.float32(0.5) * table[1:]


def _cuts(table: tuple[float, ...]) -> np.ndarray:
  """Thresholds t with code = number of t below x: nearest, ties to even code.

  A midpoint of two float32 entries is exact in float64. The float32 threshold
  is the largest number that must still take the lower code.
  """
  t = np.asarray(table, np.float64)
  mid = (t[:-1] + t[1:]) / 2
  cut = mid.astype(np.float32)
  below = np.nextafter(cut, np.float32(-np.inf))
  cut = np.where(cut > mid, below, cut)
  # On an exact tie an odd lower code gives way to the even one above it.
  tie_up = (cut == mid) & (np.arange(len(mid)) % 2 == 1)
  return np.where(tie_up, below, cut)


def _normal_float_4() -> tuple[float, ...]:
  """NF4: quantiles of the normal law, zero included, scaled to [-1, 1].

  Eight positive and seven negative quantiles, evenly spaced in probability
  from 1/2 to the offset (1 - 1/32 + 1 - 1/30) / 2.

  References:
    QLoRA, arXiv 2305.14314, section 3 and appendix E.
  """
  ppf = statistics.NormalDist().inv_cdf
  positive = [ppf(float(p)) for p in _spaced(9)]
  negative = [-ppf(float(p)) for p in _spaced(8)]
  table = np.asarray(sorted([*negative, 0.0, *positive]), np.float32)
  return tuple(float(v) for v in table / table.max())


def _spaced(n: int) -> np.ndarray:
  """The n - 1 probabilities from the offset to 1/2, without the latter.

  In float32 and from both ends, like the released table: computed in double
  precision, six of the sixteen entries would differ in the last bit.
  """
  a, b = np.float32(0.9677083), np.float32(0.5)
  step = (b - a) / np.float32(n - 1)
  i = np.arange(n - 1, dtype=np.float32)
  return np.where(i < n // 2, a + step * i, b - step * (np.float32(n - 1) - i))


def _dynamic(signed: bool) -> tuple[float, ...]:
  """Dynamic tree quantization: a decimal exponent, then a linear fraction.

  Leading zeros count decades below one, the bits after the first one are a
  fraction that divides [0.1, 1] evenly; a value is the middle of its part.
  The unsigned type spends the sign bit on a further bit of fraction. The two
  patterns left over stand for 0 and 1, so that the largest magnitude of a
  block is exact.

  References:
    8-bit optimizers, arXiv 2110.02861, sections 1.3 and 2.2.
  """
  positive = []
  for decade in range(7):
    n = 2 ** (6 - decade + (not signed))
    middle = 0.1 + 0.9 * (np.arange(n) + 0.5) / n
    positive += list(middle / 10.0**decade)
  negative = [-v for v in positive] if signed else []
  table = np.asarray(sorted([*negative, 0.0, *positive, 1.0]), np.float32)
  return tuple(table.tolist())


def pow2(bits: int = 4) -> minifloat.Minifloat:
  """Signed powers of two and zero: {0, +-2^-(2^(b-1) - 2), .., +-1/2, +-1}.

  A minifloat without mantissa: the sign bit, then 0 for zero or the exponent
  counted up to 1. The code of -0 is the one left over. A value halfway
  between two powers goes to the larger one.

  References:
    Additive powers of two, arXiv 1909.13144, equation 3.
  """
  if bits not in range(2, 8):
    raise ValueError(f'pow2 takes 2 to 7 bits, found {bits=}')
  e = bits - 1
  return minifloat.Minifloat(f'pow2_{bits}', bits, e, 0, 2**e - 1, 1.0)


def codebook(bits: int = 4) -> Codebook:
  """A table of 2^bits entries learned for each tensor or channel."""
  if bits not in range(1, 9):
    raise ValueError(f'codebook takes 1 to 8 bits, found {bits=}')
  return Codebook(f'codebook_{bits}', bits)


NF4 = base.register(Codebook('nf4', 4, _normal_float_4()))
DYNAMIC8 = base.register(Codebook('dynamic8', 8, _dynamic(signed=True)))
UDYNAMIC8 = base.register(Codebook('udynamic8', 8, _dynamic(signed=False)))
for _bits in range(1, 9):
  base.register(codebook(_bits))
for _bits in range(2, 8):
  base.register(pow2(_bits))
