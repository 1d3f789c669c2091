"""Allocations whose sites are scored by two metrics (MixDQ)."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import allocated, variants
from quantlab import models, runtime, search
from quantlab.search import objectives


def check(config: Any, table: search.Table, metrics: Sequence[str]) -> None:
  """Whether the groups of a config divide the rows of a table.

  Raises:
    ConfigError: an unknown metric, a pattern that finds nothing, groups that
      overlap or are not all rows.
  """
  if not config.groups:
    return
  where = f'groups={config.groups!r}'
  try:
    parts = [table.select(pattern) for pattern, _ in config.groups]
    names = [r.name for r in search.joined(parts).rows]
  except ValueError as error:
    raise variants.ConfigError(f'{where}: {error}') from error
  for _, metric in config.groups:
    variants.check_name('metric', metric.split('.')[0], tuple(metrics))
  left = [r.name for r in table.rows if r.name not in names]
  if left:
    raise variants.ConfigError(
      f'{where} leave out {left[:3]}; between them they must find every row'
    )


def allocations(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  tables: Mapping[str, search.Table],
) -> dict[str, search.Allocation]:
  """One for each budget; nothing where the config names no groups.

  Args:
    folder: keeps what was chosen, which takes measurements.
    config: `groups` are two pairs (pattern of rows, metric of a table).
    work: the model; how a budget is divided is decided by the loss (or its
      stand-in, see `objectives.default`) on the batches of the tables.
    tables: by metric.
  """
  if not config.groups:
    return {}
  groups = [
    search.additive(tables[m]).floored().select(p) for p, m in config.groups
  ]
  whole = tables[config.groups[0][1]]
  names = [r.name for table in groups for r in table.rows]
  kept = folder.read_json('decoupled.json', {})
  if todo := [option for option in config.budgets if option not in kept]:
    measure = allocated.measure(config, work, objectives.default(work.metric))
    order = [names.index(r.name) for r in whole.rows]

    def in_order(choice):
      return [choice[i] for i in order]

    for option in todo:
      start = [table.uniform(option) for table in groups]
      made = search.decoupled(
        groups, start, lambda c: measure(in_order(c)), cost=config.cost
      )
      kept[option] = in_order(made.choice)
      folder.write_json('decoupled.json', kept)
  found = {}
  for option, choice in kept.items():
    budget = {config.cost: whole.cost(whole.uniform(option), config.cost)}
    found[f'{option}/decoupled'] = search.Allocation(
      whole, tuple(choice), 'decoupled', budget
    )
  return found
