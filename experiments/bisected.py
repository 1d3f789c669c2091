"""Allocations by bisection to a quality (arXiv 2306.04879)."""

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
    for each in encoders:
      allocated.encoder(each)


def fits(config: Any, table: search.Table) -> None:
  """Whether the rows of a table can be lowered level by level.

  Raises:
    ConfigError: they have different numbers of options.
  """
  if not config.get('bisected', ()):
    return
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
    if metric not in spaces.metrics(config, work):
      continue
    table = tables.get(name, tables[metric])
    key = f'{loss:g} lost/{name}-bisected'
    if key not in kept:
      try:
        made = search.bisect(
          table,
          measure(config, work, encoders),
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
  """
  program = allocated.program(config, work, encoders)
  apply = program.simulated()

  def measured(choice):
    state = program.bits(program.choice(choice))
    found = quality.assess(
      *(work.apply, work.params),
      *(apply, program.variables(work.params, state)),
      spaces.measured_on(config, work),
      work.metric,
    )
    return _share(found, work.metric.primary)

  return measured


def _share(found: Mapping[str, Any], primary: str) -> float:
  if primary not in found['quality']:  # agreement: of the float model with
    return found['contrast'][primary].value  # itself it is one
  now, before = (
    found[part][primary].value for part in ('quality', 'reference')
  )
  return before / now if primary == 'perplexity' else now / before
