r"""Post-training quantization of named models in named variants.

  python -m experiments.ptq --config=configs/ptq/digits.py --workdir=runs/digits

Evaluates each model in float, quantizes it in every variant of the config,
measures quality and distance from float, and prints one table. The workdir
gets config.json, plan.json, sites.json, blocks.json, metrics.json,
manifest.json, events for TensorBoard, checkpoints, report.html. The same
command again resumes: finished variants are not computed again. `--dry_run`
prints every plan with its size and memory from shapes alone, and computes
nothing.

`--replay=runs/digits/checkpoints/digits_cnn/w8a8` makes that model again from
what its manifest says, and compares every array.

A config's `diagnosis` (true unless it says otherwise) adds errors by block,
histograms and likely causes to the report, for about the time of the rest
again.

`--config.models=digits_cnn` restricts the models (given again, it adds one),
`--config.seed=1` changes the seed; any field of the config is set this way.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import quantlab as ql
from experiments import command_line, fields, replay, steps, variants
from quantlab import models, quality, report, runtime
from quantlab.runtime import files


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; not at import, where another launcher may have its."""
  config_flags.DEFINE_config_file(
    'config', None, 'What to run.', flag_values=values
  )
  flags.DEFINE_string('workdir', None, 'Where results go.', flag_values=values)
  flags.DEFINE_bool(
    'dry_run', False, 'Print plans, compute nothing.', flag_values=values
  )
  flags.DEFINE_string(
    'replay', None, 'A checkpoint to make again and verify.', flag_values=values
  )


def _check(config: Any) -> list[variants.Variant]:
  """The variants of a config; its every name is checked before any work."""
  fields.check_launcher(config, 'ptq')
  for name in config.models:
    variants.check_name('model', name, tuple(models.WORKLOADS))
  for name in ('calibration', 'evaluation'):
    if config[name] < 0:
      raise variants.ConfigError(
        f'{name}={config[name]}: expected a number of examples, or 0 for the '
        "workload's own choice."
      )
  return variants.resolve(config.variants)


def dry_run(config: Any) -> None:
  """Prints the plan and the memory of every variant, from shapes."""
  found = _check(config)
  for name in config.models:
    work = steps.load(config, name, shapes_only=True)
    if work is None:
      continue
    for variant in found:
      plan = ql.plan(work.apply, work.params, variant.recipe, *work.example)
      memory = ', '.join(f'{k} {v:,}' for k, v in plan.memory().items())
      print(f'\n{name}, {variant.name}\n{plan.summary()}')
      print(f'bytes needed: {memory}')


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns the flat metrics.

  Raises:
    ConfigError: the config names something unknown.
    WorkdirError: the folder cannot be used, see `runtime.Workdir`.
  """
  found = _check(config)
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    for name in config.models:
      _run_model(folder, config, name, found)
    names = [v.name for v in found]
    metrics = _ordered(folder.metrics.values, config.models, names)
    report.show(metrics)
    sites, walks = (
      _ordered(folder.read_json(file, {}), config.models, names)
      for file in ('sites.json', 'blocks.json')
    )
    page = report.render(
      metrics,
      report.by_variant(sites),
      folder.read_json('manifest.json', {}),
      walks_of=report.by_variant(walks),
    )
    folder.write_text('report.html', page)
    return metrics


def _ordered(
  values: Mapping[str, Any], model_names: Iterable[str], names: Iterable[str]
) -> dict[str, Any]:
  """What was kept, in the order of the config: files have their keys sorted."""
  heads = [
    head
    for model in model_names
    for head in (
      f'fp/{model}/',
      *(f'q/{model}/{name}/' for name in names),
      *(f'{model}/{name}' for name in names),
    )
  ]
  return {
    key: value
    for head in heads
    for key, value in values.items()
    if key == head or (head[-1] == '/' and key.startswith(head))
  }


def _run_model(
  folder: runtime.Workdir,
  config: Any,
  name: str,
  found: list[variants.Variant],
) -> None:
  """What is not finished yet of one model."""
  todo = [v for v in found if f'q/{name}/{v.name}' not in folder.metrics]
  if not todo and f'fp/{name}' in folder.metrics:
    print(f'{name}: finished before')
    return
  print(f'{name}: {len(todo)} of {len(found)} variants to do')
  work = steps.load(config, name)
  if work is None:
    return
  _float(folder, name, work)
  key = jax.random.key(config.seed)
  for variant in runtime.track(todo, name):
    _quantize(folder, config, name, variant, work, key)


def _float(folder: runtime.Workdir, name: str, work: models.Workload) -> None:
  if f'fp/{name}' in folder.metrics:
    return
  found = quality.evaluate(
    work.apply, work.params, work.evaluation, work.metric
  )
  size = {'nbytes': ql.nbytes(work.params), 'bits_per_weight': 32.0}
  folder.metrics.record(f'fp/{name}', quality.flat(found) | size)


def _quantize(
  folder: runtime.Workdir,
  config: Any,
  model_name: str,
  variant: variants.Variant,
  work: models.Workload,
  key: jax.Array,
) -> None:
  """One variant: quantize, measure, save; recorded when all is written."""
  name = f'{model_name}/{variant.name}'
  walk = folder.path / 'walk' / name  # finished blocks, until all are
  diagnosis = config.get('diagnosis', True)
  with runtime.timed() as timer:
    model, prepared, left = steps.quantize_watched(
      work, variant, key, walk, block_errors=diagnosis
    )
  found = quality.assess(
    work.apply,
    work.params,
    model.apply,
    model.params,
    work.evaluation,
    work.metric,
  )
  made = {'config': config.to_dict(), 'model': model_name}
  made |= {'variant': variant.name, 'environment': runtime.environment()}
  model = dataclasses.replace(model, report={**model.report, 'made': made})
  ql.save(folder.path / 'checkpoints' / name, model, overwrite=True)
  files.remove(walk)
  for parent in list(walk.parents)[:2]:  # of the model, of all models
    if parent.exists() and not any(parent.iterdir()):
      parent.rmdir()
  folder.update_json('plan.json', name, model.plan.to_json())
  rows = _rows(work, model, left, diagnosis)
  folder.update_json('sites.json', name, rows)
  folder.update_json('blocks.json', name, report.walk(model, prepared))
  folder.metrics.curve(
    f'q/{name}/block_error',
    [b['relative_error'] for b in model.report.get('blocks', ())],
  )
  folder.metrics.record(
    f'q/{name}',
    quality.flat(found['quality'])
    | quality.flat(found['contrast'])
    | {
      'nbytes': model.nbytes,
      'bits_per_weight': model.plan.totals()['bits_per_weight'],
      'seconds': timer.seconds,
      'peak_bytes': runtime.peak_bytes(),
    },
  )


def _rows(
  work: models.Workload, model: ql.Quantized, prepared: Any, diagnosis: bool
) -> Any:
  """What the page says of each site, most of the worst ones."""
  batch = work.calibration[0]
  floats = work.params if prepared is None else prepared
  noise = ql.site_sqnr(work.apply, floats, model, [batch])
  encoded = work.params if prepared is None else prepared['weights']
  rows = report.site_rows(model, noise, encoded)
  if not diagnosis:
    return rows
  names = report.chosen(rows)
  found = report.look(
    work.apply, work.params, model, batch, noise, names, prepared
  )
  return [row | found.get(row['site'], {}) for row in rows]


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
  """The command: flags in, a workdir or a message out."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  config, workdir = values.config, values.workdir
  if not values.replay and config is None:
    raise app.UsageError('--config is needed: what to run')
  if not values.replay and not values.dry_run and not workdir:
    raise app.UsageError('--workdir is needed: a folder for the results')

  def work():
    if values.replay:
      sys.exit(replay.run(values.replay))
    return dry_run(config) if values.dry_run else run(config, workdir)

  metrics = command_line.guarded(
    work, refused=(variants.ConfigError, runtime.WorkdirError)
  )
  if values.dry_run:
    return
  if metrics:
    print(f'written to {workdir}: report.html, metrics.json, plan.json')
  else:
    print('nothing was measured: no model of the config has its files here')


if __name__ == '__main__':
  define_flags()
  # Otherwise every checkpoint is told of in twenty lines; --verbosity=0 does.
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=command_line.parse)
