"""Choosing where rows interact: a quadratic knapsack, by local search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from quantlab.search import knapsack

Columns = tuple[np.ndarray, ...]


class _Local:
  """Moves of one or two rows, as long as one lowers the objective.

  sum_l v[l, k_l] + sum_{l < m} q[(l, k_l), (m, k_m)].
  """

  def __init__(self, values, interactions, costs, budgets):
    self.value = np.concatenate(values)
    self.bad = ~np.isfinite(self.value)
    self.value = np.where(self.bad, 0.0, self.value)
    self.q = interactions
    self.cost = np.stack([np.concatenate(costs[n]) for n in budgets])
    self.limit = np.array([budgets[n] for n in budgets])
    self.row = np.repeat(np.arange(len(values)), [len(v) for v in values])
    self.start = np.cumsum([0, *(len(v) for v in values)])[:-1]

  def total(self, at: np.ndarray) -> float:
    inner = np.triu(self.q[np.ix_(at, at)], 1).sum()
    return float(self.value[at].sum() + inner)

  def feasible(self, at: np.ndarray) -> bool:
    fits = (self.cost[:, at].sum(1) <= self.limit).all()
    return bool(fits and not self.bad[at].any())

  def marginal(self, at: np.ndarray) -> np.ndarray:
    """Value of each entry beside the other rows' choices."""
    return self.value + self.q[:, at].sum(1)

  def improve(self, at: np.ndarray) -> np.ndarray:
    """Takes the best move until there is none."""
    while True:
      move = self._best_move(at)
      if move is None:
        return at
      at = at.copy()
      for entry in move:
        at[self.row[entry]] = entry

  def _best_move(self, at):
    now = at[self.row]  # the chosen entry of each entry's row
    one = self.marginal(at) - self.marginal(at)[now]
    free = self.cost - self.cost[:, now]
    room = self.limit - self.cost[:, at].sum(1)
    blocked = self.bad | (now == np.arange(len(now)))
    single = np.where(blocked | (free > room[:, None]).any(0), np.inf, one)
    q = self.q
    pair = one[:, None] + one[None] + q - q[:, now] - q[now] + q[now][:, now]
    over = (free[:, :, None] + free[:, None] > room[:, None, None]).any(0)
    over |= blocked[:, None] | blocked[None]
    over |= self.row[:, None] == self.row[None]
    pair = np.where(over, np.inf, pair)
    a, b = divmod(int(pair.argmin()), len(pair))
    least = min(single.min(), pair[a, b])
    if not least < -1e-12 * (1 + abs(self.total(at))):
      return None
    return (int(single.argmin()),) if single.min() <= least else (a, b)


def solve(
  values: Columns,
  interactions: np.ndarray,
  costs: Mapping[str, Columns],
  budgets: Mapping[str, float],
  starts: Iterable[Sequence[int]],
) -> tuple[int, ...]:
  """The best choice that moves of one and two rows lead to.

  From every start, and from what the exact additive solver makes of the
  problem with the interactions of the best choice so far put into the values
  (one budget only). The result is never worse than a start; that it is the
  optimum is not proven.

  Args:
    values: (options,) of each row.
    interactions: over all options, see `Table.interactions`.
    costs, budgets: by name.
    starts: choices that meet the budgets.
  """
  local = _Local(values, interactions, costs, budgets)
  found = [local.start + np.asarray(s, int) for s in starts]
  found = [local.improve(at) for at in found if local.feasible(at)]
  if not found:
    raise ValueError('no start meets the budgets')
  best = min(found, key=local.total)
  for _ in range(8 if len(budgets) == 1 else 0):
    [(name, limit)] = budgets.items()
    whole = np.where(local.bad, np.inf, local.marginal(best))
    linear = tuple(np.split(whole, local.start[1:]))
    at = local.start + knapsack.front(linear, costs[name]).within(limit)
    at = local.improve(at) if local.feasible(at) else best
    if not local.total(at) < local.total(best):
      break
    best = at
  return tuple(int(k) for k in best - local.start)
