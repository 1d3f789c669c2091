"""A number and how far to trust it: intervals over examples, not over tokens.

Examples are taken as independent draws; the tokens of one text are not, so that
token-weighted numbers are ratios of sums over texts. All of it runs on the
host, in float64, on a few statistics an example.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 500


class Estimate(NamedTuple):
  """A value with its 95 % interval.

  Attributes:
    value: the number.
    low: lower end of the 95 % interval.
    high: upper end.
    stderr: standard error.
    n: examples behind it.
  """

  value: float
  low: float
  high: float
  stderr: float
  n: int

  def __float__(self) -> float:
    return self.value

  def __str__(self) -> str:
    return f'{self.value:.5g} [{self.low:.5g}, {self.high:.5g}]'


def _column(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(
      f'Expected one value an example, at least one; got {values.shape=}.'
    )
  return values


def mean(values: np.ndarray) -> Estimate:
  """Mean over examples; the normal interval."""
  values = _column(values)
  return ratio(values, np.ones_like(values))


def proportion(hits: np.ndarray) -> Estimate:
  """Share of hits, with E. B. Wilson's score interval (JASA 1927).

  The normal interval has no width when every example is a hit, which 500 test
  images do not show; Wilson's stays honest there.
  """
  hits = _column(hits)
  n, p = len(hits), float(hits.mean())
  shrink = 1 + Z95**2 / n
  centre = (p + Z95**2 / (2 * n)) / shrink
  half = Z95 / shrink * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
  # Rounding must not push an end past the value, nor out of [0, 1].
  low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
  return Estimate(p, low, high, math.sqrt(p * (1 - p) / n), n)


def share(hits: np.ndarray, counts: np.ndarray) -> Estimate:
  """Share of hits among positions, counted by example (tokens of texts).

  Where all or none are hits the ratio estimator knows no spread; the interval
  is then Wilson's, with no more trials than there are examples.
  """
  hits, counts = _column(hits), _column(counts)
  if (counts == 1).all():
    return proportion(hits)
  found = ratio(hits, counts, lower=0.0, upper=1.0)
  if found.value in (0.0, 1.0):
    width = proportion(np.full(len(hits), found.value))
    return found._replace(low=width.low, high=width.high)
  return found


def ratio(
  numerator: np.ndarray,
  denominator: np.ndarray,
  *,
  lower: float = -math.inf,
  upper: float = math.inf,
) -> Estimate:
  r"""Sum over sum, with the linearised standard error of the ratio estimator.

  .. math:: R = \sum y_i / \sum x_i, \quad
    se = \sqrt{n / (n-1) \sum (y_i - R x_i)^2} / \sum x_i

  W. G. Cochran, Sampling Techniques, 2.11. One example gives no spread: the
  standard error is NaN, not zero. The interval is cut at `lower` and `upper`,
  which the quantity cannot pass.
  """
  y, x = _column(numerator), _column(denominator)
  if y.shape != x.shape:
    raise ValueError(f'One value an example in both: {y.shape=}, {x.shape=}.')
  total = x.sum()
  if total <= 0:
    raise ValueError('The denominators sum to zero: nothing was counted.')
  n, value = len(y), y.sum() / total
  residual = np.square(y - value * x).sum()
  error = math.sqrt(n / (n - 1) * residual) / total if n > 1 else math.nan
  low, high = value - Z95 * error, value + Z95 * error
  if n > 1:
    low, high = max(low, lower), min(high, upper)
  return Estimate(float(value), float(low), float(high), float(error), n)


def exponential(estimate: Estimate) -> Estimate:
  """The estimate of exp(value): perplexity of a mean log-likelihood."""
  value = math.exp(estimate.value)
  return Estimate(
    value,
    math.exp(estimate.low),
    math.exp(estimate.high),
    value * estimate.stderr,
    estimate.n,
  )


def decibel(signal: np.ndarray, noise: np.ndarray) -> Estimate:
  """10 log10 of signal power over noise power, summed over the examples.

  Infinite where there is no noise at all.
  """
  signal, noise = _column(signal), _column(noise)
  if not noise.any():
    return Estimate(math.inf, math.inf, math.inf, 0.0, len(noise))
  if not signal.any():
    return Estimate(-math.inf, -math.inf, -math.inf, 0.0, len(signal))
  power = ratio(noise, signal)
  scale = 10 / math.log(10)
  value = -scale * math.log(power.value)
  error = scale * power.stderr / power.value
  low, high = value - Z95 * error, value + Z95 * error
  return Estimate(value, low, high, error, power.n)


def bootstrap(
  statistic: Callable[..., float],
  *columns: np.ndarray,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Percentile bootstrap of any statistic of columns with one row an example.

  Args:
    statistic: `(*columns) -> float`.
    *columns: arrays of one leading length.
    resamples: draws with replacement, each as large as the sample.
    seed: of the draws; the same seed gives the same interval.
  """
  n = len(columns[0])
  value = float(statistic(*columns))
  draw = np.random.RandomState(seed)
  values = np.empty(resamples)
  for i in range(resamples):
    rows = draw.randint(0, n, n)
    values[i] = statistic(*(column[rows] for column in columns))
  return _from_draws(value, values, n)


def quantile(
  values: np.ndarray,
  example: np.ndarray,
  q: float,
  *,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """The q-quantile of values (inverted CDF); whole examples are resampled.

  Args:
    values: one value a position, (positions,).
    example: the example that each position belongs to, 0..n-1.
    q: in 0..1.
    resamples: bootstrap draws.
    seed: of the draws.
  """
  values = _column(values)
  order = np.argsort(values, kind='stable')
  values, example = values[order], np.asarray(example)[order]
  n = int(example.max()) + 1

  def at(weights: np.ndarray) -> float:
    below = np.cumsum(weights[example])
    # The smallest value with at least q of the weight at or below it.
    return values[np.searchsorted(below, q * below[-1])]

  value = float(at(np.ones(n)))
  draw = np.random.RandomState(seed)
  draws = []
  for _ in range(resamples):
    weights = np.bincount(draw.randint(0, n, n), minlength=n).astype(float)
    if weights[example].any():  # the drawn examples may hold no position
      draws.append(at(weights))
  return _from_draws(value, np.array(draws), n)


def _from_draws(value: float, draws: np.ndarray, n: int) -> Estimate:
  # A resample may leave a statistic undefined (all ranks tied): left out.
  draws = draws[np.isfinite(draws)]
  if n < 2 or not len(draws):
    return Estimate(value, math.nan, math.nan, math.nan, n)
  low, high = np.percentile(draws, (2.5, 97.5))
  return Estimate(value, float(low), float(high), float(draws.std()), n)
