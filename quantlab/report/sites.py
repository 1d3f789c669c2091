"""What a report says of one site, as plain JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np


class Histogram(TypedDict):
  """Counts between edges: `len(edges) == len(counts) + 1`."""

  edges: list[float]
  counts: list[int]


class SiteRow(TypedDict, total=False):
  """One site of a variant; what is unknown is left out.

  `weight` and `input` are quantizers as they print, None for float; `bits` is
  bits per weight with the scales; `sqnr` in dB on the site's output. The worst
  sites have more: `before` and `after` the model was prepared for encoding,
  histograms of 'input' and 'weight', and the `statistics` of a diagnosis.
  """

  site: str
  kind: str
  weight: str | None
  input: str | None
  bits: float
  nbytes: int
  float_nbytes: int
  sqnr: float
  why_float: str
  histograms: dict[str, Histogram]
  before: dict[str, Histogram]
  after: dict[str, Histogram]
  statistics: dict[str, Any]


def histogram(x: Any, bins: int = 61) -> Histogram:
  """Counts of an array's finite values in equal bins.

  Args:
    x: any shape; values are taken in float32.
    bins: how many.

  Returns:
    The histogram; one bin around the value when all are equal.
  """
  # In double: equal bins of near-equal single values would have no width.
  values = np.asarray(x).astype(np.float32).ravel().astype(np.float64)
  values = values[np.isfinite(values)]
  if values.size and values.min() == values.max():
    half = max(0.5, 0.01 * abs(values[0]))
    counts = np.asarray([values.size])
    edges = np.asarray([values[0] - half, values[0] + half])
  else:
    counts, edges = np.histogram(values, bins=bins)
  # Six digits: a picture needs no more, and reports are kept as JSON.
  return {
    'edges': [float(f'{e:.6g}') for e in edges],
    'counts': counts.tolist(),
  }


def quantized(rows: list[SiteRow]) -> list[SiteRow]:
  """The sites that have a quantizer."""
  return [r for r in rows if r.get('weight') or r.get('input')]


def unquantized(rows: list[SiteRow]) -> list[SiteRow]:
  """The sites left in float: the coverage list."""
  return [r for r in rows if not (r.get('weight') or r.get('input'))]


def worst_first(rows: Sequence[SiteRow]) -> list[SiteRow]:
  """The quantized sites whose error is known, the largest error first."""
  known = [r for r in quantized(list(rows)) if _measured(r)]
  return sorted(known, key=lambda r: finite(r, 'sqnr'))


def _measured(row: SiteRow) -> bool:
  return not math.isnan(finite(row, 'sqnr'))


def finite(row: Mapping[str, Any], name: str) -> float:
  """A number of a row, NaN when absent (JSON keeps 'inf' as a string)."""
  value = row.get(name)
  return float('nan') if value is None else float(value)
