"""Range rules: which interval a quantizer's codes should cover.

A rule turns the elements of each unit into an interval [lo, hi]. Symmetric
quantizers use hi = -lo. Rules are frozen values that compare, hash and turn
into JSON; `repr` is the call that makes them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantlab.core.units import Units


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
  """How the range of a unit is found.

  Attributes:
    sided: whether lo and hi are found separately, as asymmetric ranges need.
    direct: whether the rule sets the scale itself rather than a range
      (the formats of {-1, 0, 1}, for which the two are the same).
  """

  sided: ClassVar[bool] = True
  direct: ClassVar[bool] = False

  def range(
    self, x: Float[Array, '*s'], units: Units, symmetric: bool
  ) -> tuple[Array, Array]:
    """Range of every unit.

    Args:
      x: split array (see `Units.split`), padded with zeros.
      units: which axes one unit spans.
      symmetric: whether hi = -lo is wanted.

    Returns:
      (lo, hi), each of shape (loops..., count0, count1), lo <= 0 <= hi.
    """
    raise NotImplementedError

  def to_json(self) -> dict[str, Any]:
    """The rule as plain JSON values."""
    return {'rule': type(self).__name__, **dataclasses.asdict(self)}

  def __repr__(self) -> str:
    args = [
      f'{f.name}={getattr(self, f.name)!r}'
      for f in dataclasses.fields(self)
      if getattr(self, f.name) != f.default
    ]
    return f'{type(self).__name__}({", ".join(args)})'


@dataclasses.dataclass(frozen=True, repr=False)
class absmax(Rule):
  """The largest magnitude: nothing is clipped."""

  sided: ClassVar[bool] = False

  def range(self, x, units, symmetric):
    hi = units.squeeze(jnp.max(jnp.abs(x), axis=units.reduce, keepdims=True))
    return -hi, hi


@dataclasses.dataclass(frozen=True, repr=False)
class minmax(Rule):
  """From the smallest to the largest value, zero included."""

  def range(self, x, units, symmetric):
    if symmetric:
      return absmax().range(x, units, symmetric)
    lo = units.squeeze(jnp.min(x, axis=units.reduce, keepdims=True))
    hi = units.squeeze(jnp.max(x, axis=units.reduce, keepdims=True))
    return jnp.minimum(lo, 0), jnp.maximum(hi, 0)


@dataclasses.dataclass(frozen=True, repr=False)
class percentile(Rule):
  """The p-th percentile of |x|, or of both tails: p and 100 - p.

  Attributes:
    p: in (50, 100]; 100 is absmax or minmax.
  """

  p: float = 99.99

  def __post_init__(self):
    if not _is_number(self.p) or not 50 < self.p <= 100:
      raise ValueError(f'percentile takes 50 < p <= 100, found p={self.p!r}')

  def range(self, x, units, symmetric):
    x = _without_padding(x, units)
    if symmetric:
      hi = _quantile(jnp.abs(x), self.p / 100, units)
      return -hi, hi
    lo = _quantile(x, 1 - self.p / 100, units)
    hi = _quantile(x, self.p / 100, units)
    return jnp.minimum(lo, 0), jnp.maximum(hi, 0)


@dataclasses.dataclass(frozen=True, repr=False)
class mse(Rule):
  """Shrinks the range to minimize sum |x - x_hat|^p, unit by unit.

  The candidates are `candidates` ratios of the full range, from `high` down
  to just above `low` in even steps; 1 is always among them, so that p = 2
  never has a larger squared error than absmax (or minmax). The search itself
  is in `quantlab.core.fitting`.

  Attributes:
    candidates: number of ratios.
    p: the norm; 2.4 is the other common choice (BRECQ, arXiv 2102.05426).
    low: ratios stay above this.
    high: largest ratio; above 1 it lets the largest values of a coarse float
      format land on an inner value (with FP4, 6 / 4 = 1.5).
  """

  candidates: int = 80
  p: float = 2.0
  low: float = 0.2
  high: float = 1.0

  def __post_init__(self):
    if (
      not isinstance(self.candidates, int)
      or not all(map(_is_number, (self.p, self.low, self.high)))
      or self.candidates < 1
      or not 0 < self.low < 1 <= self.high < float('inf')
      or not 0 < self.p < float('inf')
    ):
      raise ValueError(
        'mse takes an integer candidates >= 1, p > 0 and 0 < low < 1 <= high, '
        f'found {self.candidates=}, {self.p=}, {self.low=}, {self.high=}'
      )

  def ratios(self) -> np.ndarray:
    """The ratios to try, 1 first."""
    rest = np.linspace(self.high, self.low, self.candidates, endpoint=False)
    return np.asarray([1.0, *rest[rest != 1.0]], np.float32)

  def range(self, x, units, symmetric):
    return minmax().range(x, units, symmetric)


@dataclasses.dataclass(frozen=True, repr=False)
class kl(Rule):
  """Clips a static activation so that its distribution changes least.

  Entropy calibration: of ratios of the full range, the one of least
  KL(clipped || quantized) between histograms (`quantlab.calibration.entropy`).
  It reads what calibration counts, and so is of static quantizers alone.

  Attributes:
    candidates: number of ratios, from 1 down to one bin of the histogram a
      code.
  """

  candidates: int = 256

  def __post_init__(self):
    if type(self.candidates) is not int or self.candidates < 1:
      raise ValueError(
        f'kl takes an integer candidates >= 1, found {self.candidates!r}'
      )

  def range(self, x, units, symmetric):
    raise TypeError('kl() reads a histogram that only calibration counts')


@dataclasses.dataclass(frozen=True, repr=False)
class absmean(Rule):
  """The mean magnitude as the scale itself (BitNet b1.58, arXiv 2402.17764)."""

  sided: ClassVar[bool] = False
  direct: ClassVar[bool] = True

  def range(self, x, units, symmetric):
    total = jnp.sum(jnp.abs(x), axis=units.reduce, keepdims=True)
    mask = units.mask()
    if mask is None:
      count = np.prod(np.asarray(units.size, np.float64))
    else:
      count = mask.sum(axis=units.reduce, keepdims=True)
    hi = units.squeeze(total * np.asarray(1 / count, np.float32))
    return -hi, hi


@dataclasses.dataclass(frozen=True, repr=False)
class absmedian(Rule):
  """The median magnitude as the scale itself (arXiv 2407.09527).

  Not less than a tenth of the mean: the median of a sparse unit is zero.
  """

  sided: ClassVar[bool] = False
  direct: ClassVar[bool] = True

  def range(self, x, units, symmetric):
    median = _quantile(_without_padding(jnp.abs(x), units), 0.5, units)
    _, mean = absmean().range(x, units, symmetric)
    hi = jnp.maximum(median, np.float32(0.1) * mean)
    return -hi, hi


def full(symmetric: bool) -> Rule:
  """The rule that clips nothing."""
  return absmax() if symmetric else minmax()


_RULES = {
  r.__name__: r
  for r in (absmax, minmax, percentile, mse, kl, absmean, absmedian)
}


def from_json(data: dict[str, Any]) -> Rule:
  """Undoes `Rule.to_json`."""
  args = dict(data)
  name = args.pop('rule', None)
  if name not in _RULES:
    raise ValueError(f'unknown range rule {name!r}; known are {list(_RULES)}')
  return _RULES[name](**args)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _without_padding(x: Array, units: Units) -> Array:
  """Marks padded places as missing, for quantiles."""
  mask = units.mask()
  return x if mask is None else jnp.where(mask, x, jnp.nan)


def _quantile(x: Array, q: float, units: Units) -> Array:
  """Quantile over each unit, skipping what padding added."""
  f = jnp.quantile if units.mask() is None else jnp.nanquantile
  return units.squeeze(f(x, q, axis=units.reduce, keepdims=True))
