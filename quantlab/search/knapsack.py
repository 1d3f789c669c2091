"""The multiple-choice knapsack: every budget at once, exactly.

  min sum_l v[l, k_l]   subject to   sum_l c[l, k_l] <= B

Row by row the combinations that no other beats in both cost and value are
kept (G. L. Nemhauser and Z. Ullmann, Management Science 1969): what is left
after the last row is the Pareto front of the whole table. Costs are the exact
sums, not counts of some unit, so that nothing needs repair.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Columns = tuple[np.ndarray, ...]
# Combinations that are kept; more than that are thinned.
LIMIT = 1 << 17


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
  """Combinations of which none is beaten in both cost and value.

  Attributes:
    cost: ascending.
    value: descending.
    exact: False where there were more than the limit: then the best of each
      of that many equal steps of cost was kept.
    parents, options: for each row, where each point came from.
  """

  cost: np.ndarray
  value: np.ndarray
  exact: bool
  parents: tuple[np.ndarray, ...]
  options: tuple[np.ndarray, ...]

  def __len__(self) -> int:
    return len(self.cost)

  def choice(self, point: int) -> tuple[int, ...]:
    """The option of each row at one point of the front."""
    found = []
    for parents, options in zip(
      reversed(self.parents), reversed(self.options), strict=True
    ):
      found.append(int(options[point]))
      point = int(parents[point])
    return tuple(reversed(found))

  def within(self, budget: float) -> tuple[int, ...]:
    """The best choice of at most this cost; the cheapest one of them."""
    point = int(np.searchsorted(self.cost, budget, side='right')) - 1
    if point < 0:
      raise ValueError(
        f'no choice costs at most {budget:g}; the smallest reachable cost is '
        f'{self.cost[0]:g}'
      )
    return self.choice(point)


def front(values: Columns, costs: Columns, limit: int = LIMIT) -> Front:
  """The Pareto front of a table.

  Args:
    values: (options,) of each row; what is not finite is never chosen.
    costs: (options,) of each row.
    limit: points kept after each row.
  """
  cost, value = np.zeros(1), np.zeros(1)
  exact = True
  parents, options = [], []
  for v, c in zip(values, costs, strict=True):
    usable = np.flatnonzero(np.isfinite(v))
    all_cost = (cost[:, None] + c[usable]).reshape(-1)
    all_value = (value[:, None] + v[usable]).reshape(-1)
    keep = _undominated(all_cost, all_value)
    if len(keep) > limit:
      keep, exact = _thinned(keep, all_cost, limit), False
    cost, value = all_cost[keep], all_value[keep]
    parents.append((keep // len(usable)).astype(np.int32))
    options.append(usable[keep % len(usable)].astype(np.int16))
  return Front(cost, value, exact, tuple(parents), tuple(options))


def _undominated(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
  """Indices of the points with less value than every cheaper one."""
  order = np.lexsort((value, cost))
  sorted_value = value[order]
  before = np.minimum.accumulate(sorted_value)
  better = np.ones(len(order), bool)
  better[1:] = sorted_value[1:] < before[:-1]
  return order[better]


def _thinned(keep: np.ndarray, cost: np.ndarray, limit: int) -> np.ndarray:
  """The last, which is the best, in each of `limit` steps; and the first."""
  at = cost[keep]
  step = np.floor((at - at[0]) / (at[-1] - at[0]) * (limit - 2))
  last = np.append(step[1:] != step[:-1], True)
  last[0] = True
  return keep[last]
