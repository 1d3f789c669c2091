"""Settings of one quantization, from a config's plain values."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import quantlab as ql
from experiments import fields, variants
from quantlab import search

_RULE = "a dict of a quantizer's arguments such as {'format': 'int8'}"


def _is_rule(value: Any) -> bool:
  return isinstance(value, Mapping)


KEYS = {
  'calibration': fields.count('examples to calibrate on', 1),
  'weight': fields.Field(_RULE, _is_rule),
  'input': fields.Field(_RULE, _is_rule),
  'float': fields.names("patterns of sites, such as ('/head/',)", empty=True),
}


def space(config: Any) -> search.Table:
  """One row a setting; what an option costs is not known before."""
  rows = tuple(
    search.Row(name, tuple(options))
    for name, options in config.settings.items()
  )
  zeros = tuple(np.zeros(len(r.options)) for r in rows)
  return search.Table(rows, zeros, zeros, {}, 'setting', '')


def about(config: Any) -> dict[str, Any]:
  """What a study of a config measures, beyond the labels of its options."""
  names = ('model', 'seed', 'evaluation', 'batches', 'batch_size', 'settings')
  values = config.to_dict()
  return {name: values[name] for name in names}


def one_by_one(config: Any) -> list[dict[str, str]]:
  """Labels of choices: every option once or more, beside the first others."""
  names = {name: list(options) for name, options in config.settings.items()}
  first = {name: options[0] for name, options in names.items()}
  others = [
    first | {name: label}
    for name, options in names.items()
    for label in options[1:]
  ]
  return [first, *others]


def chosen(config: Any, labels: Mapping[str, str]) -> dict[str, Any]:
  """What the chosen options say together; a later one overrides.

  Raises:
    ConfigError: they say something unknown, or not all that is needed.
  """
  found: dict[str, Any] = {}
  settings = config.settings.to_dict()
  for name, label in labels.items():
    for key, value in settings[name][label].items():
      variants.check_name('setting', key, tuple(KEYS))
      where = f'settings.{name}.{label}.{key}'
      if not KEYS[key].fits(value):
        fields.refuse(where, value, KEYS[key].expected)
      if isinstance(value, Mapping):
        value = {**found.get(key, {}), **value}
      found[key] = value
  for key, field in KEYS.items():
    if key != 'float' and key not in found:
      raise variants.ConfigError(
        f'settings {dict(labels)} say nothing of {key!r}; expected '
        f'{field.expected}, from one of them'
      )
  return found


def recipe(found: Mapping[str, Any]) -> Any:
  """The recipe of chosen settings."""
  # Before the pattern that matches them too.
  rules: dict[str, Any] = dict.fromkeys(found.get('float', ()))
  rules['/kernel$'] = {k: found[k] for k in ('weight', 'input')}
  return ql.recipe({k: variants.rule(v) for k, v in rules.items()})
