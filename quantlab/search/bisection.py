"""Bisection to a target of quality (arXiv 2306.04879)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from quantlab.search.table import (
  Table,
  check_name,
  check_number,
  check_table,
  refuse_failed,
)

Choice = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bisection:
  """What a bisection found.

  Attributes:
    choice: the option of each row.
    quality: of that choice, as measured.
    measured: every choice that was measured, with its quality.
    violations: how often a choice passed that lowers more rows than one that
      failed: where it is not 0 the quality is not monotone in the order, and
      a linear scan could find more.
  """

  choice: Choice
  quality: float
  measured: tuple[tuple[Choice, float], ...]
  violations: int


def bisect(
  table: Table,
  measure: Callable[[Choice], float],
  target: float,
  *,
  cost: str = 'bytes',
) -> Bisection:
  """The most rows in the cheapest options that keep a measured quality.

  Rows are ordered by the value of an option, least first; where interactions
  are known, half of those with all other rows at the same option are added
  (the augmented order). For each option, cheapest first, bisection finds how
  many of the rows not yet settled may take it: O(options log rows)
  measurements.

  Args:
    table: rows with the same number of options each, or one.
    measure: quality of a choice, more is better; NaN fails.
    target: what it must not fall below.
    cost: by which options are cheap.

  Raises:
    ValueError: an unknown cost; rows of different numbers of options; one all
      of whose options failed; a target that is no number, or that not even
      the dearest options reach.
    TypeError: no table.
  """
  check_table('bisect', table)
  if not callable(measure):
    raise TypeError(
      f'measure is a function of a choice that gives a number, got {measure!r}'
    )
  check_name('cost', cost, table.costs)
  target = check_number('the target', target)
  check_levels(table)
  refuse_failed(table)
  ranks = [np.argsort(c, kind='stable') for c in table.costs[cost]]
  # Of the options that did not fail the dearest, by its rank.
  tops = [
    max(j for j, k in enumerate(r) if np.isfinite(v[k]))
    for r, v in zip(ranks, table.values, strict=True)
  ]
  choice = [int(r[j]) for r, j in zip(ranks, tops, strict=True)]
  seen: dict[Choice, float] = {}

  def quality(candidate: Sequence[int]) -> float:
    key = tuple(candidate)
    if key not in seen:
      found = measure(key)
      if isinstance(found, str) or np.ndim(found) != 0 or found is None:
        raise TypeError(
          f'measure({key}) is the quality of that choice: expected one number, '
          f'got {found!r}'
        )
      seen[key] = float(found)
    return seen[key]

  best = quality(choice)
  if not best >= target:
    raise ValueError(
      f'the target {target:g} is out of reach: with the dearest option in '
      f'every row the quality is {best:g}. Permit a larger loss, or give an '
      'option of more bits'
    )
  settled: set[int] = set()
  violations = 0
  for level in range(max(map(len, ranks)) - 1):
    lower = [
      i for i, top in enumerate(tops) if i not in settled and level < top
    ]
    order = _order(table, ranks, level, lower)

    def lowered(
      count: int, level=level, order=order, start=tuple(choice)
    ) -> list[int]:
      new = list(start)
      for i in order[:count]:
        new[i] = int(ranks[i][level])
      return new

    low, high, failed = 0, len(order), math.inf
    while low < high:
      middle = (low + high + 1) // 2
      if quality(lowered(middle)) >= target:
        low = middle
      else:
        high, failed = middle - 1, min(failed, middle)
    # One look beyond what failed says whether the order can be trusted.
    if failed < len(order) and quality(lowered(len(order))) >= target:
      violations, low = violations + 1, len(order)
    choice = lowered(low)
    settled |= set(order[:low])
  found = tuple(choice)
  return Bisection(found, quality(found), tuple(seen.items()), violations)


def check_levels(table: Table) -> None:
  """Whether rows can be lowered together, one option after another.

  Raises:
    ValueError: some have other numbers of options.
  """
  if len({len(r.options) for r in table.rows} - {1}) > 1:
    raise ValueError(
      'bisect lowers rows level by level, and needs the same number of options '
      f'in each, or one: {[(r.name, len(r.options)) for r in table.rows]}'
    )


def _order(table, ranks, level, rows) -> list[int]:
  """Those of the rows whose option of a level did not fail, the least
  sensitive first.
  """
  chosen = [int(r[min(level, len(r) - 1)]) for r in ranks]
  value = np.array(
    [v[k] for v, k in zip(table.values, chosen, strict=True)], float
  )
  if table.interactions is not None:
    at = table.index(chosen)
    value = value + table.interactions[np.ix_(at, at)].sum(1) / 2
  usable = [i for i in rows if np.isfinite(value[i])]
  return sorted(usable, key=lambda i: (value[i], i))
