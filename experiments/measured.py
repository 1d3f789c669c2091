"""Allocations that a measurement picks among those of several tables."""

from collections.abc import Mapping
from typing import Any

from experiments import allocated, fields, spaces
from quantlab import models, runtime, search


def check(config: Any) -> None:
  """Whether `measured` names tables whose allocations are made.

  Raises:
    ConfigError: says which does not.
  """
  known = dict.fromkeys(
    name.removesuffix('@') for name, _ in config.allocations
  )
  for name in config.measured:
    if name not in known:
      fields.refuse(
        'measured', config.measured, f'tables of allocations=, of {[*known]}'
      )


def allocations(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  found: Mapping[str, search.Allocation],
) -> dict[str, search.Allocation]:
  """The best of each budget by the measured metric, uniform among them.

  Args:
    folder: keeps what was picked, which takes measurements.
    config: `measured` names tables: the metric, and with which encoder it is
      measured ('kl', 'kl.gptq'), on the batches of the tables.
    work: the model.
    found: the candidates, by name; all those of a metric are, of whatever
      table.
  """
  kept = folder.read_json('measured.json', {})
  for name in config.measured:
    metric, *encoders = name.split('.')
    if metric not in spaces.metrics(config, work):
      continue
    measure = None
    for option in config.budgets:
      key = f'{option}/{name}-measured'
      if key in kept:
        continue
      measure = measure or allocated.measure(config, work, metric, encoders)
      names = [f'{option}/uniform', *_of(found, option, metric)]
      best = search.measured([found[n] for n in names], measure)
      kept[key] = next(n for n in names if found[n] is best)
      folder.write_json('measured.json', kept)
  return {key: found[name] for key, name in kept.items()}


def _of(found: Mapping[str, Any], option: str, metric: str) -> list[str]:
  """Names of allocations by a metric's tables, baselines left out."""
  heads = [f'{option}/{metric}{mark}' for mark in '-.@']
  return [n for n in found if n.startswith(tuple(heads)) and '-random' not in n]
