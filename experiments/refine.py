r"""Black-box refinement of a search: one worker; start as many as there are.

  python -m experiments.refine --config=configs/search/digits.py \
    --workdir=runs/search_digits --storage=runs/digits.journal --trials=40

Reads the tables that `experiments.search` left in the workdir, begins with what
one of them would choose within each budget and along its front, and goes on
with NSGA-II, or NSGA-II on predictors, over true measurements of (loss, bytes)
on the batches that the tables were not measured on. Copies of the command are
workers of one study; one that is killed loses nothing. `--storage` is a file
that all see, or the URL of a database. `--source` is the storage of a finished
refinement over the same rows and options (of another training of the model, on
fewer batches), whose trials train the predictors; those of this study correct
them (APQ, arXiv 2006.08509). The folder `refined` gets refined.json (history,
counts, seconds, and the front by options), a plan for each point of the front,
and report.html.
"""

from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath

import quantlab as ql
from experiments import (
  command_line,
  fields,
  search_configs,
  sensitivity,
  spaces,
  variants,
)
from quantlab import report, runtime, search
from quantlab.report import plots, search_plots
from quantlab.runtime import files
from quantlab.search import objectives, storages, study


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  sensitivity.define_flags(values)
  flags.DEFINE_string('storage', None, 'A file, or a URL.', flag_values=values)
  flags.DEFINE_integer(
    'trials',
    40,
    'Finished trials, of all workers; one more of each that runs then.',
    flag_values=values,
  )
  flags.DEFINE_enum(
    'sampler', 'predicted', search.SAMPLERS, 'How.', flag_values=values
  )
  flags.DEFINE_string('metric', 'kl', 'Table to start at.', flag_values=values)
  flags.DEFINE_string(
    'source', None, 'Storage that predictors learn from.', flag_values=values
  )
  flags.DEFINE_integer(
    'seed', None, "Of the sampler; the config's by default.", flag_values=values
  )


def run(
  config: Any,
  workdir: str,
  storage: str,
  trials: int,
  sampler: str = 'predicted',
  metric: str = 'kl',
  source: str | None = None,
  seed: int | None = None,
) -> list[dict[str, Any]]:
  """One worker's part; returns the front as rows."""
  _check(config, storage, trials, sampler, source, seed)
  if not search_configs.ready(config):
    return []
  kept = _kept(config, workdir)
  variants.check_name('metric', metric, tuple(kept))
  runtime.make_writable(epath.Path(workdir) / 'refined')
  if source is not None:
    shapes = spaces.shapes(config)
    assert shapes is not None  # they were, when `ready` looked
    search.trials_of(source, spaces.unmeasured(config, shapes), 2)
  study.check_about(storage, about(config))
  work = spaces.workload(config)
  table = search.additive(
    spaces.read_tables(f'{workdir}/tables.json', kept, work)[metric]
  )
  objective = objectives.default(work.metric)
  made = search.Study(
    table,
    storage,
    (objective, 'bytes'),
    sampler=sampler,
    # What a design is for, a source knows.
    first=16 if source is None else 0,
    known={'bytes': table.cost},
    about=about(config),
    source=source,
    seed=config.seed if seed is None else seed,
  )
  program = spaces.program(config, work)
  measure = search.Measure(
    program, spaces.judged_on(config, work), work.metric, [objective]
  )

  def both(choice):
    [(value, _)] = measure([program.choice(choice)])[objective]
    return value, table.cost(choice)

  begun = starts(config, table.floored())
  made.run(both, trials, begun)
  print(made.counts())
  for i, (choice, _) in enumerate(made.best()):
    plan = ql.plan(
      work.apply,
      work.params,
      search.Allocation(table, choice, sampler, {}),
      *work.example,
    )
    files.write_json(f'{workdir}/refined/{i}/plan.json', plan.to_json())
  how = {'sampler': sampler, 'seed': seed, 'metric': metric}
  if source is not None:
    how['source'] = storages.shown(source)
  files.write_json(f'{workdir}/refined/refined.json', how | results(made))
  return _shown(config, workdir, made, sampler, begun)


def about(config: Any) -> dict[str, Any]:
  """What a study of a config measures, beyond rows, costs and parameters."""
  names = (
    *('model', 'seed', 'choices', 'distilled', 'calibration', 'evaluation'),
    *('batch_size', 'batches', 'judged', 'alternate'),
  )
  values = config.to_dict()
  return {name: values[name] for name in names}


def starts(config: Any, table: search.Table) -> list[tuple[int, ...]]:
  """What a table would choose: within each budget, and along its front."""
  within = [
    search.allocate(
      table,
      {config.cost: table.cost(table.uniform(option), config.cost)},
      'dp',
    ).choice
    for option in config.budgets
  ]
  front = search.pareto(table)
  at = np.linspace(0, len(front) - 1, min(len(front), 6)).astype(int)
  return list(dict.fromkeys([*within, *(front.choice(i) for i in at)]))


def results(made: search.Study) -> dict[str, Any]:
  """All that a study holds, JSON-able.

  Returns:
    The options of each row; the history, each a choice (indices of options)
    with its values, None where it failed; counts; the seconds of each trial;
    the front, its plans by the names of options.
  """
  return {
    'rows': {r.name: list(r.options) for r in made.table.rows},
    'objectives': list(made.objectives),
    'history': [
      {'choice': list(choice), 'values': values and list(values)}
      for choice, values in made.history()
    ],
    'counts': made.counts(),
    'seconds': made.seconds(),
    'front': [
      {'options': made.table.labels(choice), **_named(made, values)}
      for choice, values in made.best()
    ],
    'environment': runtime.environment(),
  }


def _named(made, values) -> dict[str, float]:
  return dict(zip(made.objectives, values, strict=True))


def _shown(config, workdir, made, sampler, begun) -> list[dict[str, Any]]:
  """The front on the terminal and the page, with what it began at."""
  rows = [
    {'point': i, **_named(made, values)}
    for i, (_, values) in enumerate(made.best())
  ]
  figure = plots.figure(7, 3.5)
  losses = [v[0] if v else np.nan for _, v in made.history()]
  search_plots.progress(
    figure.subplots(), {sampler: losses}, made.objectives[0]
  )
  figures = {'Progress': figure}
  if rows:  # not every trial failed
    measured = {c: v[::-1] for c, v in made.history() if v}
    figures = {'Front': _front(made, rows, measured, begun), **figures}
  page = report.render_search(
    f'Refinement of {config.model}', {'Front': rows}, figures
  )
  files.write_text(f'{workdir}/refined/report.html', page)
  report.print_rows(rows)
  return rows


def _front(made, rows, measured, begun) -> plots.Figure:
  figure = plots.figure(7, 3.5)
  objective, cost = made.objectives
  costs, values = np.array(sorted((r[cost], r[objective]) for r in rows)).T
  search_plots.front(
    figure.subplots(),
    costs,
    values,
    {f'start {i}': measured[c] for i, c in enumerate(begun) if c in measured},
    cost=cost,
    value=objective,
  )
  return figure


def _check(config, storage, trials, sampler, source, seed) -> None:
  """The arguments alone."""
  fields.check_launcher(config, 'refine')
  fields.check_count('trials', trials, 1)
  if seed is not None:
    fields.check_count('seed', seed, 0)
  variants.check_name('sampler', sampler, search.SAMPLERS)
  if source is None:
    return
  if not source:
    fields.refuse(
      'source', source, 'the storage of a finished refinement, or no --source'
    )
  storages.check_source(source, storage)
  if sampler != 'predicted':
    fields.refuse(
      'source',
      storages.shown(source),
      f"none with sampler={sampler!r}: 'predicted' learns",
    )


def _kept(config, workdir) -> dict[str, Any]:
  """Tables in JSON, of a search that the config has made in a folder."""
  try:
    kept = files.read_json(f'{workdir}/tables.json')
  except OSError as error:
    raise variants.ConfigError(
      f'{workdir!r} has no tables.json that can be read ({error.strerror}): '
      'run experiments.search there first'
    ) from None
  if not isinstance(kept, dict):
    raise variants.ConfigError(
      f'{workdir}/tables.json holds no tables by metric: remove it, and run '
      'experiments.search there again'
    )
  runtime.check_owner(workdir, config.to_dict())
  return kept


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a front or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not (values.config and values.workdir and values.storage):
    raise app.UsageError('--config, --workdir and --storage are needed')
  command_line.guarded(
    run,
    *(values.config, values.workdir, values.storage),
    *(values.trials, values.sampler, values.metric),
    *(values.source, values.seed),
  )


if __name__ == '__main__':
  define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
