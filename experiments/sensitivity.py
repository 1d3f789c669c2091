r"""Sensitivity of every site to every format, by every metric, and the truth.

  python -m experiments.sensitivity --config=configs/search/digits.py \
    --workdir=runs/search_digits

Measures the tables of the config's metrics on its first labelled batches, and
on the others the true change of loss of quantizing one site. Prints Spearman's
rank correlation of every metric with that truth (bootstrap intervals over sites
and options); and how much of the loss of `random_plans` random plans, measured
on the batches of the tables, sums of their entries explain, alone and with
interactions (bootstrap intervals over plans). The workdir gets config.json,
manifest.json, tables.json, truth.json, sensitivity.json and sensitivity.html;
`experiments.search` may have the same one, and then measures no table again.
"""

import dataclasses
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import (
  agreement,
  command_line,
  fields,
  search_configs,
  spaces,
)
from quantlab import models, report, runtime, search
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
  fields.check_launcher(config, 'sensitivity')
  if not search_configs.ready(config):
    return {}
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    work = spaces.workload(config)
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
      f'random_plans/{r["plans"]}/{r["table"]}/{r["interactions"]}/{k}': v
      for r in explained
      for k, v in r.items()
      if not isinstance(v, str)
    }
    folder.write_json('sensitivity.json', metrics)
    report.print_rows(rows)
    report.print_rows(
      [
        {k: v for k, v in r.items() if not k.endswith(('low', 'high'))}
        for r in explained
      ]
    )
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
  rows = next(iter(tables.values())).rows
  rng = np.random.default_rng(config.seed)
  plans = {
    kind: [
      [
        int(rng.integers(min(low, len(r.options) - 1), len(r.options)))
        for r in rows
      ]
      for _ in range(config.random_plans)
    ]
    for kind, low in config.kinds
  }
  objective = objectives.default(work.metric)
  program = spaces.program(config, work)
  names = dict.fromkeys(
    n for n in (objective, 'kl') if n in objectives.known(work.metric)
  )
  measure = search.Measure(
    program, spaces.measured_on(config, work), work.metric, list(names)
  )
  with runtime.timed() as timer:
    joint = {
      kind: measure([program.choice(p) for p in some], runtime.track)
      for kind, some in plans.items()
    }
    measure.batches = spaces.judged_on(config, work)
    alone = measure(
      [
        program.alone(i, k, program.float)
        for i, r in enumerate(rows)
        for k in range(len(r.options))
      ],
      runtime.track,
    )
  truth = {
    'objective': objective,
    'alone': alone[objective],
    'plans': plans,
    'joint': joint,
    'seconds': timer.seconds,
  }
  folder.write_json('truth.json', truth)
  return truth


def _correlations(tables, truth) -> list[dict[str, Any]]:
  """Spearman of every metric with the truth: all entries, and by option."""
  table = next(iter(tables.values()))
  labels = np.array([table.rows[i].options[k] for i, k in table.flat])
  true = _measured(truth['alone'])
  rows = []
  for name, found in tables.items():
    value = np.concatenate(found.values)
    for option in ['all', *dict.fromkeys(labels)]:
      use = np.isfinite(value) & np.isfinite(true)
      use &= (labels == option) | (option == 'all')
      if use.sum() < 4:
        continue
      rows.append(
        {
          'metric': name,
          'options': option,
          **agreement.rank(value[use], true[use]),
          'n': int(use.sum()),
        }
      )
  return rows


def _explained(tables, truth) -> list[dict[str, Any]]:
  """How well tables predict the loss of random plans, by kind of plan.

  Of what is measured by an objective, plans are measured by the same one.
  """
  rows = []
  for kind, plans in truth['plans'].items():
    for name, table in tables.items():
      measured = truth['joint'][kind]
      true = measured.get(name, measured[truth['objective']])
      true = _measured(true)
      plain = _predictions(search.additive(table), plans)
      # A row without a value for an option leaves out all plans that have it.
      use = np.isfinite(true) & np.isfinite(plain)
      if use.sum() < 3:
        continue
      plain = plain[use]
      for terms, q in _cross_terms(name, tables):
        whole = dataclasses.replace(table, interactions=q)
        predicted = _predictions(whole, plans)[use]
        head = {
          'plans': kind,
          'table': name,
          'interactions': terms,
          'n': int(use.sum()),
        }
        # A value of another unit explains the order, not the loss.
        if name in (*measured, 'fisher', 'hessian'):
          head |= _interval('R2', _explained_variance, predicted, true[use])
        head |= _interval('r squared', _r_squared, predicted, true[use])
        head |= _interval('Spearman', functions.spearman, predicted, true[use])
        if 'R2' in head and q is not None:
          head |= _interval('R2 gain', _gain, plain, predicted, true[use])
        rows.append(head)
  return rows


def _cross_terms(name, tables):
  """None; the table's own interactions; and those of the exact Hessian."""
  own = tables[name].interactions
  found = [('none', None), ('own', own)]
  if name != 'hessian' and own is not None and 'hessian' in tables:
    found.append(('hessian', tables['hessian'].interactions))
  return [(n, q) for n, q in found if n == 'none' or q is not None]


def _interval(name: str, statistic: Any, *columns: Any) -> dict[str, float]:
  """A statistic of plans, with a bootstrap interval over them."""
  found = estimate.bootstrap(statistic, *columns)
  ends = {f'{name} low': found.low, f'{name} high': found.high}
  return {name: found.value, **ends}


def _r_squared(a: np.ndarray, b: np.ndarray) -> float:
  """The square of Pearson's correlation."""
  a, b = a - a.mean(), b - b.mean()
  norms = np.sqrt((a * a).sum() * (b * b).sum())
  return float((a * b).sum() / norms) ** 2 if norms > 0 else float('nan')


def _measured(pairs) -> np.ndarray:
  """Values of (value, standard error); NaN is text in JSON."""
  return np.array([float(v) for v, _ in pairs])


def _predictions(table: search.Table, plans) -> np.ndarray:
  return np.array([table.predict(p) for p in plans])


def _gain(plain: np.ndarray, whole: np.ndarray, true: np.ndarray) -> float:
  """Of R squared, on the same plans."""
  return _explained_variance(whole, true) - _explained_variance(plain, true)


def _explained_variance(predicted: np.ndarray, true: np.ndarray) -> float:
  spread = np.square(true - true.mean()).sum()
  left = np.square(true - predicted).sum()
  return float(1 - left / spread) if spread > 0 else float('nan')


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a workdir or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if values.config is None or not values.workdir:
    raise app.UsageError('--config and --workdir are needed')
  command_line.guarded(run, values.config, values.workdir)


if __name__ == '__main__':
  define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
