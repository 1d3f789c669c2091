"""Choices decided by measurement: tables propose, the model disposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from quantlab.search.allocate import Allocation

Choice = tuple[int, ...]


def measured(
  candidates: Sequence[Allocation], measure: Callable[[Choice], float]
) -> Allocation:
  """The allocation that measures best.

  A table predicts what a plan does from sites alone or in pairs, and around
  one plan; which prediction holds is not known before. Running a handful of
  plans decides it, for the price of as many entries of a table.

    uniform = search.Allocation(table, table.uniform('int4'), 'uniform', {})
    found = [uniform, *(ql.allocate(t, uniform.costs) for t in tables)]
    best = search.measured(found, measure)

  Args:
    candidates: allocations of the same rows.
    measure: of a choice; small is good, what is not finite never chosen. Each
      choice is measured once.

  Raises:
    ValueError: no candidate, others than of the same rows, or none that
      measures as a number.
  """
  if not candidates:
    raise ValueError('measured needs at least one allocation to measure')
  rows = [r.name for r in candidates[0].table.rows]
  for other in candidates[1:]:
    if [r.name for r in other.table.rows] != rows:
      raise ValueError(
        f'allocations of other rows cannot be compared: {rows[:3]}... and '
        f'{[r.name for r in other.table.rows][:3]}...'
      )
  best = least([c.choice for c in candidates], measure)
  return next(c for c in candidates if c.choice == best)


def least(
  choices: Iterable[Choice], measure: Callable[[Choice], float]
) -> Choice:
  """The choice of least measured value; the first of equal ones.

  Raises:
    ValueError: none measures as a number.
  """
  found = {c: float(measure(c)) for c in dict.fromkeys(choices)}
  good = {c: v for c, v in found.items() if math.isfinite(v)}
  if not good:
    raise ValueError(f'none of {len(found)} choices measured as a number')
  return min(good, key=good.__getitem__)
