r"""Sensitivity of every site to every format, by every metric, and the truth.

  python -m experiments.sensitivity --config=configs/search/digits.py \
    --workdir=runs/search_digits

Measures the tables of the config's metrics on its first labelled batches, then
on the others the true change of loss of quantizing one site, and of
`random_plans` random plans. Prints Spearman's rank correlation of every metric
with the truth (bootstrap intervals over sites and options), and how much of
the loss of random plans the sums of entries explain, with and without
interactions. The workdir gets config.json, manifest.json, tables.json,
truth.json, sensitivity.json and sensitivity.html; `experiments.search` may have
the same one, and then measures no table again.
"""

import sys
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line, spaces, variants
from quantlab import models, quality, report, runtime, search
from quantlab.quality import estimate, functions
from quantlab.report import plots, search_plots
from quantlab.search import objectives


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  config_flags.DEFINE_config_file(
    'config', None, 'What to measure.', flag_values=values
  )
  flags.DEFINE_string('workdir', None, 'Where results go.', flag_values=values)


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns the flat metrics."""
  if 'model' not in config:
    raise variants.ConfigError(
      'this config is a table of published numbers: there is no model to '
      'measure. Run experiments.search on it'
    )
  work = spaces.workload(config)
  if work is None:
    return {}
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    tables = spaces.tables(folder, config, work)
    truth = _truth(folder, config, work, tables)
    rows = _correlations(tables, truth)
    explained = _explained(tables, truth)
    metrics = {
      f'spearman/{r["metric"]}/{r["options"]}{k}': r[n]
      for r in rows
      for k, n in (('', 'spearman'), ('_low', 'low'), ('_high', 'high'))
    }
    metrics |= {
      f'random_plans/{r["table"]}/{k}': v
      for r in explained
      for k, v in r.items()
      if k != 'table'
    }
    folder.write_json('sensitivity.json', metrics)
    report.print_rows(rows)
    report.print_rows(explained)
    page = report.render_search(
      f'Sensitivity of {config.model}',
      {
        f'Rank correlation with the true {truth["objective"]}': rows,
        'Loss of random plans': explained,
      },
      {n: _bars(t) for n, t in tables.items()},
    )
    folder.write_text('sensitivity.html', page)
    return metrics


def _bars(table: search.Table) -> plots.Figure:
  figure = plots.figure(9, 0.8 + 0.35 * len(table.rows))
  search_plots.sensitivity_bars(figure.subplots(), table)
  return figure


def _truth(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  tables: dict[str, search.Table],
) -> dict[str, Any]:
  """Measured changes: of one row alone by entry, and of random plans."""
  kept = folder.read_json('truth.json')
  if kept is not None:
    return kept
  table = next(iter(tables.values()))
  rng = np.random.default_rng(config.seed)
  plans = [
    [int(rng.integers(len(r.options))) for r in table.rows]
    for _ in range(config.random_plans)
  ]
  objective = objectives.default(work.metric)
  found = search.space(
    work.apply, work.params, spaces.choices(config), *work.example
  )
  program = search.Program(work.apply, work.params, found, work.calibration)
  measure = search.Measure(
    program, spaces.judged_on(config, work), work.metric, [objective]
  )
  chosen = [program.alone(i, k, program.float) for i, k in table.flat]
  chosen += [program.choice(p) for p in plans]
  with runtime.timed() as timer:
    values = measure(chosen, runtime.track)[objective]
  count = len(table.flat)
  truth = {
    'objective': objective,
    'alone': values[:count],
    'plans': plans,
    'joint': values[count:],
    'seconds': timer.seconds,
  }
  folder.write_json('truth.json', truth)
  return truth


def _correlations(tables, truth) -> list[dict[str, Any]]:
  """Spearman of every metric with the truth: all entries, and by option."""
  table = next(iter(tables.values()))
  labels = np.array([table.rows[i].options[k] for i, k in table.flat])
  true = np.array([v for v, _ in truth['alone']])
  rows = []
  for name, found in tables.items():
    value = np.concatenate(found.values)
    for option in ['all', *dict.fromkeys(labels)]:
      use = np.isfinite(value) & np.isfinite(true)
      use &= (labels == option) | (option == 'all')
      if use.sum() < 4:
        continue
      rank = estimate.bootstrap(functions.spearman, value[use], true[use])
      rows.append(
        {
          'metric': name,
          'options': option,
          'spearman': rank.value,
          'low': rank.low,
          'high': rank.high,
          'n': int(use.sum()),
        }
      )
  return rows


def _explained(tables, truth) -> list[dict[str, Any]]:
  """R squared of predicted against measured losses of random plans."""
  joint = np.array([v for v, _ in truth['joint']])
  rows = []
  for name, table in tables.items():
    if name not in ('loss', 'kl', 'similarity', 'fisher', 'hessian'):
      continue
    additive, whole = [], []
    for plan in truth['plans']:
      alone = sum(v[k] for v, k in zip(table.values, plan, strict=True))
      additive.append(alone)
      whole.append(table.predict(plan))
    use = np.isfinite(joint)
    if use.sum() < 3:
      continue
    rows.append(
      {'table': name}
      | _fit('additive', np.array(additive)[use], joint[use])
      | _fit('with interactions', np.array(whole)[use], joint[use])
    )
  return rows


def _fit(label: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
  spread = np.square(true - true.mean()).sum()
  correlation = np.corrcoef(predicted, true)[0, 1]
  return {
    f'{label}: R2': float(1 - np.square(true - predicted).sum() / spread),
    f'{label}: r squared': float(correlation**2),
    f'{label}: Spearman': quality.spearman(predicted, true),
  }


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a workdir or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if values.config is None or not values.workdir:
    raise app.UsageError('--config and --workdir are needed')
  try:
    run(values.config, values.workdir)
  except (variants.ConfigError, runtime.WorkdirError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('stopped; the same command goes on from here', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
