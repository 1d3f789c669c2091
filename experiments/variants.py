"""From a config's plain values to recipes and transforms.

A variant is `{'name': ..., 'rules': ((pattern, rule), ...), 'transform': ...}`.
A rule is None or a dict of roles, `{'weight': {...}, 'input': {...}}`; a
quantizer is a dict of its factory's name and arguments, `{'format': 'int4',
'group': 64}`, and a range rule likewise, `{'rule': 'mse', 'p': 2.4}`. A
transform (without one: round to nearest) is a name, a dict of a name and
arguments, `{'name': 'smooth', 'alpha': 0.8}`, or a chain of them in a tuple.
Nothing else is understood: what a config can say is what the public factories
take.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import quantlab as ql
from quantlab.core import presets

FORMATS = tuple(
  n
  for n, value in vars(presets).items()
  if inspect.isfunction(value) and hasattr(ql, n)
)
SCALES = tuple(
  n
  for n, value in vars(ql.scales).items()
  if inspect.isclass(value)
  and issubclass(value, ql.scales.Rule)
  and value is not ql.scales.Rule
)
TRANSFORMS: dict[str, Callable] = {
  f.__name__: f
  for f in (
    ql.rtn,
    ql.gptq,
    ql.smooth,
    ql.awq,
    ql.cross_layer_equalization,
    ql.outlier_suppression,
    ql.rotate,
    ql.fold_norms,
    ql.bias_correction,
    ql.batch_norm_reestimation,
    ql.norm_tweak,
  )
}
FIELDS = ('name', 'rules', 'transform')


class ConfigError(ValueError):
  """A config that says something unknown, with what is known."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to quantize a model: what `ql.ptq` takes."""

  name: str
  recipe: Any
  transform: Any


def resolve(specs: Iterable[Mapping[str, Any]]) -> list[Variant]:
  """The variants of a config, all of them checked.

  Raises:
    ConfigError: names that are unknown, missing, or given twice.
  """
  found: list[Variant] = []
  for spec in specs:
    if not isinstance(spec, Mapping):
      raise ConfigError(
        f'a variant is a dict with a name and rules, found {spec!r}; a config '
        'file holds them, the command line cannot.'
      )
    name = spec.get('name')
    if not isinstance(name, str) or not re.fullmatch(r'[\w.+-]+', name):
      raise ConfigError(
        f'a variant has the name {name!r}; expected letters, digits and '
        '"_.+-": it names a folder and metrics.'
      )
    if name in {v.name for v in found} | {'float'}:
      raise ConfigError(f'the variant name {name!r} is taken; give another.')
    try:
      _check_names('field', spec, FIELDS)
      found.append(Variant(name, recipe(spec), transform(spec)))
    except (TypeError, ValueError) as error:
      raise ConfigError(f'variant {name!r}: {error}') from error
  return found


def quantizer(spec: Mapping[str, Any]) -> ql.Quantizer:
  """The quantizer that a dict spells."""
  args = dict(spec)
  name = check_name('format', args.pop('format', None), FORMATS)
  if isinstance(args.get('scale'), Mapping):
    scale = dict(args['scale'])
    rule = check_name('range rule', scale.pop('rule', None), SCALES)
    args['scale'] = call(getattr(ql.scales, rule), scale, rule)
  return call(getattr(ql, name), args, name)


def rule(spec: Mapping[str, Any] | None) -> Any:
  """The rule that a dict of roles spells; None is float."""
  if spec is None:
    return None
  roles = {
    role: quantizer(value) if isinstance(value, Mapping) else value
    for role, value in spec.items()
    if role != 'optional'
  }
  made = call(ql.rule, roles, 'rule')
  return ql.optional(made) if spec.get('optional') else made


def recipe(variant: Mapping[str, Any]) -> Any:
  """The recipe of a variant."""
  if not variant.get('rules'):
    raise ConfigError('no rules; expected ((pattern, rule), ...).')
  return ql.recipe({pattern: rule(spec) for pattern, spec in variant['rules']})


def transform(variant: Mapping[str, Any]) -> Any:
  """The transform of a variant; round to nearest unless it says otherwise."""
  spec = variant.get('transform', 'rtn')
  members = [spec] if isinstance(spec, str | Mapping) else spec
  return ql.chain(*map(_member, members))


def _member(spec: str | Mapping[str, Any]) -> Any:
  args = {} if isinstance(spec, str) else dict(spec)
  name = spec if isinstance(spec, str) else args.pop('name', None)
  factory = TRANSFORMS[check_name('transform', name, tuple(TRANSFORMS))]
  return call(factory, args, str(name))


def check_name(kind: str, name: Any, known: Sequence[str]) -> str:
  """The name if it is known, else a ConfigError that lists what is."""
  if name in known:
    return name
  close = difflib.get_close_matches(str(name), known, 1)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  raise ConfigError(
    f'unknown {kind} {name!r}.{hint} Known: {", ".join(known)}.'
  )


def _check_names(kind: str, found: Iterable[Any], known: Sequence[str]) -> None:
  for name in found:
    check_name(kind, name, known)


def call(factory: Callable, spec: Mapping[str, Any], kind: str) -> Any:
  _check_names(f'argument of {kind}', spec, _arguments(factory))
  try:
    return factory(**spec)
  except TypeError as error:
    raise ConfigError(f'{kind} {dict(spec)}: {error}') from error


def _arguments(factory: Callable) -> list[str]:
  """What a factory takes by keyword; `**fields` are a quantizer's."""
  names: list[str] = []
  for p in inspect.signature(factory).parameters.values():
    fields = list(inspect.get_annotations(presets.Fields))
    names += fields if p.kind is p.VAR_KEYWORD else [p.name]
  return names
