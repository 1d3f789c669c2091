"""Search spaces and tables from a config's plain values."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import quantlab as ql
from experiments import steps, variants
from quantlab import data, models, runtime, search
from quantlab.runtime import files
from quantlab.search import objectives
from quantlab.search import program as program_lib


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


def measured_on(config: Any, work: models.Workload) -> Any:
  """The labelled batches that sensitivities are measured on."""
  if config.get('distilled', 0):
    return _labelled(work)
  step = _step(config)
  return Part(work.evaluation, 0, step * config.batches, step)


@functools.lru_cache(maxsize=1)
def _labelled(work: models.Workload) -> list[Any]:
  """The calibration set, its labels what the model says."""
  predict = jax.jit(work.apply)
  return [(*x, predict(work.params, *x).argmax(-1)) for x in work.calibration]


def _distilled(work: models.Workload, count: int, seed: int) -> Any:
  """The model with one batch that its BatchNorms expect, for calibration."""
  x, _ = search.distill(
    *(work.apply, work.params, like(work, count)), jax.random.key(seed)
  )
  batch = data.Batches((np.asarray(x),), count)
  return dataclasses.replace(work, calibration=batch)


def like(work: models.Workload, count: int) -> jax.ShapeDtypeStruct:
  """The shape of so many distilled examples.

  Raises:
    ConfigError: the model is no classifier.
  """
  if work.metric.name != 'classification':
    raise variants.ConfigError(
      f'distilled={count} is for classifiers with BatchNorms; {work.name!r} is '
      f'judged by {work.metric.name}'
    )
  [found] = work.example
  return jax.ShapeDtypeStruct((count, *np.shape(found)[1:]), found.dtype)


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
  known = has(work)
  return tuple(m for m in config.metrics if m in known)


def has(work: models.Workload) -> tuple[str, ...]:
  """The metrics that the task of a model has."""
  known = objectives.known(work.metric)
  absent = {n for n in objectives.DIRECT if n not in known}
  if 'loss' in absent:  # of what else the gradient is zero
    absent.add('fisher')
  return tuple(m for m in search.METRICS if m not in absent)


def tables(
  folder: runtime.Workdir, config: Any, work: models.Workload
) -> dict[str, search.Table]:
  """The table of every metric: read where they are, else measured and kept."""
  kept = folder.read_json('tables.json')
  if kept is not None:
    return read_tables('tables.json', kept, work)
  names = metrics(config, work)
  if absent := [m for m in config.metrics if m not in names]:
    print(f'not measured, a task of {work.metric.name} has none:', *absent)
  with runtime.timed() as timer:
    found = _measure(config, work, names)
  folder.write_json('tables.json', {k: t.to_json() for k, t in found.items()})
  folder.write_json('seconds.json', {'tables': timer.seconds})
  return found


def read_tables(
  file: str, kept: Any, work: models.Workload
) -> dict[str, search.Table]:
  """Tables that a file holds.

  Raises:
    ConfigError: they are no tables, or of another model.
  """
  mine = runtime.fingerprint(work.params)
  try:
    found = {k: search.Table.from_json(v) for k, v in dict(kept).items()}
    for table in found.values():
      table.check_model(mine)
  except (TypeError, ValueError) as error:
    raise variants.ConfigError(
      f'{file} cannot be used: {error}. Remove it to measure again'
    ) from error
  return found


def unmeasured(config: Any, work: models.Workload) -> search.Table:
  """The table of a search with its costs, and zero for all that is measured.

  What a config asks for can be tried on it before anything is measured.
  """
  if config.get('distilled', 0):
    inputs: Any = (like(work, config.distilled),)
  else:
    batch = next(iter(measured_on(config, work)))
    inputs, _ = program_lib.split(batch, work.metric.targets)
  found = space(config, work, inputs, costs(config))
  zeros = tuple(np.zeros(len(r.options)) for r in found.rows)
  return search.Table(
    *(found.rows, zeros, zeros, found.costs, '', ''),
    fixed=found.fixed,
    kept=found.kept,
    layers=found.layers,
  )


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
  base: str | None = None,
  **more: Any,
) -> dict[str, search.Table]:
  """Tables of what is run.

  Args:
    config: of the search.
    work: the model.
    base: an option, to measure around it, by the metrics in `config.around`
      alone.
    **more: as `ql.sensitivity` has it, such as `encode` and `calibration`.
  """
  names = tuple(
    n
    for n in metrics(config, work)
    if n in objectives.DIRECT and (base is None or n in config.around)
  )
  if not names:
    return {}
  return _sensitivity(
    config, work, measured_on(config, work), names, base=base, **more
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
    **{'calibration': work.calibration, **more},
  )


def costs(config: Any) -> dict[str, Any]:
  """Costs beside those that need no measurement: seconds, if there are any."""
  if not config.latency:
    return {}
  try:
    kept = files.read_json(config.latency)
    return {'latency': ql.cost.LatencyTable.from_json(kept['latency'])}
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise variants.ConfigError(
      f'latency={config.latency!r} holds no measured latencies '
      f'({type(error).__name__}: {error}); configs/bench/latency.py makes them'
    ) from error


def space(
  config: Any, work: models.Workload, inputs: Any = None, costs: Any = None
) -> search.Space:
  """The choices of a config on its model.

  Args:
    config: of the search.
    work: the model.
    inputs: their shapes are traced; the model's example by default.
    costs: further ones, see `search.space`.
  """
  return search.space(
    *(work.apply, work.params, choices(config)),
    *(work.example if inputs is None else inputs),
    ties=config.get('ties', ()),
    costs=costs,
  )


def program(config: Any, work: models.Workload) -> search.Program:
  """The model with its choices, static ranges calibrated."""
  found = space(config, work)
  return search.Program(work.apply, work.params, found, work.calibration)


def shapes(config: Any) -> models.Workload | None:
  """The model of a config, parameters shapes, or None with a message.

  Nothing is trained or distilled: to look at before any work.
  """
  return steps.load(config, config.model, shapes_only=True, **_sizes(config))


def workload(config: Any) -> models.Workload:
  """The model of a config.

  Raises:
    ConfigError: its files are not here.
  """
  work = steps.load(config, config.model, **_sizes(config))
  if work is None:
    raise variants.ConfigError(f'the files of {config.model!r} are not here')
  if not config.get('distilled', 0):
    return work
  return _distilled(work, config.distilled, config.seed)


def _sizes(config: Any) -> dict[str, int]:
  return {'batch_size': config.batch_size} if config.batch_size else {}


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
