"""What the fields of a config may be, and which launcher takes it.

A launcher says what it expects of each field; one message tells what was found
instead, before any work.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from experiments import variants

# By a field that only such configs have: what they are, and who takes them.
KINDS = {
  'benchmark': ('a benchmark', ('bench',)),
  'settings': ('settings of one quantization', ('tune',)),
  'rows': ('a table of published numbers, without a model', ('search',)),
  'choices': ('the search of one model', ('sensitivity', 'search', 'refine')),
  'models': ('models to quantize', ('ptq',)),
  'task': ('a task to train', ('qat',)),
  'bed': ('a test bed to train', ('testbed',)),
  'prompt': ('a model that writes text', ('generate',)),
}


def check_launcher(config: Any, launcher: str) -> str:
  """Refuses a config of another launcher.

  Args:
    config: of any launcher.
    launcher: this one, such as 'search'.

  Returns:
    The key of `KINDS`.
  """
  mine = [what for what, takers in KINDS.values() if launcher in takers]
  wanted = f'experiments.{launcher} takes {", or ".join(mine)}'
  for mark, (what, takers) in KINDS.items():
    if mark in config:
      if launcher in takers:
        return mark
      names = ' or '.join(f'experiments.{t}' for t in takers)
      raise variants.ConfigError(
        f'this config is {what}: run {names} on it. {wanted}'
      )
  raise variants.ConfigError(f'this is no config of any launcher. {wanted}')


class Field(NamedTuple):
  """One field of a config.

  Attributes:
    expected: in words, with an example where words are many.
    fits: whether a value is so.
    needed: whether a config must have it.
  """

  expected: str
  fits: Callable[[Any], bool]
  needed: bool = True


def check(config: Any, known: Mapping[str, Field]) -> dict[str, Any]:
  """Refuses fields that are unknown, absent, or of another kind.

  Returns:
    Their plain values.
  """
  values = dict(
    config.to_dict()
    if isinstance(config, ml_collections.ConfigDict)
    else config
  )
  for name in values:
    variants.check_name('field', name, tuple(known))
  for name, field in known.items():
    if name not in values and field.needed:
      raise variants.ConfigError(
        f'the config has no field {name!r}; expected {field.expected}'
      )
    if name in values and not field.fits(values[name]):
      refuse(name, values[name], field.expected)
  return values


def refuse(name: str, value: Any, expected: str) -> None:
  """Raises the ConfigError of a value."""
  shown = repr(value)
  shown = shown if len(shown) < 200 else f'{shown[:200]}...'
  raise variants.ConfigError(f'{name}={shown}: expected {expected}')


# Kinds of values --------------------------------------------------------------


def is_list(value: Any) -> bool:
  """Whether it is several things, and no text."""
  return isinstance(value, tuple | list)


def is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value)


def is_number(value: Any) -> bool:
  """Whether it is a finite number."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def are_pairs(value: Any, first: Callable[[Any], bool] = is_text) -> bool:
  """Whether it is pairs, each begun by what `first` knows."""
  return is_list(value) and all(
    is_list(p) and len(p) == 2 and first(p[0]) for p in value
  )


def text(what: str, *, empty: bool = False) -> Field:
  """A text."""
  return Field(what, lambda v: isinstance(v, str) and (empty or bool(v)))


def flag(what: str) -> Field:
  """True or False."""
  return Field(f'{what}, True or False', lambda v: isinstance(v, bool))


def is_count(value: Any, least: int) -> bool:
  """Whether it is a whole number, at least this and below 2^31."""
  whole = isinstance(value, int) and not isinstance(value, bool)
  return whole and least <= value < 2**31


def _counted(least: int) -> str:
  return f'a whole number, at least {least} and below 2^31'


def count(what: str, least: int) -> Field:
  """A whole number of something."""
  return Field(f'{what}: {_counted(least)}', lambda v: is_count(v, least))


def check_count(name: str, value: Any, least: int) -> None:
  """Refuses an argument that is no such number.

  Raises:
    ConfigError: what was found, and what was expected.
  """
  if not is_count(value, least):
    refuse(name, value, _counted(least))


def names(what: str, *, empty: bool = False) -> Field:
  """Texts in a tuple, each once."""

  def fits(value):
    if not is_list(value) or not (value or empty):
      return False
    return all(map(is_text, value)) and len(set(value)) == len(value)

  amount = 'any number of' if empty else 'one or more'
  return Field(f'a tuple of {amount} {what}, each once', fits)


def pairs(
  what: str,
  second: Callable[[Any], bool],
  *,
  empty: bool = False,
  once: bool = False,
) -> Field:
  """Pairs of a text and something in a tuple; `once`: no text twice."""

  def fits(value):
    if not are_pairs(value) or not (value or empty):
      return False
    heads = [head for head, _ in value]
    unlike = not once or len(set(heads)) == len(heads)
    return unlike and all(second(rest) for _, rest in value)

  return Field(what, fits)
