"""The same choice as an integer program: several budgets at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import optimize, sparse

Columns = tuple[np.ndarray, ...]
_SCALE = 1e6


def solve(
  values: Columns,
  costs: Mapping[str, Columns],
  budgets: Mapping[str, float],
) -> tuple[int, ...]:
  """The exact optimum by HiGHS (`scipy.optimize.milp`).

  One binary variable an option; each row takes one, each cost stays within
  its budget. Costs are scaled to 1 and values to 1e6, because the solver's
  tolerances are absolute: it ends within 1e-6 of the optimum, which here is
  1e-12 of the largest value.

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
    scale = np.abs(cost).max() or 1.0
    constraints.append(
      optimize.LinearConstraint(cost[None] / scale, -np.inf, limit / scale)
    )
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
  chosen = found.x > 0.5
  starts = np.cumsum([0, *(len(v) for v in values)])[:-1]
  return tuple(int(k) for k in np.flatnonzero(chosen) - starts)
