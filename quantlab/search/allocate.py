"""`allocate`: one option for each row, within budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantlab import runtime
from quantlab.recipe import Entry, Recipe, by_layer
from quantlab.search import baselines, knapsack, milp, quadratic
from quantlab.search.table import (
  Table,
  check_count,
  check_name,
  check_number,
  check_table,
  refuse_failed,
)

METHODS = ('dp', 'milp', 'quadratic', 'greedy', 'random')


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
  """One option for each row of a table.

  Attributes:
    table: the table, its rows tied as they were decided.
    choice: the option of each row.
    method: how it was found.
    budgets: the limits it had to meet.
  """

  table: Table
  choice: tuple[int, ...]
  method: str
  budgets: Mapping[str, float]

  def __post_init__(self):
    check_table('Allocation', self.table)
    self.table.check_choice(self.choice)
    if not isinstance(self.budgets, Mapping):
      raise TypeError(f'budgets are limits by name, got {self.budgets!r}')
    plain = tuple(int(k) for k in self.choice)  # JSON knows no NumPy numbers
    object.__setattr__(self, 'choice', plain)

  def check_params(self, params: Any) -> None:
    """Refuses other parameters than the table was measured on.

    `ql.ptq` asks it. A table that was made by hand names no model.
    """
    if self.table.model:
      self.table.check_model(runtime.fingerprint(params))

  @property
  def value(self) -> float:
    """The predicted value."""
    return self.table.predict(self.choice)

  @property
  def costs(self) -> dict[str, float]:
    """Whole costs, what is not decided included."""
    return {n: self.table.cost(self.choice, n) for n in self.table.costs}

  @property
  def options(self) -> dict[str, str]:
    """The chosen option of each row, by name."""
    return self.table.labels(self.choice)

  @property
  def rules(self) -> dict[str, Entry]:
    """The rule of each site, by id: chosen, or as it is kept."""
    if not all(r.rules for r in self.table.rows):
      raise ValueError(
        'the table is of no program: its options have names and no rules, so '
        'that nothing can be quantized by them'
      )
    chosen = {
      site: row.rules[k]
      for row, k in zip(self.table.rows, self.choice, strict=True)
      for site in row.sites
    }
    found: dict[str, Entry] = {**self.table.kept, **chosen}
    for site, names in self.table.layers.items():
      layers = [n for n in names if n in chosen]
      if layers and len(layers) < len(names):
        missing = [n for n in names if n not in chosen]
        raise ValueError(
          f'the table decides some layers of {site!r} and lacks {missing}'
        )
      if layers:
        found[site] = by_layer([chosen[n] for n in layers])
      for name in layers:
        del found[name]
    return found

  @property
  def recipe(self) -> Recipe:
    """A rule for each site, by its id; `ql.ptq` takes the allocation itself."""
    return Recipe.of_sites(self.rules)

  def to_json(self) -> dict[str, Any]:
    """The choice with the table it was made from."""
    return {
      'table': self.table.to_json(),
      'choice': list(self.choice),
      'method': self.method,
      # JSON has no infinity.
      'budgets': {
        k: v if math.isfinite(v) else None for k, v in self.budgets.items()
      },
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Allocation:
    """Undoes `to_json`.

    Raises:
      ValueError: it is no allocation.
    """
    try:
      table, choice = data['table'], tuple(data['choice'])
      method = data['method']
      budgets = {
        k: math.inf if v is None else v for k, v in data['budgets'].items()
      }
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'this is no allocation: {error!r}') from error
    return cls(Table.from_json(table), choice, method, budgets)

  def __repr__(self) -> str:
    costs = ', '.join(f'{k} {v:,.6g}' for k, v in self.costs.items())
    return f'Allocation({self.method}, {self.value:.5g}, {costs})'


def allocate(
  table: Table,
  budget: Mapping[str, float] | float,
  method: str | None = None,
  *,
  ties: Iterable[Sequence[str]] = (),
  seed: int = 0,
) -> Allocation:
  """The options of least predicted value within budgets.

  Args:
    table: what `ql.sensitivity` measured.
    budget: limits of whole costs by name; a number is the limit of 'bytes'.
    method: 'quadratic' for a table with interactions (the default there), by
      local search. For others, or for `search.additive(table)`: 'dp' exact,
      one budget (the default there); 'milp' exact, several budgets (the
      default there); 'greedy'. 'random' as a baseline for all.
    ties: groups of rows or sites that take one option.
    seed: of 'random'.

  Raises:
    ValueError: an unknown method or cost, a method that would ignore the
      table's interactions, a budget below the smallest reachable cost (which
      is named), tied rows of different options, a row all of whose options
      failed (NaN).
    TypeError: no table.
  """
  check_table('allocate', table)
  given = dict(budget) if isinstance(budget, Mapping) else {'bytes': budget}
  if not given:
    raise ValueError('allocate needs a budget, such as {"bytes": 50_000}')
  for name in given:
    check_name('cost', name, table.costs)
  budgets = {
    name: check_number(f'the budget of {name!r}', limit)
    for name, limit in given.items()
  }
  additive = 'dp' if len(budgets) == 1 else 'milp'
  if method is None:
    method = additive if table.interactions is None else 'quadratic'
  check_name('method', method, METHODS)
  if method not in ('quadratic', 'random'):
    refuse_interactions(f'method={method!r}', table)
  check_count('seed', seed, 0)
  if not isinstance(ties, Iterable) or isinstance(ties, str):
    raise ValueError(f'ties are lists of names of rows, got {ties!r}')
  groups = list(ties)
  table = table.tied(groups) if groups else table
  limits = _limits(table, budgets)
  choice = _solve(table, limits, method, seed)
  return Allocation(table, choice, method, budgets)


def pareto(table: Table, cost: str = 'bytes') -> knapsack.Front:
  """The best value at every cost; costs include what is not decided.

  Raises:
    ValueError: an unknown cost; a table with interactions, whose front no
      exact method here finds; a row all of whose options failed (NaN).
    TypeError: no table.
  """
  check_table('pareto', table)
  check_name('cost', cost, table.costs)
  refuse_interactions('pareto', table)
  refuse_failed(table)
  found = knapsack.front(table.values, table.costs[cost])
  return dataclasses.replace(
    found, cost=found.cost + table.fixed.get(cost, 0.0)
  )


def refuse_interactions(what: str, table: Table) -> None:
  if table.interactions is not None:
    raise ValueError(
      f"{what} minimizes a sum, and this table has interactions: 'quadratic' "
      'counts them, search.additive(table) is the table without'
    )


def _limits(table: Table, budgets: Mapping[str, float]) -> dict[str, float]:
  """Budgets of the rows alone; refuses those that nothing can meet."""
  refuse_failed(table)
  limits = {}
  for name, limit in budgets.items():
    fixed = table.fixed.get(name, 0.0)
    least = math.fsum(
      float(c[np.isfinite(v)].min())
      for c, v in zip(table.costs[name], table.values, strict=True)
    )
    if least + fixed > limit + _slack(limit):
      raise ValueError(
        f'the budget of {limit:,g} {name} cannot be met: the smallest '
        f'reachable cost is {least + fixed:,g} ({fixed:,g} of it is not '
        'decided here)'
      )
    limits[name] = limit - fixed + _slack(limit)
  return limits


def _slack(limit: float) -> float:
  """What rounding may add to a sum of costs."""
  return 1e-12 * abs(limit) if math.isfinite(limit) else 0.0


def _solve(table: Table, limits, method: str, seed: int) -> tuple[int, ...]:
  values, costs = table.values, table.costs
  if method == 'milp':
    return milp.solve(values, costs, limits)
  if method == 'greedy':
    return _met(table, limits, baselines.greedy(values, costs, limits))
  if method == 'random':
    rng = np.random.default_rng(seed)
    return _met(table, limits, baselines.random(values, costs, limits, rng))
  if method == 'dp':
    if len(limits) > 1:
      raise ValueError(
        f"method='dp' takes one budget, got {sorted(limits)}; 'milp' takes "
        'several'
      )
    [(name, limit)] = limits.items()
    return knapsack.front(values, costs[name]).within(limit)
  if table.interactions is None:
    raise ValueError(
      "method='quadratic' needs interactions, which this table has not; "
      "ql.sensitivity(..., 'hessian', interactions=True) measures them"
    )
  rng = np.random.default_rng(seed)
  additive = milp.solve if len(limits) > 1 else None
  starts = [
    additive(values, costs, limits)
    if additive
    else _solve(table, limits, 'dp', seed),
    baselines.greedy(values, costs, limits),
    *(baselines.random(values, costs, limits, rng) for _ in range(8)),
  ]
  return quadratic.solve(values, table.interactions, costs, limits, starts)


def _met(table: Table, limits, choice: tuple[int, ...]) -> tuple[int, ...]:
  """A heuristic's choice; several budgets may leave it without one."""
  for name, limit in limits.items():
    used = table.cost(choice, name) - table.fixed.get(name, 0.0)
    if used > limit:
      raise ValueError(
        f'no choice was found that meets all budgets {sorted(limits)} '
        f"together; method='milp' decides whether there is one"
      )
  return choice
