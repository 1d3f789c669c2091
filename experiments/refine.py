r"""Black-box refinement of a search: one worker; start as many as there are.

  python -m experiments.refine --config=configs/search/digits.py \
    --workdir=runs/search_digits --storage=runs/digits.journal --trials=40

Reads the tables that `experiments.search` left in the workdir, begins with the
front of one of them and goes on with NSGA-II, or NSGA-II on predictors, over
true measurements of (loss, bytes) on the batches that the tables were not
measured on. Copies of the command are workers of one study; one that is killed
loses nothing. `--storage` is a file that all see, or the URL of a database.
"""

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
from quantlab.search import objectives, study


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  sensitivity.define_flags(values)
  flags.DEFINE_string('storage', None, 'A file, or a URL.', flag_values=values)
  flags.DEFINE_integer(
    'trials', 40, 'Finished trials, of all workers.', flag_values=values
  )
  flags.DEFINE_enum(
    'sampler', 'predicted', study.SAMPLERS, 'How.', flag_values=values
  )
  flags.DEFINE_string('metric', 'kl', 'Table to start at.', flag_values=values)


def run(config, workdir, storage, trials, sampler='predicted', metric='kl'):
  """One worker's part; returns the front as rows."""
  fields.check_launcher(config, 'refine')
  if not isinstance(trials, int) or trials < 1:
    fields.refuse('trials', trials, 'a whole number of them, at least 1')
  variants.check_name('sampler', sampler, study.SAMPLERS)
  if not search_configs.ready(config):
    return []
  kept = _kept(config, workdir)
  variants.check_name('metric', metric, tuple(kept))
  runtime.make_writable(epath.Path(workdir) / 'refined')
  work = spaces.workload(config)
  tables = spaces.read_tables(f'{workdir}/tables.json', kept, work)
  table = search.additive(tables[metric])
  objective = objectives.default(work.metric)
  made = study.Study(
    table,
    storage,
    (objective, 'bytes'),
    sampler=sampler,
    known={'bytes': table.cost},
    seed=config.seed,
  )
  program = spaces.program(config, work)
  measure = search.Measure(
    program, spaces.judged_on(config, work), work.metric, [objective]
  )

  def both(choice):
    [(value, _)] = measure([program.choice(choice)])[objective]
    return value, table.cost(choice)

  front = search.pareto(table.floored())
  at = np.linspace(0, len(front) - 1, min(len(front), 6)).astype(int)
  made.run(both, trials, [front.choice(i) for i in dict.fromkeys(at)])
  print(made.counts())
  rows = []
  for i, (choice, (value, size)) in enumerate(made.best()):
    rows.append({'point': i, objective: value, 'bytes': size})
    plan = ql.plan(
      work.apply,
      work.params,
      search.Allocation(table, choice, sampler, {}),
      *work.example,
    )
    files.write_json(f'{workdir}/refined/{i}/plan.json', plan.to_json())
  figure = plots.figure(7, 3.5)
  losses = [v[0] if v else np.nan for _, v in made.history()]
  search_plots.progress(figure.subplots(), {sampler: losses}, objective)
  page = report.render_search(
    f'Refinement of {config.model}', {'Front': rows}, {'Progress': figure}
  )
  files.write_text(f'{workdir}/refined/report.html', page)
  report.print_rows(rows)
  return rows


def _kept(config, workdir):
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
  )


if __name__ == '__main__':
  define_flags()
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
