"""Choices decided by measurement: tables propose, the model disposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from quantlab.search.allocate import Allocation

Choice = tuple[int, ...]


def measured(
  candidates: Iterable[Allocation], measure: Callable[[Choice], float]
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
    ValueError: no candidate, others than of the same rows and options of one
      model, or none that measures as a number.
    TypeError: no allocation.
  """
  candidates = list(candidates)
  if not candidates:
    raise ValueError('measured needs at least one allocation to measure')
  for each in candidates:
    if not isinstance(each, Allocation):
      raise TypeError(f'measured takes allocations, got {each!r}')
  first = candidates[0].table
  for other in (c.table for c in candidates[1:]):
    if (other.rows, other.model) != (first.rows, first.model):
      raise ValueError(
        'allocations of other rows, options or models cannot be compared: '
        f'{[(r.name, r.options) for r in first.rows][:2]}... of '
        f'{first.model!r} and '
        f'{[(r.name, r.options) for r in other.rows][:2]}... of '
        f'{other.model!r}'
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
