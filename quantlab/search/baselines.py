"""What an allocation has to beat: greedy and random choices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Columns = tuple[np.ndarray, ...]


class _Moves:
  """A choice and the moves of single rows that its budgets allow."""

  def __init__(self, values, costs, budgets):
    self.values = [np.where(np.isfinite(v), v, np.inf) for v in values]
    self.names = tuple(budgets)
    self.costs = [
      np.stack([costs[n][i] for n in budgets]) for i in range(len(values))
    ]
    self.limits = np.array([budgets[n] for n in budgets])
    # What a unit of each budget counts, to add up several.
    self.scale = np.maximum(np.abs(self.limits), 1e-300)[:, None]

  def usable(self, i: int) -> np.ndarray:
    return np.flatnonzero(np.isfinite(self.values[i]))

  def room(self, choice) -> np.ndarray:
    used = [c[:, k] for c, k in zip(self.costs, choice, strict=True)]
    return self.limits - np.sum(used, axis=0)

  def weight(self, i: int) -> np.ndarray:
    """One number for the costs of each option of a row."""
    return (self.costs[i] / self.scale).sum(0)

  def moves(self, choice, *, cheaper: bool):
    """(row, option, change of value, change of cost) of each single move."""
    for i, k in enumerate(choice):
      weight = self.weight(i)
      for j in self.usable(i):
        change = weight[j] - weight[k]
        if j != k and (change < 0) == cheaper:
          yield i, int(j), self.values[i][j] - self.values[i][k], change


def greedy(
  values: Columns,
  costs: Mapping[str, Columns],
  budgets: Mapping[str, float],
) -> tuple[int, ...]:
  """From the best options down: the least loss for each unit of cost first.

  When the budgets are met, what room is left is used the other way.
  """
  m = _Moves(values, costs, budgets)
  choice = [int(np.argmin(v)) for v in m.values]
  while (m.room(choice) < 0).any():
    down = list(m.moves(choice, cheaper=True))
    if not down:
      return _cheapest(m)
    i, j, *_ = min(down, key=lambda t: (t[2] / -t[3], t[0], t[1]))
    choice[i] = j
  while True:
    room = m.room(choice)
    up = [
      t
      for t in m.moves(choice, cheaper=False)
      if t[2] < 0
      and (
        m.costs[t[0]][:, t[1]] - m.costs[t[0]][:, choice[t[0]]] <= room
      ).all()
    ]
    if not up:
      return tuple(choice)
    i, j, *_ = min(up, key=lambda t: (t[2] / max(t[3], 1e-300), t[0], t[1]))
    choice[i] = j


def random(
  values: Columns,
  costs: Mapping[str, Columns],
  budgets: Mapping[str, float],
  rng: np.random.Generator,
) -> tuple[int, ...]:
  """A random choice that meets the budgets and leaves no room unused.

  Options are drawn evenly; then random rows are made cheaper until the
  budgets are met, and random rows dearer while they fit.
  """
  m = _Moves(values, costs, budgets)
  choice = [int(rng.choice(m.usable(i))) for i in range(len(m.values))]
  while (m.room(choice) < 0).any():
    down = list(m.moves(choice, cheaper=True))
    if not down:
      return _cheapest(m)
    i, j, *_ = down[rng.integers(len(down))]
    choice[i] = j
  while True:
    room = m.room(choice)
    up = [
      t
      for t in m.moves(choice, cheaper=False)
      if (m.costs[t[0]][:, t[1]] - m.costs[t[0]][:, choice[t[0]]] <= room).all()
      and t[3] > 0
    ]
    if not up:
      return tuple(choice)
    i, j, *_ = up[rng.integers(len(up))]
    choice[i] = j


def _cheapest(m: _Moves) -> tuple[int, ...]:
  found = []
  for i in range(len(m.values)):
    usable = m.usable(i)
    found.append(int(usable[np.argmin(m.weight(i)[usable])]))
  return tuple(found)
