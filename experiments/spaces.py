"""Search spaces and tables from a config's plain values."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

import quantlab as ql
from experiments import steps, variants
from quantlab import models, runtime, search
from quantlab.runtime import files
from quantlab.search import objectives


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Some of the batches of an evaluation set; re-iterable.

  Attributes:
    batches: all of them.
    start, stop, step: which ones.
  """

  batches: Any
  start: int
  stop: int | None
  step: int = 1

  def __iter__(self) -> Iterator[Any]:
    return itertools.islice(self.batches, self.start, self.stop, self.step)


def measured_on(config: Any, work: models.Workload) -> Part:
  """The labelled batches that sensitivities are measured on."""
  step = _step(config)
  return Part(work.evaluation, 0, step * config.batches, step)


def judged_on(config: Any, work: models.Workload) -> Part:
  """The labelled batches that choices are judged on: others."""
  step = _step(config)
  start = config.batches if step == 1 else 1
  return Part(work.evaluation, start, config.judged or None, step)


def _step(config: Any) -> int:
  """2 where measured and judged batches alternate."""
  return 2 if config.get('alternate', False) else 1


def choices(config: Any) -> dict[str, Any]:
  """The search space: a tuple of rules is a list of options."""
  found = {}
  for pattern, rules in config.choices:
    single = rules is None or isinstance(rules, Mapping)
    found[pattern] = (
      variants.rule(rules) if single else [variants.rule(r) for r in rules]
    )
  return found


def metrics(config: Any, work: models.Workload) -> tuple[str, ...]:
  """The metrics of a config that the task has."""
  known = objectives.known(work.metric)
  return tuple(
    m for m in config.metrics if m not in objectives.DIRECT or m in known
  )


def tables(
  folder: runtime.Workdir, config: Any, work: models.Workload
) -> dict[str, search.Table]:
  """The table of every metric: read where they are, else measured and kept."""
  kept = folder.read_json('tables.json')
  if kept is not None:
    found = {k: search.Table.from_json(v) for k, v in kept.items()}
    for table in found.values():
      table.check_model(runtime.fingerprint(work.params))
    return found
  names = metrics(config, work)
  with runtime.timed() as timer:
    found = _measure(config, work, names)
  folder.write_json('tables.json', {k: t.to_json() for k, t in found.items()})
  folder.write_json('seconds.json', {'tables': timer.seconds})
  return found


def _measure(
  config: Any, work: models.Workload, names: tuple[str, ...]
) -> dict[str, search.Table]:
  """Tables in order: what is run on all batches, derivatives on fewer."""
  found = direct_tables(config, work)
  rest = tuple(n for n in names if n not in found)
  if rest:
    few: Any = measured_on(config, work)
    if config.curved:
      few = [tuple(x[: config.curved] for x in next(iter(few)))]
    found |= _sensitivity(config, work, few, rest)
  return {n: found[n] for n in names}


def direct_tables(
  config: Any,
  work: models.Workload,
  encode: Callable | None = None,
  base: str | None = None,
) -> dict[str, search.Table]:
  """Tables of what is run; of weights that were encoded, if they are.

  Around an option they are of the metrics in `config.around` alone.
  """
  names = tuple(
    n
    for n in metrics(config, work)
    if n in objectives.DIRECT and (base is None or n in config.around)
  )
  if not names:
    return {}
  return _sensitivity(
    config, work, measured_on(config, work), names, encode=encode, base=base
  )


def _sensitivity(config, work, batches, names, **more):
  return ql.sensitivity(
    work.apply,
    work.params,
    choices(config),
    batches,
    names,
    task=work.metric,
    ties=config.get('ties', ()),
    costs=costs(config),
    interactions=[n for n in config.interactions if n in names],
    probes=config.probes,
    iterations=config.iterations,
    key=jax.random.key(config.seed),
    **more,
  )


def costs(config: Any) -> dict[str, Any]:
  """Costs beside those that need no measurement: seconds, if there are any."""
  if not config.latency:
    return {}
  try:
    data = files.read_json(config.latency)
    return {'latency': ql.cost.LatencyTable.from_json(data['latency'])}
  except (OSError, KeyError, ValueError) as error:
    raise variants.ConfigError(
      f'latency={config.latency!r} holds no measured latencies '
      f'({type(error).__name__}: {error}); configs/bench/latency.py makes them'
    ) from error


def space(config: Any, work: models.Workload) -> search.Space:
  """The choices of a config on its model."""
  return search.space(work.apply, work.params, choices(config), *work.example)


def program(config: Any, work: models.Workload) -> search.Program:
  """The model with its choices, static ranges calibrated."""
  found = space(config, work)
  return search.Program(work.apply, work.params, found, work.calibration)


def workload(config: Any) -> models.Workload | None:
  """The model of a config, or None with a message."""
  variants.check_name('model', config.model, tuple(models.WORKLOADS))
  for name in metrics_of(config):
    variants.check_name('metric', name, search.METRICS)
  sizes = {'batch_size': config.batch_size} if config.batch_size else {}
  return steps.load(config, config.model, **sizes)


def metrics_of(config: Any) -> tuple[str, ...]:
  return tuple(config.metrics)


def from_config(config: Any) -> search.Table:
  """The table that a config spells out: rows, sensitivity, costs."""
  rows = tuple(search.Row(name, tuple(found)) for name, found in config.rows)

  def columns(numbers):
    return tuple(np.asarray(x, float) for x in numbers)

  found = columns(config.sensitivity)
  return search.Table(
    rows=rows,
    values=found,
    stderr=tuple(np.zeros_like(v) for v in found),
    costs={name: columns(c) for name, c in config.costs.items()},
    metric=config.metric,
    unit=config.unit,
  )
