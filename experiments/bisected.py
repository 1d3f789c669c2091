"""Allocations by bisection to a quality (arXiv 2306.04879)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import allocated, spaces, variants
from quantlab import models, quality, report, runtime, search
from quantlab.search import bisection


def check(config: Any) -> None:
  """Whether `bisected` names tables of the config, and encoders.

  Raises:
    ConfigError: says which it does not.
  """
  for name, _ in config.get('bisected', ()):
    metric, *encoders = name.split('.')
    variants.check_name('metric in bisected=', metric, tuple(config.metrics))
    if len(encoders) > 1:
      raise variants.ConfigError(
        f'bisected={name!r}: expected a table, or a table and one encoder, '
        "such as 'hessian.gptq'"
      )
    for each in encoders:
      allocated.encoder(each)


def fits(config: Any, work: models.Workload, table: search.Table) -> None:
  """Whether the rows of a table can be lowered level by level.

  Raises:
    ConfigError: they have different numbers of options; a metric that the
      task does not have.
  """
  if not config.get('bisected', ()):
    return
  known = spaces.metrics(config, work)
  for name, _ in config.bisected:
    variants.check_name(
      'metric in bisected=', name.partition('.')[0], tuple(known)
    )
  try:
    bisection.check_levels(table)
  except ValueError as error:
    raise variants.ConfigError(
      f'bisected={config.bisected!r}: {error}'
    ) from error


def allocations(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  tables: Mapping[str, search.Table],
) -> dict[str, search.Allocation]:
  """The cheapest options that keep a measured quality; one for each target.

  Quality is the share that is kept of the float model's primary number
  (accuracy, rank correlation; of a perplexity, which is to be small, the
  inverse) on the batches of the tables.

  Args:
    folder: keeps what was measured, in bisection.json.
    config: `bisected` are pairs of a table, by whose order rows are lowered
      ('hessian', or 'hessian.gptq', measured on what an encoder makes), and
      the share that may be lost.
    work: the model.
    tables: by metric; the one with interactions gives the augmented order.

  Raises:
    ConfigError: a quality that is out of reach.
  """
  kept = folder.read_json('bisection.json', {})
  found = {}
  for name, loss in config.get('bisected', ()):
    metric, *encoders = name.split('.')
    table = tables.get(name, tables[metric])
    key = f'{loss:g} lost/{name}-bisected'
    if key not in kept:
      try:
        made = search.bisect(
          table,
          _kept(folder, name, measure(config, work, encoders)),
          1 - loss,
          cost=config.cost,
        )
      except ValueError as error:
        raise variants.ConfigError(
          f'bisected={(name, loss)!r}: {error}'
        ) from error
      kept[key] = {
        'choice': made.choice,
        'quality': made.quality,
        'target': 1 - loss,
        'measured': made.measured,
        'violations': made.violations,
      }
      folder.write_json('bisection.json', kept)
    found[key] = search.Allocation(
      table, tuple(kept[key]['choice']), 'bisected', {}
    )
    folder.metrics.record(f'bisection/{key}', _counted(kept[key]))
  for rows in sections(folder).values():
    report.print_rows(rows)
  return found


def _kept(
  folder: runtime.Workdir, name: str, measure: Callable[[Any], float]
) -> Callable[[Any], float]:
  """The measure, each result of which is kept: a kill loses one at most."""
  file = 'bisection_measured.json'
  kept = folder.read_json(file, {})
  # NaN is text in JSON.
  known = {tuple(c): float(q) for c, q in kept.get(name, ())}

  def measured(choice):
    if choice not in known:
      known[choice] = measure(choice)
      kept[name] = list(known.items())
      folder.write_json(file, kept)
    return known[choice]

  return measured


def sections(folder: runtime.Workdir) -> dict[str, list[dict[str, Any]]]:
  """Of the page: how many measurements each bisection took."""
  kept = folder.read_json('bisection.json', {})
  rows = [{'allocation': key, **_counted(one)} for key, one in kept.items()]
  return {'Bisection': rows} if rows else {}


def _counted(one: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'target': one['target'],
    'quality': one['quality'],
    'measurements': len(one['measured']),
    'violations': one['violations'],
  }


def measure(
  config: Any, work: models.Workload, encoders: Sequence[str] = ()
) -> Callable[[Sequence[int]], float]:
  """`choice -> share of the float model's quality`, large is good.

  Args:
    config: of a search.
    work: its model.
    encoders: as `allocated.measure` has it.

  Returns:
    The function; NaN where outputs are no numbers. It raises a ConfigError
    where the float model has no quality of which a share could be kept.
  """
  program = allocated.program(config, work, encoders)
  apply = program.simulated()

  def measured(choice):
    state = program.bits(program.choice(choice))
    try:
      found = quality.assess(
        *(work.apply, work.params),
        *(apply, program.variables(work.params, state)),
        spaces.measured_on(config, work),
        work.metric,
      )
    except quality.NonFiniteError:
      return math.nan
    return _share(found, work.metric.primary)

  return measured


def _share(found: Mapping[str, Any], primary: str) -> float:
  if primary not in found['quality']:  # agreement: of the float model with
    return found['contrast'][primary].value  # itself it is one
  now, before = (
    found[part][primary].value for part in ('quality', 'reference')
  )
  if not before > 0:
    raise variants.ConfigError(
      f'the {primary} of the float model is {before:g} on the batches of the '
      'tables: expected a positive one, of which a share can be kept'
    )
  return before / now if primary == 'perplexity' else now / before
