"""What a config of configs/search may say; checked before any work.

`search`, `table` and `settings` look at the fields alone, `fits` and
`settings_fit` at a model of which only shapes are known.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import quantlab as ql
from experiments import (
  allocated,
  bisected,
  decoupled,
  fields,
  measured,
  settings,
  spaces,
  variants,
)
from quantlab import models, quality, search
from quantlab.search import objectives
from quantlab.search.sensitivity import INTERACTING

_OPTION = "{'weight': {'format': 'int4'}}"
_COSTS = ('bytes', 'bops', 'latency')
_AROUND = tuple(n for n in objectives.DIRECT if n != 'sqnr')


def _is_rule(value: Any) -> bool:
  return value is None or (isinstance(value, Mapping) and bool(value))


def _are_options(value: Any) -> bool:
  several = fields.is_list(value) and bool(value) and all(map(_is_rule, value))
  return _is_rule(value) or several


def _are_ties(value: Any) -> bool:
  return fields.is_list(value) and all(
    fields.is_list(group) and group and all(map(fields.is_text, group))
    for group in value
  )


_SEED = fields.count('seed of everything random', 0)
_TIES = fields.Field(
  "groups of sites that take one option, such as (('/query/', '/key/'),)",
  _are_ties,
  needed=False,
)
_MODEL = {
  'seed': _SEED,
  'model': fields.text('the name of a workload'),
  'calibration': fields.count("examples, 0 for the workload's own choice", 0),
  'evaluation': fields.count('examples, 0 for all', 0),
  'batch_size': fields.count("examples, 0 for the workload's own choice", 0),
  'batches': fields.count('labelled batches to measure on', 1),
}
SEARCH = _MODEL | {
  'curved': fields.count('examples for derivatives, 0 for a whole batch', 0),
  'judged': fields.count('batches up to which is judged, 0 for all', 0),
  'alternate': fields.flag('whether measured and judged batches alternate'),
  'distilled': fields.count('examples in the place of data, 0 for none', 0),
  'choices': fields.pairs(
    'pairs of a pattern, each once, and a rule or a tuple of rules, such as '
    f"(('/kernel$', ({_OPTION}, {_OPTION.replace('4', '8')})),)",
    _are_options,
    once=True,
  ),
  'ties': _TIES,
  'metrics': fields.names('metrics'),
  'interactions': fields.names('metrics', empty=True),
  'around': fields.names('metrics', empty=True),
  'probes': fields.count('probes of the trace, for each batch', 1),
  'iterations': fields.count('iterations of the eigenvalue', 1),
  'random_plans': fields.Field(
    'a whole number of random plans: 0, or 3 and more, to be explained',
    lambda v: type(v) is int and v >= 0 and v not in (1, 2),
  ),
  'kinds': fields.pairs(
    'pairs of a name, each once, and the first option that is drawn, such as '
    "(('all', 0), ('but the first two', 2))",
    lambda low: type(low) is int and low >= 0,
    once=True,
  ),
  'budgets': fields.names("options, such as ('int3', 'int4')"),
  'cost': fields.text(f'one of {_COSTS}'),
  'latency': fields.text(
    "what configs/bench/latency.py wrote, or '' for none", empty=True
  ),
  'allocations': fields.pairs(
    "pairs of a table and a method such as (('kl', 'dp'),)",
    fields.is_text,
    empty=True,
  ),
  'measured': fields.names("tables, such as ('kl', 'kl.gptq')", empty=True),
  'bisected': fields.pairs(
    'pairs of a table and the share of quality that may be lost, from 0 to '
    "less than 1, such as (('hessian', 0.01),)",
    lambda v: fields.is_number(v) and 0 <= v < 1,
    empty=True,
  )._replace(needed=False),
  'draws': fields.count("allocations of 'random'", 1),
  'groups': fields.pairs(
    'no groups, (), or two pairs of a pattern of rows and a metric, such as '
    "(('/attention/', 'kl'), ('/mlp/', 'output_mse'))",
    fields.is_text,
    empty=True,
  ),
  'encoders': fields.names("encoders, such as ('rtn', 'gptq')"),
  'seeds': fields.count('calibration sets', 1),
  'show': fields.names('measured numbers'),
}
TABLE = {
  'seed': _SEED,
  'title': fields.Field('a title', fields.is_text, needed=False),
  'rows': fields.pairs(
    "pairs of a row and its options, such as (('conv', ('4', '8')),)",
    lambda v: fields.is_list(v) and bool(v) and all(map(fields.is_text, v)),
  ),
  'metric': fields.text('what the sensitivity is'),
  'unit': fields.text('the unit of it', empty=True),
  'sensitivity': fields.Field(
    'a tuple of finite numbers, one an option, for each row', lambda v: _rows(v)
  ),
  'costs': fields.Field(
    'a dict of costs: a tuple of numbers, one an option, for each row',
    lambda v: (
      isinstance(v, Mapping) and bool(v) and all(map(_rows, v.values()))
    ),
  ),
  'budgets': fields.Field(
    'a dict of costs and their limits, finite numbers',
    lambda v: (
      isinstance(v, Mapping)
      and bool(v)
      and all(map(fields.is_number, v.values()))
    ),
  ),
  'ties': _TIES,
  'methods': fields.names('methods'),
}
SETTINGS = _MODEL | {
  'sampler': fields.text(f'one of {search.SAMPLERS}'),
  'first': fields.count('trials of a design, before the sampler', 0),
  'settings': fields.Field(
    'a dict of settings, each a dict of options, each a dict of '
    f"{tuple(settings.KEYS)}, such as {{'bits': {{'4': {_OPTION}, "
    f"'8': {_OPTION.replace('4', '8')}}}}}",
    lambda v: (
      isinstance(v, Mapping)
      and bool(v)
      and all(isinstance(o, Mapping) and o for o in v.values())
      and all(isinstance(s, Mapping) for o in v.values() for s in o.values())
    ),
  ),
}


def _rows(value: Any) -> bool:
  return fields.is_list(value) and all(
    fields.is_list(row) and all(map(fields.is_number, row)) for row in value
  )


# Searches ---------------------------------------------------------------------


def check(config: Any) -> None:
  """The fields of the search of a model.

  Raises:
    ConfigError: what was found, and what was expected.
  """
  values = fields.check(config, SEARCH)
  variants.check_name('model', config.model, tuple(models.WORKLOADS))
  for name, known in (
    ('metrics', search.METRICS),
    ('interactions', INTERACTING),
    ('around', _AROUND),
  ):
    for metric in values[name]:
      variants.check_name(f'metric in {name}=', metric, known)
    if name != 'metrics' and values[name]:
      _used(name, values)
  spaces.choices(config)
  for name, method in config.allocations:
    metric, *encoder = name.removesuffix('@').split('.')
    variants.check_name('metric', metric, search.METRICS)
    for each in encoder:
      allocated.encoder(each)
    variants.check_name('method', method, search.METHODS)
  if config.seed + config.draws > 2**31:
    fields.refuse(
      'seed', config.seed, f'2^31 - {config.draws} (draws=) at most'
    )
  measured.check(config)
  bisected.check(config)
  for each in config.encoders:
    allocated.encoder(each)
  if config.distilled and config.calibration:
    raise variants.ConfigError(
      f'distilled={config.distilled} and calibration={config.calibration}: '
      'without data there is no calibration set to draw'
    )


def _used(name: str, values: Mapping[str, Any]) -> None:
  if not set(values[name]) & set(values['metrics']):
    fields.refuse(
      name, values[name], f'(), or some of metrics={values["metrics"]}'
    )


def fits(config: Any, work: models.Workload) -> None:
  """Whether what a config asks of its model can be had.

  Args:
    config: of a search, its fields checked.
    work: its model, of which shapes are enough.

  Raises:
    ConfigError: an unknown option, cost, metric or number to show; groups that
      do not divide the rows; no measured seconds of a product; batches that
      leave none to judge on.
  """
  names = spaces.metrics(config, work)
  if not names:
    fields.refuse(
      'metrics',
      config.metrics,
      f'some that {config.model!r} has, a task of {work.metric.name}: '
      f'{spaces.has(work)}',
    )
  if next(iter(spaces.judged_on(config, work)), None) is None:
    raise variants.ConfigError(
      f'batches={config.batches}, judged={config.judged}: of the evaluation '
      f'set, {_size(work)}, none is left to judge on. Measure on fewer, and '
      'judge up to a later one or, with judged=0, all'
    )
  if config.distilled:
    _check_distilled(config, work)
  else:
    _check_batches(config, work, 2 if config.alternate else 1)
  try:
    table = spaces.unmeasured(config, work)
    for option in config.budgets:
      table.uniform(option)
  except (TypeError, ValueError) as error:
    raise variants.ConfigError(str(error)) from error
  variants.check_name('cost', config.cost, tuple(table.costs))
  most = max(len(r.options) for r in table.rows)
  for kind, low in config.kinds:
    if low > most - 2:
      raise variants.ConfigError(
        f'kinds={config.kinds!r}: {kind!r} draws from option {low} on, and '
        f'rows have at most {most}; expected 0 to {most - 2}'
      )
  decoupled.check(config, table, names)
  bisected.fits(config, work, table)
  for name in config.show:
    variants.check_name('number in show=', name, _numbers(work))


def _check_batches(config: Any, work: models.Workload, step: int = 1) -> None:
  """Whether there are as many, of every `step`th one."""
  if step * (config.batches - 1) >= len(work.evaluation):
    raise variants.ConfigError(
      f'batches={config.batches}: the evaluation set is {_size(work)}; measure '
      'on fewer'
    )


def _check_distilled(config: Any, work: models.Workload) -> None:
  """Whether there may be BatchNorms to distill from."""
  like = spaces.like(work, config.distilled)
  if not search.scaled(work.apply, work.params, like):
    raise variants.ConfigError(
      f'distilled={config.distilled}: {config.model!r} has no product that a '
      'BatchNorm follows, and no statistics to distill data from; expected 0'
    )


def _size(work: models.Workload) -> str:
  found = work.evaluation
  return f'{len(found)} batches of {found.batch_size}'


def _numbers(work: models.Workload) -> tuple[str, ...]:
  """What is measured of an allocation, by name."""
  batch = tuple(x[:1] for x in work.evaluation[0])
  inputs = batch[: len(batch) - work.metric.targets]
  out = jax.eval_shape(work.apply, work.params, *inputs)
  zeros = np.zeros(out.shape, out.dtype)

  def same(params, *inputs):  # no constant, which XLA would fold for seconds
    del inputs
    return params

  found = quality.assess(same, zeros, same, zeros, [batch], work.metric)
  flat = quality.flat(found['quality']) | quality.flat(found['contrast'])
  return (*flat, 'nbytes')


def ready(config: Any) -> bool:
  """Checks the search of a model; whether its files are here.

  Raises:
    ConfigError: see `check` and `fits`.
  """
  check(config)
  shapes = spaces.shapes(config)
  if shapes is None:
    return False
  fits(config, shapes)
  return True


# Tables of numbers ------------------------------------------------------------


def check_table(config: Any) -> search.Table:
  """The table that a config carries, what is asked of it checked.

  Raises:
    ConfigError: what was found, and what was expected.
  """
  fields.check(config, TABLE)
  for cost in config.budgets:
    variants.check_name('cost in budgets=', cost, tuple(config.costs))
  for method in config.methods:
    variants.check_name('method', method, search.METHODS)
  try:
    table = spaces.from_config(config)
    table.tied(config.get('ties', ()))
  except ValueError as error:
    raise variants.ConfigError(str(error)) from error
  return table


# Settings ---------------------------------------------------------------------


def check_settings(config: Any) -> None:
  """The fields of a config to tune, every option of its settings.

  Raises:
    ConfigError: what was found, and what was expected.
  """
  fields.check(config, SETTINGS)
  variants.check_name('model', config.model, tuple(models.WORKLOADS))
  variants.check_name('sampler', config.sampler, search.SAMPLERS)
  for choice in settings.one_by_one(config):
    settings.recipe(settings.chosen(config, choice))


def settings_fit(config: Any, work: models.Workload) -> None:
  """Whether settings are of a model of which shapes are known.

  Raises:
    ConfigError: a model without accuracy, patterns that find nothing, more
      batches than there are.
  """
  if work.metric.name != 'classification':
    raise variants.ConfigError(
      f'settings are tuned by accuracy, and {config.model!r} is judged by '
      f'{work.metric.name}'
    )
  _check_batches(config, work)
  for choice in settings.one_by_one(config):
    recipe = settings.recipe(settings.chosen(config, choice))
    try:
      ql.plan(work.apply, work.params, recipe, *work.example)
    except ValueError as error:
      raise variants.ConfigError(f'settings {choice}: {error}') from error
