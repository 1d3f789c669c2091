r"""Quantization-aware training of one task in named variants, seed by seed.

  python -m experiments.qat --config=configs/qat/digits.py --workdir=runs/qat

Trains the float net (or takes the pretrained one), then each variant; judges
what is frozen, which computes on codes and must give what training simulated;
prints one table. The workdir gets config.json, plan.json, sites.json,
curves.json, seeds.json, metrics.json, manifest.json, events for TensorBoard,
the frozen model of the first seed under checkpoints/, and report.html with
learning curves. Killed at any moment, the same command goes on: finished
variants are not trained again, the others from their last save, and every
curve is what it would have been.

Any field of the config is set from the command line,
`--config.seeds=0 --config.seeds=1`. `--config.mesh=True` spreads batches over
all devices. Several hosts run the same command with `--coordinator=HOST:PORT
--processes=N --process=I`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import rich
from absl import app, flags, logging
from ml_collections import config_flags
from rich import markup

from experiments import (
  command_line,
  fields,
  judging,
  tasks,
  training,
  variants,
)
from quantlab import data, report, runtime
from quantlab.runtime import saves as saves_lib
from quantlab.runtime import training as loop

FLOAT = 'float'


class TrainingError(RuntimeError):
  """Training that cannot go on, with where and why."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  config_flags.DEFINE_config_file(
    'config', None, 'What to run.', flag_values=values
  )
  for name, default, words in (
    ('workdir', None, 'Where results go.'),
    ('coordinator', None, 'HOST:PORT of the first of several processes.'),
  ):
    flags.DEFINE_string(name, default, words, flag_values=values)
  flags.DEFINE_integer('processes', 1, 'How many.', flag_values=values)
  flags.DEFINE_integer('process', 0, 'Which of them.', flag_values=values)


def check(config: Any) -> list[training.Variant]:
  """The variants of a config, the float one first; all is checked."""
  fields.check_launcher(config, 'qat')
  variants.check_name('task', config.task, tuple(tasks.TASKS))
  if not config.seeds or len(set(config.seeds)) < len(config.seeds):
    raise variants.ConfigError(
      f'seeds={config.seeds}: expected one or more, each once.'
    )
  for name in ('batch_size', 'check_every', 'log_every', 'checked_batches'):
    if config[name] < 1:
      raise variants.ConfigError(f'{name}={config[name]}: expected at least 1.')
  shared = {'batch_size': config.batch_size}
  first = {'name': FLOAT, 'start': 'scratch', **config.float.to_dict()}
  return training.resolve([first, *config.variants], shared)


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns the flat metrics.

  Raises:
    ConfigError: the config names something unknown.
    WorkdirError: the folder cannot be used, see `runtime.Workdir`.
    TrainingError: a loss or gradient is not finite.
  """
  found = check(config)
  mesh = runtime.make_mesh(data=-1) if config.mesh else None
  seed = config.seeds[0]
  try:
    task = tasks.make(config.task, config.model.to_dict())
  except FileNotFoundError as error:
    rich.print(f'[yellow]{config.task}[/]: {markup.escape(str(error))}')
    return {}
  made = [_planned(config, task, v) for v in found]
  with runtime.Workdir(workdir, config.to_dict(), seed=seed) as folder:
    floats: list[Any] = []
    todo = [m for m in made if _head(config, m.variant) not in folder.metrics]
    if todo and made[0] not in todo:  # others may begin with the float net
      todo.insert(0, made[0])
    for one in runtime.track(todo, config.task):
      trained, curves = _train(folder, config, one, floats, mesh)
      head = _head(config, one.variant)
      if one is made[0]:
        floats = [v['weights'] for v in trained]
      if head not in folder.metrics:
        judging.judge(
          folder,
          one,
          (head, f'{config.task}/{one.variant.name}'),
          trained,
          curves,
          (task.apply, floats),
          config.to_dict(),
        )
    return _finish(folder, config, found)


def _head(config: Any, variant: training.Variant) -> str:
  if variant.name == FLOAT:
    return f'fp/{config.task}'
  return f'q/{config.task}/{variant.name}'


def _planned(
  config: Any, task: tasks.Task, variant: training.Variant
) -> training.Trainee:
  """The task with the variant's model, planned."""
  if variant.model:
    sizes = config.model.to_dict() | dict(variant.model)
    task = tasks.make(config.task, sizes)
  [batch] = task.draws(variant.batch_size, steps=1, seed=config.seeds[0])
  try:
    return training.trainee(task, variant, batch[: task.inputs])
  except (TypeError, ValueError) as error:
    raise variants.ConfigError(f'variant {variant.name!r}: {error}') from error


def _train(
  folder: runtime.Workdir,
  config: Any,
  made: training.Trainee,
  floats: Sequence[Any],
  mesh: Any,
) -> tuple[list[training.Variables], list[loop.Curves]]:
  """The trained variables of every seed, and curves; or read, if done."""
  together = [tuple(config.seeds)]
  if not config.vmap:
    together = [(seed,) for seed in config.seeds]
  found: list[training.Variables] = []
  curves: list[loop.Curves] = []
  for seeds in together:
    mine = floats[len(found) : len(found) + len(seeds)] or None
    more, curve = _train_seeds(folder, config, made, seeds, mine, mesh)
    found, curves = found + more, [*curves, curve]
  return found, curves


def _train_seeds(folder, config, made, seeds, floats, mesh):
  variant, runs = made.variant, len(seeds)
  lanes = '-'.join(map(str, seeds))
  head = f'{_head(config, variant)}/seed_{lanes}'
  draws = [
    made.task.draws(
      variant.batch_size,
      steps=max(variant.steps, 1),
      seed=seed,
      part=(jax.process_index(), jax.process_count()) if mesh else (0, 1),
    )
    for seed in seeds
  ]
  state, update = training.begin(made, training.starts(made, seeds, floats))
  teacher = loop.placed(training.stack(floats), mesh) if floats else ()
  update = loop.compiled(update, mesh, runs)
  identity = {
    'task': config.task,
    'variant': vars(variant),
    'model': config.model.to_dict(),
    'plan': made.plan and made.plan.to_json(),
    'seeds': seeds,
  }
  path = folder.path / 'training' / variant.name / lanes
  with saves_lib.Saves(path, identity) as saves:
    try:
      state, curves = loop.train(
        update,
        loop.placed(state, mesh),
        [data.iterator(d) for d in draws],
        variant.steps,
        saves,
        check=training.checking(made, runs, config.checked_batches),
        score=lambda found: -found['validation_loss'],
        check_every=config.check_every,
        log_every=config.log_every,
        place=lambda b: (*loop.spread(b, mesh, axis=int(runs > 1)), teacher),
        log=lambda step, values: folder.metrics.scalars(
          {f'{head}/{k}': v for k, v in values.items()}, step
        ),
        label=f'{variant.name}, {lanes}',
      )
    except runtime.DivergedError as error:
      batch = draws[error.run][error.step]
      lane = training.lanes(error.state['variables'], runs)[error.run]
      raise TrainingError(
        f'variant {variant.name!r}, seed {seeds[error.run]}: {error} at step '
        f'{error.step}; {judging.overflow(made, lane, batch)}. The save of '
        f'step {saves.last} is kept in {saves.folder}.'
      ) from error
  folder.update_json('curves.json', head, curves)
  found = [made.settled(v) for v in training.lanes(state['variables'], runs)]
  return found, curves


def _finish(
  folder: runtime.Workdir, config: Any, found: Sequence[training.Variant]
) -> dict[str, Any]:
  """The table and the page of what was kept, in the order of the config."""
  heads = [_head(config, v) for v in found]
  values = folder.metrics.values
  metrics = {
    k: v for h in heads for k, v in values.items() if k.startswith(f'{h}/')
  }
  curves = folder.read_json('curves.json', {})
  report.show(metrics)
  page = report.render(
    metrics,
    report.by_variant(folder.read_json('sites.json', {})),
    folder.read_json('manifest.json', {}),
    title='Training report',
    curves_of={
      config.task: {
        v.name: [c for k, c in curves.items() if k.startswith(f'{h}/')]
        for v, h in zip(found, heads, strict=True)
      }
    },
  )
  folder.write_text('report.html', page)
  return metrics


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a workdir or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  for name in ('config', 'workdir'):
    if not values[name].value:
      raise app.UsageError(f'--{name} is needed')
  if values.processes > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      values.coordinator, values.processes, values.process
    )
  metrics = command_line.guarded(
    run,
    values.config,
    values.workdir,
    refused=(
      variants.ConfigError,
      runtime.WorkdirError,
      runtime.CheckpointError,
      TrainingError,
    ),
  )
  if metrics:
    print(f'written to {values.workdir}: report.html, metrics.json')
  else:
    print('nothing was trained: the task has no files here')


if __name__ == '__main__':
  define_flags()
  # Otherwise every checkpoint is told of in twenty lines; --verbosity=0 does.
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
