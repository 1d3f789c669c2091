r"""Tunes the settings of one quantization: a worker; start as many as you like.

  python -m experiments.tune --config=configs/search/quantune.py \
    --workdir=runs/quantune --storage=runs/quantune.journal --trials=24

The config names settings (how many examples to calibrate on, scheme, clipping,
granularity, which sites stay in float); boosted trees on what was measured
propose the next (Quantune, arXiv 2202.05048). The workdir, which workers of one
config share, gets config.json, best.json, all trials in order, and report.html.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

import quantlab as ql
from experiments import (
  command_line,
  fields,
  search_configs,
  sensitivity,
  settings,
  spaces,
)
from quantlab import models, quality, report, runtime, search
from quantlab.report import plots, search_plots
from quantlab.runtime import files
from quantlab.search import samplers, storages


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  sensitivity.define_flags(values)
  flags.DEFINE_string('storage', None, 'A file, or a URL.', flag_values=values)
  flags.DEFINE_integer(
    'trials', 24, 'Finished trials, of all workers.', flag_values=values
  )


def measure(config: Any, table: search.Table, choice: Sequence[int]) -> float:
  """Loss of accuracy by the chosen settings."""
  chosen = settings.chosen(config, table.labels(choice))
  work = _work(
    *(config.model, chosen['calibration'], config.seed),
    *(config.evaluation, config.batch_size),
  )
  model = ql.ptq(
    work.apply,
    work.params,
    settings.recipe(chosen),
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
def _work(
  model: str, calibration: int, seed: int, evaluation: int, batch_size: int
) -> models.Workload:
  return models.workload(
    model,
    calibration=calibration,
    evaluation=evaluation or None,
    batch_size=batch_size or None,
    seed=seed,
  )


def run(config: Any, workdir: str, storage: str, trials: int) -> dict[str, Any]:
  """One worker's part; returns the best settings and their accuracy's loss."""
  _check(config, trials)
  shapes = spaces.shapes(config)
  if shapes is None:
    return {}
  search_configs.settings_fit(config, shapes)
  _sign(workdir, config)
  table = settings.space(config)
  made = search.Study(
    table,
    storage,
    ('accuracy_loss',),
    sampler=config.sampler,
    first=config.first,
    about=settings.about(config),
    seed=config.seed,
  )
  made.run(functools.partial(measure, config, table), trials)
  history = made.history()
  rows: list[dict[str, Any]] = [
    {**table.labels(c), 'accuracy_loss': v[0] if v else float('nan')}
    for c, v in history
  ]
  measured = [r for r in rows if np.isfinite(r['accuracy_loss'])]
  if not measured:
    raise ValueError(
      f'none of {len(rows)} trials measured as a number: see the reasons in '
      f'{storages.shown(storage)!r}, or begin another study'
    )
  best = min(measured, key=lambda r: r['accuracy_loss'])
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


def _check(config: Any, trials: Any) -> None:
  """The arguments alone."""
  fields.check_launcher(config, 'tune')
  fields.check_count('trials', trials, 1)
  search_configs.check_settings(config)
  if config.first > samplers.MOST_FIRST:
    fields.refuse(
      'first',
      config.first,
      f'trials of a design, before the sampler: at most {samplers.MOST_FIRST}',
    )


def _sign(workdir: str, config: Any) -> None:
  """The folder, which workers of one config share, or a refusal."""
  folder = epath.Path(workdir)
  runtime.make_writable(folder)
  if not runtime.check_owner(folder, config.to_dict()):
    files.write_json(folder / 'config.json', config.to_dict())


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, the best settings or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not (values.config and values.workdir and values.storage):
    raise app.UsageError('--config, --workdir and --storage are needed')
  command_line.guarded(
    run, values.config, values.workdir, values.storage, values.trials
  )


if __name__ == '__main__':
  define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
