"""From a config's plain values to recipes and transforms.

A variant is `{'name': ..., 'rules': ((pattern, rule), ...), 'transform': name}`
(round to nearest without one). A rule is None or a dict of roles, `{'weight':
{...}, 'input': {...}}`; a quantizer is a dict of its factory's name and
arguments, `{'format': 'int4', 'group': 64}`, and a range rule likewise,
`{'rule': 'mse', 'p': 2.4}`. Nothing else is understood:
what a config can say is what the public factories take.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import quantlab as ql
from quantlab.core import presets

FORMATS = tuple(
  n
  for n, value in vars(presets).items()
  if inspect.isfunction(value) and hasattr(ql, n)
)
SCALES = ('absmax', 'absmean', 'absmedian', 'minmax', 'mse', 'percentile')
TRANSFORMS = {'rtn': ql.rtn, 'gptq': ql.gptq}


def _named(kind: str, name: Any, known: Sequence[str]) -> str:
  if name in known:
    return name
  close = difflib.get_close_matches(str(name), known, 1)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  raise ValueError(f'unknown {kind} {name!r}.{hint} Known: {", ".join(known)}')


def _call(factory: Callable, spec: Mapping[str, Any], kind: str) -> Any:
  try:
    return factory(**spec)
  except TypeError as error:
    raise ValueError(f'{kind} {dict(spec)}: {error}') from error


def quantizer(spec: Mapping[str, Any]) -> ql.Quantizer:
  """The quantizer that a dict spells."""
  args = dict(spec)
  name = _named('format', args.pop('format', None), FORMATS)
  if 'scale' in args:
    scale = dict(args['scale'])
    rule = _named('range rule', scale.pop('rule', None), SCALES)
    args['scale'] = _call(getattr(ql.scales, rule), scale, rule)
  return _call(getattr(ql, name), args, name)


def rule(spec: Mapping[str, Any] | None) -> Any:
  """The rule that a dict of roles spells; None is float."""
  if spec is None:
    return None
  roles = {
    role: quantizer(value) if isinstance(value, Mapping) else value
    for role, value in spec.items()
    if role != 'optional'
  }
  made = _call(ql.rule, roles, 'rule')
  return ql.optional(made) if spec.get('optional') else made


def recipe(variant: Mapping[str, Any]) -> Any:
  """The recipe of a variant."""
  return ql.recipe({pattern: rule(spec) for pattern, spec in variant['rules']})


def transform(variant: Mapping[str, Any]) -> Any:
  """The transform of a variant; round to nearest unless it says otherwise."""
  name = variant.get('transform', 'rtn')
  return TRANSFORMS[_named('transform', name, tuple(TRANSFORMS))]()
