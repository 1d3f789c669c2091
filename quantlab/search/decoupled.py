"""Groups of sites with a metric each (MixDQ, arXiv 2405.17873)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from quantlab.search.allocate import Allocation, pareto, refuse_interactions
from quantlab.search.measured import least
from quantlab.search.table import (
  Table,
  check_name,
  check_number,
  check_table,
)

Choice = tuple[int, ...]
RATIOS = tuple(
  np.linspace(0.46, 1.36, 10).tolist()
)  # of the paper, for weights


def decoupled(
  groups: Sequence[Table],
  start: Sequence[Choice],
  measure: Callable[[Choice], float],
  *,
  ratios: Sequence[float] = RATIOS,
  cost: str = 'bytes',
) -> Allocation:
  """The best of several ways to divide a budget between two groups of rows.

  Values of one group are not compared with those of the other, which may be
  another metric: each group is an integer program of its own. How much of the
  budget each has is decided by measurement, as in the outer loop of the paper:

    r C_1 t + C_2 t = C_1 + C_2

  with C_i the cost of `start` in group i, r the ratio, t what keeps the sum.

  Args:
    groups: two tables without a row in common, such as
      `tables['kl'].select('attention')`.
    start: an option for each row of each group; what these rows cost is the
      budget.
    measure: of a choice for all rows, those of the first group first; small
      is good, what is not finite never chosen.
    ratios: what the mean cost in the first group, over that in the second, is
      multiplied by; 1 is always among them.
    cost: what is divided.

  Returns:
    The choice of least measured value, in a table of both groups.

  Raises:
    ValueError: not two groups, a row in both, interactions (they are not
      counted: give `search.additive(table)`); a start that is no choice;
      nothing that measures as a number.
  """
  whole = joined(groups)
  for table in groups:
    refuse_interactions('decoupled', table)
  check_name('cost', cost, whole.costs)
  if not isinstance(start, Sequence) or len(start) != 2:
    raise ValueError(f'decoupled needs a start for each group, got {start!r}')
  if np.ndim(ratios) != 1:
    raise ValueError(f'ratios are several numbers, got {ratios!r}')
  ratios = [check_number('a ratio', r) for r in ratios]
  if not all(0 < r < math.inf for r in ratios):
    raise ValueError(f'ratios are positive numbers, got {ratios}')
  # Of the rows alone: what is not decided is no part of what is divided.
  groups = [dataclasses.replace(t, fixed={}) for t in groups]
  base = [t.cost(c, cost) for t, c in zip(groups, start, strict=True)]
  fronts = [pareto(t, cost) for t in groups]
  choices: list[Choice] = []
  for ratio in (1.0, *ratios):
    share = sum(base) / (ratio * base[0] + base[1])
    limits = (ratio * share * base[0], share * base[1])
    if any(f.cost[0] > b for f, b in zip(fronts, limits, strict=True)):
      continue
    parts = (f.within(b) for f, b in zip(fronts, limits, strict=True))
    choices.append(sum(parts, ()))
  best = least(choices, measure)
  return Allocation(whole, best, 'decoupled', {cost: sum(base)})


def joined(groups: Sequence[Table]) -> Table:
  """One table of the rows of two; its values have no common unit."""
  if not isinstance(groups, Sequence) or len(groups) != 2:
    found = len(groups) if isinstance(groups, Sequence) else repr(groups)
    raise ValueError(f'a budget is divided between two groups, got {found}')
  for table in groups:
    check_table('joined', table)
  first, second = groups
  if missing := set(first.costs) - set(second.costs):
    raise ValueError(
      f'the second table lacks costs of the first: {sorted(missing)}'
    )
  both = {r.name for r in first.rows} & {r.name for r in second.rows}
  if both:
    raise ValueError(f'the groups have rows in common: {sorted(both)}')
  first.check_model(second.model)
  return dataclasses.replace(
    first,
    rows=first.rows + second.rows,
    values=first.values + second.values,
    stderr=first.stderr + second.stderr,
    costs={k: c + second.costs[k] for k, c in first.costs.items()},
    metric=f'{first.metric} | {second.metric}',
    unit=f'{first.unit} | {second.unit}',
    interactions=None,
    fixed={},
    layers={**first.layers, **second.layers},
  )
