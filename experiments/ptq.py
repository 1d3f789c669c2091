r"""Post-training quantization of named models in named variants.

  python -m experiments.ptq --config=configs/ptq/digits.py --workdir=runs/digits

Evaluates each model in float, quantizes it in every variant of the config,
measures quality and distance from float, and prints one table. The workdir
gets config.json, plan.json, metrics.json, manifest.json, checkpoints, events
for TensorBoard and report.html. The same command again resumes: finished
variants are not computed again. `--dry_run` prints every plan with its size and
memory from shapes alone, and computes nothing.

`--config.models=digits_cnn,` restricts the models, `--config.seed=1` changes
the seed; any field of the config is set this way.
"""

from typing import Any

import jax
import rich
from absl import app, flags
from ml_collections import config_flags

import quantlab as ql
from experiments import variants
from quantlab import models, quality, report, runtime

_CONFIG = config_flags.DEFINE_config_file('config', None, 'What to run.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results go.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print plans, compute nothing.')


def _load(config: Any, name: str, **options: Any) -> models.Workload | None:
  """A workload, or None with a message where its files are absent."""
  sizes = {k: config[k] for k in ('calibration', 'evaluation') if config[k] > 0}
  try:
    return models.workload(name, seed=config.seed, **sizes, **options)
  except FileNotFoundError as error:
    rich.print(f'[yellow]{name} is skipped:[/] {error}')
    return None


def dry_run(config: Any) -> None:
  """Prints the plan and the memory of every variant, from shapes."""
  for name in config.models:
    work = _load(config, name, shapes_only=True)
    if work is None:
      continue
    for spec in config.variants:
      plan = ql.plan(
        work.apply, work.params, variants.recipe(spec), *work.example
      )
      memory = ', '.join(f'{k} {v:,}' for k, v in plan.memory().items())
      print(f'\n{name}, {spec["name"]}\n{plan.summary()}')
      print(f'bytes needed: {memory}')


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns the flat metrics.

  Raises:
    ValueError: the config names something unknown, or the folder cannot be
      used (see `runtime.Workdir`).
  """
  recipes = {v['name']: variants.recipe(v) for v in config.variants}
  transforms = {v['name']: variants.transform(v) for v in config.variants}
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    for name in config.models:
      work = _load(config, name)
      if work is None:
        continue
      _float(folder, name, work)
      for variant in runtime.track(list(recipes), name):
        if f'q/{name}/{variant}' not in folder.metrics:
          key = jax.random.key(config.seed)
          _quantize(
            folder,
            name,
            variant,
            work,
            recipes[variant],
            transforms[variant],
            key,
          )
    report.show(report.results_table(folder.metrics.values))
    page = report.render(
      folder.metrics.values,
      report.by_variant(folder.read_json('sites.json', {})),
      folder.read_json('manifest.json', {}),
    )
    folder.write_text('report.html', page)
    return dict(folder.metrics.values)


def _float(folder: runtime.Workdir, name: str, work: models.Workload) -> None:
  if f'fp/{name}' in folder.metrics:
    return
  found = quality.evaluate(
    work.apply, work.params, work.evaluation, work.metric
  )
  size = {'nbytes': ql.nbytes(work.params), 'bits_per_weight': 32.0}
  folder.metrics.record(f'fp/{name}', quality.flat(found) | size)


def _quantize(folder, model_name, variant, work, recipe, transform, key):
  """One variant: quantize, measure, save; recorded when all is written."""
  name = f'{model_name}/{variant}'
  with runtime.timed() as timer:
    model = ql.ptq(
      work.apply, work.params, recipe, work.calibration, transform, key=key
    )
  found = quality.assess(
    work.apply,
    work.params,
    model.apply,
    model.params,
    work.evaluation,
    work.metric,
  )
  noise = ql.site_sqnr(work.apply, work.params, model, [work.calibration[0]])
  ql.save(folder.path / 'checkpoints' / name, model, overwrite=True)
  folder.update_json('plan.json', name, model.plan.to_json())
  rows = report.site_rows(model, noise, work.params)
  folder.update_json('sites.json', name, rows)
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


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  config = _CONFIG.value
  if _DRY_RUN.value:
    dry_run(config)
    return
  if not _WORKDIR.value:
    raise app.UsageError('--workdir is needed: a folder for the results')
  run(config, _WORKDIR.value)
  print(f'written to {_WORKDIR.value}: report.html, metrics.json, plan.json')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  app.run(main)
