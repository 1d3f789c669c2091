r"""Mixed precision: allocations at equal cost, quantized and judged.

  python -m experiments.search --config=configs/search/digits.py \
    --workdir=runs/search_digits

Measures (or reads) the sensitivity tables, then for each budget and method
finds an allocation, quantizes the model by it with each encoder and
calibration seed, and judges it on batches that no table has seen. A config
that carries a table (hawq_v3) is solved only: it leaves no tables, plans and
measurements. The workdir gets config.json,
manifest.json, tables.json, plan.json (by name; `ql.Plan.from_json` reads one,
`ql.ptq` takes it), metrics.json, agreement.json (Spearman of what each table
predicts of all these plans with what was measured of them) and report.html. The
same command resumes.
"""

from typing import Any

import numpy as np
from absl import app, flags, logging

import quantlab as ql
from experiments import (
  agreement,
  allocated,
  bisected,
  command_line,
  decoupled,
  fields,
  measured,
  search_configs,
  sensitivity,
  spaces,
)
from quantlab import report, runtime, search
from quantlab.report import plots, search_plots


def solve(config: Any, workdir: str) -> dict[str, Any]:
  """The allocations of a table that the config carries; flat metrics."""
  table = search_configs.check_table(config)
  metrics: dict[str, Any] = {}
  chosen = {}
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    for cost, limit in config.budgets.items():
      for method in config.methods:
        found = ql.allocate(
          table,
          {cost: limit},
          method,
          ties=config.get('ties', ()),
          seed=config.seed,
        )
        name = f'{cost}/{method}'
        chosen[name] = [found.options[r.name] for r in found.table.rows]
        metrics[f'{name}/objective'] = found.value
        metrics |= {f'{name}/{k}': v for k, v in found.costs.items()}
        print(f'{name:18} objective {found.value:.4f} ', found.costs)
    folder.write_json('metrics.json', metrics)
    rows = [r.name for r in table.tied(config.get('ties', ())).rows]
    page = report.render_search(
      config.get('title', 'Allocation'), {}, {'Options': _map(rows, chosen)}
    )
    folder.write_text('report.html', page)
  return metrics


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns the flat metrics."""
  if fields.check_launcher(config, 'search') == 'rows':
    return solve(config, workdir)
  if not search_configs.ready(config):
    return {}
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    work = spaces.workload(config)
    tables = spaces.tables(folder, config, work)
    tables |= allocated.tables(folder, config, work)
    found = allocations(config, tables)
    found |= decoupled.allocations(folder, config, work, tables)
    found |= measured.allocations(folder, config, work, found)
    found |= bisected.allocations(folder, config, work, tables)
    for name, made in found.items():
      if name not in folder.read_json('plan.json', {}):
        plan = ql.plan(work.apply, work.params, made, *work.example)
        folder.update_json('plan.json', name, plan.to_json())
    allocated.judge(folder, config, work, found)
    rows = _rows(config, folder, found)
    report.print_rows(rows)
    ranks = agreement.rows(config, tables, found, folder.metrics.values)
    folder.write_json('agreement.json', ranks)
    report.print_rows(agreement.summary(ranks))
    sections = {
      'Allocations': rows,
      **bisected.sections(folder),
      'Rank correlation of predicted and measured': ranks,
    }
    folder.write_text('report.html', _page(config, tables, found, sections))
    return dict(folder.metrics.values)


def allocations(
  config: Any, tables: dict[str, search.Table]
) -> dict[str, search.Allocation]:
  """By budget and method; the costs of uniform ones are the budgets.

  What has no table here (its metric or encoder is not in the config, or the
  task has no such metric) is said and left out.
  """
  found = {}
  absent: dict[str, None] = {}
  first = next(iter(tables.values()))
  for option in config.budgets:
    uniform = search.Allocation(first, first.uniform(option), 'uniform', {})
    found[f'{option}/uniform'] = uniform
    for metric, method in config.allocations:
      here = metric + option if metric.endswith('@') else metric
      if here not in tables:
        absent[f'{metric}-{method} (no such table)'] = None
        continue
      table = tables[here]
      # Where zero is no change; around an option, less is better than nothing.
      if metric != 'sqnr' and here == metric:
        table = table.floored()
      if method != 'quadratic':  # the others know sums alone
        table = search.additive(table)
      elif table.interactions is None:
        absent[f'{metric}-quadratic (no interactions)'] = None
        continue
      draws = range(config.get('draws', 1) if method == 'random' else 1)
      for draw in draws:
        name = f'{option}/{metric}-{method}' + f'-{draw}' * (len(draws) > 1)
        found[name] = ql.allocate(
          table,
          {config.cost: uniform.costs[config.cost]},
          method,
          seed=config.seed + draw,
        )
  if absent:
    print('not solved, for want of a measurement:', ', '.join(absent))
  return found


def _rows(config, folder, found) -> list[dict[str, Any]]:
  """Mean and range over calibration seeds of what was measured."""
  rows = []
  values = folder.metrics.values
  short = search_plots.short(found)
  for name, made in found.items():
    row: dict[str, Any] = {
      'allocation': short[name],
      'bytes': made.costs['bytes'],
    }
    if config.cost != 'bytes':
      row[config.cost] = made.costs[config.cost]
    if made.method != 'uniform':  # which is of no table
      row['predicted'] = made.value
    for encoder in config.encoders:
      failed = sum(
        f'q/{name}/{encoder}/{s}/failed' in values for s in range(config.seeds)
      )
      if failed:  # of calibration seeds
        row[f'{encoder} failed, NaN or infinite'] = failed
      for key in config.show:
        each = [
          values[f'q/{name}/{encoder}/{s}/{key}']
          for s in range(config.seeds)
          if f'q/{name}/{encoder}/{s}/{key}' in values
        ]
        if each:
          row[f'{encoder} {key}'] = float(np.mean(each))
          if len(each) > 1:
            row[f'{encoder} {key}, range'] = (
              f'{min(each):.4g} to {max(each):.4g}'
            )
    rows.append(row)
  return rows


def _map(rows, chosen) -> plots.Figure:
  lines = 1 + max(o.count(', ') for c in chosen.values() for o in c)
  figure = plots.figure(
    2.5 + 0.6 * len(chosen), 2 + 0.12 * (1 + lines) * len(rows)
  )
  search_plots.bit_map(figure.subplots(), rows, chosen)
  return figure


def _belongs(name: str, metric: str) -> bool:
  """Whether a plan is drawn beside a metric's front."""
  return name.startswith((f'{metric}-', f'{metric}@')) or (
    name == 'uniform' or '-random' in name
  )


def _page(config, tables, found, sections) -> str:
  figures = {}
  for metric, table in tables.items():
    if '@' in metric:  # its values begin elsewhere
      continue
    plain = search.additive(table)
    front = search.pareto(plain, config.cost)
    points = {
      n: (a.costs[config.cost], plain.predict(a.choice))
      for n, a in found.items()
      if _belongs(n.rpartition('/')[2], metric)
    }
    figure = plots.figure(9, max(3.6, 0.5 + 0.17 * len(points)))
    search_plots.front(
      figure.subplots(),
      *(front.cost, front.value, points),
      cost=config.cost,
      value=metric,
    )
    figures[f'Front of {metric}'] = figure
  names = [r.name for r in next(iter(tables.values())).rows]
  chosen = {n: [*a.options.values()] for n, a in found.items()}
  figures['Options'] = _map(names, chosen)
  return report.render_search(
    f'Mixed precision of {config.model}', sections, figures
  )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a workdir or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if values.config is None or not values.workdir:
    raise app.UsageError('--config and --workdir are needed')
  command_line.guarded(run, values.config, values.workdir)


if __name__ == '__main__':
  sensitivity.define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
