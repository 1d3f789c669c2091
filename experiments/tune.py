r"""Tunes the settings of one quantization: a worker; start as many as you like.

  python -m experiments.tune --config=configs/search/quantune.py \
    --workdir=runs/quantune --storage=runs/quantune.journal --trials=24

The config names settings (how many examples to calibrate on, scheme, clipping,
granularity, which sites stay in float); boosted trees on what was measured
propose the next (Quantune, arXiv 2202.05048). The workdir gets best.json, all
trials in order, and report.html.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import quantlab as ql
from experiments import command_line, sensitivity, spaces, variants
from quantlab import models, quality, report, search
from quantlab.report import plots, search_plots
from quantlab.runtime import files
from quantlab.search import study

KEYS = ('calibration', 'weight', 'input', 'float')


def space(config: Any) -> search.Table:
  """One row a setting; what an option costs is not known before."""
  rows = tuple(
    search.Row(name, tuple(options))
    for name, options in config.settings.items()
  )
  zeros = tuple(np.zeros(len(r.options)) for r in rows)
  return search.Table(rows, zeros, zeros, {}, 'setting', '')


def setting(config: Any, table: search.Table, choice: Sequence[int]) -> Any:
  """What the chosen options say together; a later one overrides."""
  found: dict[str, Any] = {}
  settings = config.settings.to_dict()
  for name, label in table.labels(choice).items():
    for key, value in settings[name][label].items():
      if isinstance(value, Mapping):
        value = {**found.get(key, {}), **value}
      found[key] = value
  for key in found:
    variants.check_name('setting', key, KEYS)
  return found


def measure(config: Any, table: search.Table, choice: Sequence[int]) -> float:
  """Loss of accuracy by the chosen settings."""
  chosen = setting(config, table, choice)
  work = _work(config.model, chosen['calibration'], config.seed)
  rules = dict.fromkeys(chosen.get('float', ()))  # before what matches too
  rules['/kernel$'] = {k: chosen[k] for k in ('weight', 'input')}
  model = ql.ptq(
    work.apply,
    work.params,
    ql.recipe({k: variants.rule(v) for k, v in rules.items()}),
    work.calibration,
    key=jax.random.key(config.seed),
  )
  found = quality.assess(
    work.apply,
    work.params,
    model.apply,
    model.params,
    spaces.measured_on(config, work),
    work.metric,
  )
  return -float(found['contrast']['accuracy_change'].value)


@functools.lru_cache(maxsize=8)
def _work(model: str, calibration: int, seed: int) -> models.Workload:
  return models.workload(model, calibration=calibration, seed=seed)


def run(config: Any, workdir: str, storage: str, trials: int) -> dict[str, Any]:
  """One worker's part; returns the best settings and their accuracy's loss."""
  work = spaces.workload(config)
  if work is None:
    return {}
  if work.metric.name != 'classification':
    raise ValueError(
      f'settings are tuned by accuracy, and {config.model!r} is judged by '
      f'{work.metric.name}'
    )
  table = space(config)
  made = study.Study(
    table,
    storage,
    ('accuracy_loss',),
    sampler=config.sampler,
    first=config.first,
    seed=config.seed,
  )
  made.run(functools.partial(measure, config, table), trials)
  history = made.history()
  rows: list[dict[str, Any]] = [
    {**table.labels(c), 'accuracy_loss': v[0] if v else float('nan')}
    for c, v in history
  ]
  best = min(rows, key=lambda r: np.nan_to_num(r['accuracy_loss'], nan=np.inf))
  files.write_json(f'{workdir}/best.json', best)
  files.write_json(f'{workdir}/trials.json', rows)
  figure = plots.figure(7, 3.5)
  losses = [r['accuracy_loss'] for r in rows]
  search_plots.progress(
    figure.subplots(), {config.sampler: losses}, 'loss of accuracy'
  )
  page = report.render_search(
    f'Settings of {config.model}',
    {'Best': [best], 'Trials': rows},
    {'Progress': figure},
  )
  files.write_text(f'{workdir}/report.html', page)
  print(made.counts())
  report.print_rows([best])
  return best


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, the best settings or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not (values.config and values.workdir and values.storage):
    raise app.UsageError('--config, --workdir and --storage are needed')
  try:
    run(values.config, values.workdir, values.storage, values.trials)
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  sensitivity.define_flags()
  flags.DEFINE_string('storage', None, 'A file, or a URL.')
  flags.DEFINE_integer('trials', 24, 'Finished trials, of all workers.')
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
