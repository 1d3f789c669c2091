"""The same choice as an integer program: several budgets at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import optimize, sparse

Columns = tuple[np.ndarray, ...]
_SCALE = 1e6
_CUTS = 100


def solve(
  values: Columns,
  costs: Mapping[str, Columns],
  budgets: Mapping[str, float],
) -> tuple[int, ...]:
  """The exact optimum by HiGHS (`scipy.optimize.milp`).

  One binary variable an option; each row takes one, each cost stays within
  its budget. Values and costs are scaled to 1e6, because the solver's
  tolerances are absolute: it ends within 1e-6 of the optimum, which here is
  1e-12 of the largest value. A choice that is over a budget within those
  tolerances all the same is cut off, and the next best taken.

  Args:
    values: (options,) of each row; what is not finite is never chosen.
    costs: by name, (options,) of each row.
    budgets: by the same names.

  Raises:
    ValueError: no choice meets all budgets, or the solver gave up.
  """
  row = np.repeat(np.arange(len(values)), [len(v) for v in values])
  value = np.concatenate(values)
  usable = np.isfinite(value)
  size = len(value)
  objective = np.where(usable, value, 0.0)
  objective = objective * (_SCALE / (np.abs(objective).max() or 1.0))
  one_each = sparse.csr_array((np.ones(size), (row, np.arange(size))))
  constraints = [optimize.LinearConstraint(one_each, 1, 1)]
  for name, limit in budgets.items():
    cost = np.concatenate(costs[name])
    scale = (np.abs(cost).max() or 1.0) / _SCALE
    constraints.append(
      optimize.LinearConstraint(cost[None] / scale, -np.inf, limit / scale)
    )
  starts = np.cumsum([0, *(len(v) for v in values)])[:-1]
  for _ in range(_CUTS):
    found = optimize.milp(
      objective,
      integrality=np.ones(size),
      bounds=optimize.Bounds(0, usable.astype(float)),
      constraints=constraints,
      options={'mip_rel_gap': 0.0},
    )
    if found.x is None:
      least = {n: float(sum(c.min() for c in costs[n])) for n in budgets}
      raise ValueError(
        f'no choice meets all budgets {dict(budgets)} together; the smallest '
        f'reachable costs, each by itself, are {least} ({found.message})'
      )
    choice = tuple(int(k) for k in np.flatnonzero(found.x > 0.5) - starts)
    if all(_cost(costs[n], choice) <= limit for n, limit in budgets.items()):
      return choice
    chosen = (found.x > 0.5).astype(float)
    constraints.append(
      optimize.LinearConstraint(chosen[None], -np.inf, len(values) - 1)
    )
  raise ValueError(
    f'the {_CUTS} best choices are over the budgets {dict(budgets)} by less '
    "than the solver resolves; method='dp' is exact for one budget"
  )


def _cost(columns: Columns, choice: tuple[int, ...]) -> float:
  return math.fsum(c[k] for c, k in zip(columns, choice, strict=True))
