"""Recipes: which quantizer goes where.

A recipe is an ordered dict from patterns to rules. A pattern is a regular
expression, searched in '/' + the parameter path of a site's weight, or in the
site's name when it starts with 'site:'. The first match wins; sites that no
pattern matches stay in float and are listed; a pattern that decides nothing is
an error, unless its rule is wrapped in `optional`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.core import Quantizer
from quantlab.graph.sites import Site


@dataclasses.dataclass(frozen=True)
class Rule:
  """Quantizers of one product.

  Attributes:
    weight: of the weight, or None.
    input: of the activation that meets the weight, or None.
    output: of the product, or None.
    lhs, rhs: of the operands of a product of two activations.
    fold: fold a following inference-mode BatchNorm into the weight.
  """

  weight: Quantizer | None = None
  input: Quantizer | None = None
  output: Quantizer | None = None
  lhs: Quantizer | None = None
  rhs: Quantizer | None = None
  fold: bool = True

  def to_json(self) -> dict[str, Any]:
    out: dict[str, Any] = {
      f.name: getattr(self, f.name).to_json()
      for f in dataclasses.fields(self)
      if isinstance(getattr(self, f.name), Quantizer)
    }
    return out if self.fold else {**out, 'fold': False}

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Rule:
    fields: dict[str, Any] = {
      k: v if k == 'fold' else Quantizer.from_json(v) for k, v in data.items()
    }
    return cls(**fields)

  @property
  def quantizers(self) -> dict[str, Quantizer]:
    roles = ('weight', 'input', 'output', 'lhs', 'rhs')
    return {r: q for r in roles if (q := getattr(self, r)) is not None}


@dataclasses.dataclass(frozen=True)
class PerLayer:
  """Rules of one site in a scan over layers, one for each layer."""

  rules: tuple[Rule | None, ...]

  @property
  def uniform(self) -> bool:
    """Whether all layers have one rule."""
    return len(set(self.rules)) == 1

  def to_json(self) -> dict[str, Any]:
    return {'layers': [r and r.to_json() for r in self.rules]}


Entry = Rule | PerLayer | None


def by_layer(rules: Sequence[Rule | None]) -> Entry:
  """The plain rule where all layers have one."""
  found = PerLayer(tuple(rules))
  return found.rules[0] if found.uniform else found


def from_json(data: Mapping[str, Any] | None) -> Entry:
  """Undoes `to_json` of what a recipe holds."""
  if data is None:
    return None
  if 'layers' in data:
    found = (r and Rule.from_json(r) for r in data['layers'])
    return PerLayer(tuple(found))
  return Rule.from_json(data)


@dataclasses.dataclass(frozen=True)
class Optional:
  """A rule whose pattern may match nothing."""

  rule: Entry


def rule(
  *,
  weight: Quantizer | None = None,
  input: Quantizer | None = None,
  output: Quantizer | None = None,
  lhs: Quantizer | None = None,
  rhs: Quantizer | None = None,
  fold: bool = True,
) -> Rule:
  """A rule for a product with a weight, or of two activations (lhs, rhs).

  Raises:
    TypeError: an argument is not a quantizer.
    ValueError: both spellings at once, or nothing at all.
  """
  made = Rule(weight, input, output, lhs, rhs, _flag('fold', fold))
  for role in ('weight', 'input', 'output', 'lhs', 'rhs'):
    value = getattr(made, role)
    if value is not None and not isinstance(value, Quantizer):
      raise TypeError(
        f'rule({role}=...) takes a quantizer such as ql.int8(), got {value!r}'
      )
  if not made.quantizers:
    raise ValueError('rule() needs at least one quantizer; use None for float')
  if (lhs or rhs) and (weight or input):
    raise ValueError(
      'rule(lhs=, rhs=) is for a product of two activations, rule(weight=, '
      'input=) for a product with a weight; got both'
    )
  return made


def _flag(name: str, value: Any) -> bool:
  if not isinstance(value, bool):  # a word such as 'no' would count as true
    raise TypeError(f'{name} takes True or False, got {value!r}')
  return value


def optional(value: Entry | Quantizer) -> Optional:
  """Marks a rule as one that may match nothing without being an error."""
  return Optional(_as_entry(value, "'optional'"))


def per_layer(rules: Sequence[Rule | Quantizer | None]) -> PerLayer:
  """Rules of a site in a scan over layers: the first layer's first.

  A layer's rule is what a site's rule may be. A stack of one format cannot
  hold several: the scan is run as one after another over layers that agree,
  and each of them has a stack of its own (`ql.plan(...).summary()` shows
  them). Layers that all agree are one stack, as by the plain rule.

  Raises:
    TypeError: no sequence of quantizers, `ql.rule(...)` and None.
    ValueError: it is empty.
  """
  if not isinstance(rules, list | tuple):
    raise TypeError(
      f'per_layer takes a list with a rule for each layer, got {rules!r}'
    )
  if not rules:
    raise ValueError('per_layer needs a rule for each layer, got none')
  return PerLayer(
    tuple(_as_rule(r, f'layer {i} in per_layer') for i, r in enumerate(rules))
  )


def _as_rule(value: Any, where: str) -> Rule | None:
  if value is None or isinstance(value, Rule):
    return value
  if isinstance(value, Quantizer):
    return Rule(weight=value)
  raise TypeError(
    f'the rule for {where} must be a quantizer, ql.rule(...) or None, got '
    f'{value!r}'
  )


def _as_entry(value: Any, where: str) -> Entry:
  return value if isinstance(value, PerLayer) else _as_rule(value, where)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Ordered (pattern, rule, optional) triples; made by `recipe`.

  Attributes:
    entries: the triples; the rule may be `PerLayer`.
    strict: False dequantizes a quantized parameter where an operation has no
      rule for codes, and notes it; True refuses such a plan.
  """

  entries: tuple[tuple[str, Entry, bool], ...]
  strict: bool = True

  @classmethod
  def of_sites(cls, rules: Mapping[str, Any], strict: bool = True) -> Recipe:
    """A rule for each site, by its id."""
    entries = (
      (f'site:^{re.escape(site)}$', rule, False) for site, rule in rules.items()
    )
    return cls(tuple(entries), strict)

  def resolve(self, sites: Sequence[Site]) -> dict[str, Any]:
    """The rule of every site that a pattern matches.

    Raises:
      ValueError: nothing matches, a pattern decides nothing, or two
        parameters joined into one weight have different rules.
    """
    decided: dict[str, Entry] = {}
    used: set[str] = set()
    for site in sites:
      hits = [self._first(site, path) for path in _subjects(site)]
      found = {pattern for pattern, _ in hits if pattern is not None}
      used |= found
      rules = {r for p, r in hits if p is not None}
      if len(rules) > 1 or (rules and None in [p for p, _ in hits]):
        raise ValueError(
          f'the weight of site {site.id!r} joins {", ".join(site.paths)}, '
          'which match different rules; give them one rule'
        )
      if rules:
        decided[site.id] = next(iter(rules))
    if not decided:
      raise ValueError(
        f'no rule of the recipe matches any site. Patterns: '
        f'{[e[0] for e in self.entries]}. Sites: {_names(sites) or "none"}'
        f'{_why(sites)}'
      )
    for pattern, _, may_miss in self.entries:
      if pattern not in used and not may_miss:
        raise ValueError(
          f'rule {pattern!r} decides no site: it matches nothing, or an '
          'earlier rule matches first. Remove it, move it up, or wrap it in '
          f'ql.optional(...). Sites: {_names(sites)}'
        )
    return decided

  def _first(self, site, path):
    for pattern, found, _ in self.entries:
      named = pattern.startswith('site:')
      subject = site.id if named else path and f'/{path}'
      if subject and re.search(pattern.removeprefix('site:'), subject):
        return pattern, found
    return None, None

  def to_json(self) -> list[dict[str, Any]]:
    return [
      {
        'pattern': p,
        'rule': None if r is None else r.to_json(),
        **({'optional': True} if o else {}),
      }
      for p, r, o in self.entries
    ]

  @classmethod
  def from_json(
    cls, data: Sequence[Mapping[str, Any]], strict: bool = True
  ) -> Recipe:
    """Undoes `to_json`."""
    entries = (
      (e['pattern'], from_json(e['rule']), e.get('optional', False))
      for e in data
    )
    return cls(tuple(entries), strict)


def _subjects(site: Site) -> tuple[str | None, ...]:
  """Paths a site is matched by: all joined leaves, or the leading one."""
  if site.view is not None and len(site.paths) > 1:
    return site.paths
  return (site.path,)


def _why(sites: Sequence[Site]) -> str:
  """What is wrong where a recipe is not to blame."""
  if any(site.paths for site in sites):
    return ''
  return (
    ': no product reads a parameter. Does the function take its weights from '
    'the parameters it is given? A product of two activations is matched by '
    "'site:<name>'"
  )


def _names(sites: Sequence[Site], limit: int = 12) -> str:
  ids = [s.id for s in sites]
  more = f', ... ({len(ids) - limit} more)' if len(ids) > limit else ''
  return ', '.join(ids[:limit]) + more


def expression(pattern: str, what: str) -> re.Pattern[str]:
  """A compiled regular expression.

  Raises:
    ValueError: it is none; `what` says what it was to be.
  """
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'{what} {pattern!r} is not a regular expression: {error}'
    ) from error


def recipe(rules: Any, *, strict: bool | None = None) -> Recipe:
  """An ordered recipe from `{pattern: quantizer | rule | None}`.

  Args:
    rules: first match wins; see the module. `per_layer` gives the layers of a
      scan rules of their own. A plan or an allocation gives
      every site what it says.
    strict: see `Recipe`; True, or as the given recipe has it.

  Raises:
    TypeError: a pattern is not a string, or a rule is not a rule.
    ValueError: a pattern is not a regular expression, or there is none.
  """
  if strict is not None:
    _flag('strict', strict)
  rules = getattr(rules, 'recipe', rules)
  if isinstance(rules, Recipe):
    return (
      rules if strict is None else dataclasses.replace(rules, strict=strict)
    )
  if not isinstance(rules, Mapping):
    raise TypeError(f'a recipe is a dict of pattern: rule, got {rules!r}')
  if not rules:
    raise ValueError('the recipe is empty: give at least one pattern: rule')
  entries = []
  for pattern, value in rules.items():
    if not isinstance(pattern, str):
      raise TypeError(f'recipe patterns are strings, got {pattern!r}')
    expression(pattern.removeprefix('site:'), 'the recipe pattern')
    inner = value.rule if isinstance(value, Optional) else value
    entries.append(
      (pattern, _as_entry(inner, repr(pattern)), isinstance(value, Optional))
    )
  return Recipe(tuple(entries), strict is not False)
