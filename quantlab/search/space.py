"""The search space: the options of each site of a program, and their costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantlab import cost, layering, planner
from quantlab.core import Quantizer
from quantlab.graph import tracing
from quantlab.plan import Plan
from quantlab.recipe import PerLayer, Recipe, Rule, expression
from quantlab.recipe import recipe as as_recipe
from quantlab.search.table import Columns, Row

Cost = Callable[[Plan], Mapping[str, float]]
COSTS: dict[str, Cost] = {'bytes': cost.nbytes, 'bops': cost.bops}


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
  """What can be chosen in one program.

  Attributes:
    rows: sites that are decided together, with their options.
    kept: rules of the sites with one, by id.
    plan: simulates them: every role that some option of a site quantizes.
    columns: a plan for each position in the lists of options; a site with
      fewer options keeps its last one.
    column_of: by site, the column in which it has each of its options.
    costs: by name, of each option of each row.
    fixed: by name, the cost of everything else.
    layers: of each site whose layers are decided one by one, what they are
      called; where rows name sites, they name these.
  """

  rows: tuple[Row, ...]
  kept: dict[str, Rule | None]
  plan: Plan
  columns: tuple[Plan, ...]
  column_of: dict[str, tuple[int, ...]]
  costs: dict[str, Columns]
  fixed: dict[str, float]
  layers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  def names(self, site: str) -> tuple[str, ...]:
    """What rows call a site: its layers, or itself."""
    return self.layers.get(site, (site,))

  @property
  def places(self) -> dict[str, tuple[str, int | None]]:
    """(site, layer or None for all of it) by what rows call it."""
    found: dict[str, tuple[str, int | None]] = {}
    for site in self.options:
      found[site] = site, None
    for site, names in self.layers.items():
      del found[site]
      found |= {name: (site, i) for i, name in enumerate(names)}
    return found

  @property
  def options(self) -> dict[str, tuple[Rule | None, ...]]:
    """Rules that each site may take, by id; one where nothing is chosen."""
    found: dict[str, tuple[Rule | None, ...]] = {
      k: (s.rule,) for k, s in self.plan.quantized.items()
    }
    home = {n: site for site, names in self.layers.items() for n in names}
    for row in self.rows:
      found |= dict.fromkeys((home.get(s, s) for s in row.sites), row.rules)
    return found


def space(
  apply: Callable,
  params: Any,
  choices: Mapping[str, Any],
  *args: Any,
  ties: Iterable[Sequence[str]] = (),
  costs: Mapping[str, Cost] | None = None,
  layers: bool = False,
) -> Space:
  """Resolves `{pattern: options}` for one program, from shapes alone.

  Args:
    apply: `apply(params, *args)`.
    params: parameters, or their shapes.
    choices: as a recipe, with a list of rules in the place of one: quantizers
      (weight only), `ql.rule(...)` or None (float). A single rule is not
      searched.
    *args: example arguments, or their shapes.
    ties: groups of site ids, or of regular expressions that find them, that
      take one option together. Sites that read one stored parameter do so
      without being named.
    costs: further costs by name, `plan -> {site: cost}`, such as a
      `ql.cost.LatencyTable`; of a layer its share of the site's.
    layers: a row for each layer of a site in a scan over stacked layers:
      'layers/w[0]', 'layers/w[1]', ... Ties name these.

  Raises:
    ValueError: nothing to choose, or nothing by layer; options that contradict
      each other, tied sites with different options; what `ql.plan` refuses.
  """
  lists = _lists(choices)
  traced, leaves, inputs = tracing.Tracer(apply)(params, args, {})
  found: dict[str, list[Rule | None]] = {}
  rules_of = []
  for j in range(max(map(len, lists.values()))):
    column = as_recipe({p: v[min(j, len(v) - 1)] for p, v in lists.items()})
    rules = column.resolve(traced.analysis.sites)
    rules_of.append(rules)
    for site, rule in rules.items():
      known = found.setdefault(site, [])
      if rule not in known:
        known.append(rule)
  options = {k: tuple(v) for k, v in found.items()}
  base = _make(
    traced, leaves, inputs, {k: _union(k, v) for k, v in options.items()}
  )
  columns = tuple(_column(traced, leaves, inputs, r, base) for r in rules_of)
  named = _layers(traced.analysis.sites, base, options) if layers else {}
  rows = _rows(base, options, named, ties)
  if not rows:
    raise ValueError(
      'nothing to choose: no site has more than one option. Give a pattern '
      'several, such as {"/kernel$": [ql.int4(), ql.int8()]}; sites: '
      f'{list(options)}'
    )
  column_of = {
    k: tuple(
      next(j for j, rules in enumerate(rules_of) if rules[k] == rule)
      for rule in v
    )
    for k, v in options.items()
  }
  models = COSTS | dict(costs or {})
  kept = {k: v[0] for k, v in options.items() if len(v) == 1}
  made = Space(rows, kept, base, columns, column_of, {}, {}, named)
  priced, fixed = _price(traced, made, models)
  return dataclasses.replace(made, costs=priced, fixed=fixed)


def _layers(sites, base: Plan, options) -> dict[str, tuple[str, ...]]:
  """Names of the layers of the sites that are decided layer by layer."""
  able = {s.id for s in sites if layering.whole(s) is None}
  able = {k for k in able if len(options.get(k, ())) > 1}
  for group in _shared(base, options):  # stored once: all of it, or by layer
    if not able.issuperset(group):
      able -= set(group)
  if not able:
    raise ValueError(
      'layers=True, but no site with several options is in a scan over stacked '
      f'layers; sites: {list(options)}'
    )
  return {
    k: tuple(f'{k}[{i}]' for i in range(base.sites[k].loops[0]))
    for k in options
    if k in able
  }


def label(rule: Rule | None) -> str:
  """What an option is called: its formats, and what else tells it apart."""
  if rule is None:
    return 'float'
  roles = rule.quantizers
  named = [
    _short(q) if r == 'weight' else f'{r} {_short(q)}' for r, q in roles.items()
  ]
  return ', '.join(named)


def _short(q: Quantizer) -> str:
  text = repr(q)
  return text.removesuffix('()')


def _lists(choices: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
  if not isinstance(choices, Mapping):
    raise TypeError(
      f'a search space is a dict of pattern: [rules], got {choices!r}'
    )
  if not choices:
    raise ValueError('the search space is empty: give a pattern and its rules')
  found = {
    p: tuple(v) if isinstance(v, list | tuple) else (v,)
    for p, v in choices.items()
  }
  for pattern, rules in found.items():
    if not rules:
      raise ValueError(f'pattern {pattern!r} has no options to choose from')
    known = [as_recipe({pattern: r}).entries[0][1] for r in rules if r]
    if any(isinstance(r, PerLayer) for r in known):
      raise ValueError(
        f'pattern {pattern!r} has a per_layer among its options; layers=True '
        'decides layer by layer, with options such as ql.int4()'
      )
    twice = [r for i, r in enumerate(known) if r in known[:i]]
    if twice or sum(r is None for r in rules) > 1:
      raise ValueError(
        f'pattern {pattern!r} has an option twice: {twice or [None]}'
      )
  return found


def _union(site: str, rules: Sequence[Rule | None]) -> Rule | None:
  """A rule with every role that some option quantizes."""
  roles: dict[str, Quantizer] = {}
  folds = {r.fold for r in rules if r is not None and r.weight is not None}
  if len(folds) > 1:
    raise ValueError(
      f'the options of site {site!r} conflict: some fold the BatchNorm after '
      'it and some do not'
    )
  for rule in rules:
    for role, q in (rule.quantizers if rule else {}).items():
      first = roles.setdefault(role, q)
      if role != 'weight' and (first.per == 'tensor') != (q.per == 'tensor'):
        raise ValueError(
          f'the options of site {site!r} conflict: its {role} has {first!r} '
          f"and {q!r}; either all of them or none have per='tensor'"
        )
  if not roles:
    return None
  return Rule(**roles, fold=next(iter(folds), True))


def _make(traced, leaves, inputs, rules) -> Plan:
  return planner.make(traced, leaves, inputs, Recipe.of_sites(rules))


def _column(traced, leaves, inputs, rules, base: Plan) -> Plan:
  if any(r is not None for r in rules.values()):
    return _make(traced, leaves, inputs, rules)
  sites = {
    k: dataclasses.replace(s, rule=None, compute='float', fold=False)
    for k, s in base.sites.items()
  }
  return dataclasses.replace(
    base, sites=sites, leaves={}, effective={}, dropped=()
  )


def _rows(base: Plan, options, layers, ties) -> tuple[Row, ...]:
  """Sites with something to choose, joined where they are tied.

  Args:
    base: a plan.
    options: of each site.
    layers: names of those that are decided layer by layer.
    ties: see `space`.
  """
  shared = [
    group
    for sites in _shared(base, options)
    for group in zip(*(layers.get(k, (k,)) for k in sites), strict=True)
  ]
  options = {
    name: v for k, v in options.items() for name in layers.get(k, (k,))
  }
  ids = [k for k, v in options.items() if len(v) > 1]
  parent = {k: k for k in ids}

  def root(k: str) -> str:
    while parent[k] != k:
      k = parent[k]
    return k

  for group in [*shared, *_matched(ids, ties)]:
    first = group[0]
    for k in group[1:]:
      if options[k] != options[first]:
        raise ValueError(
          f'tied sites need the same options: {first!r} has '
          f'{[label(r) for r in options[first]]}, {k!r} has '
          f'{[label(r) for r in options[k]]}'
        )
      low, high = sorted((root(first), root(k)), key=ids.index)
      parent[high] = low
  members: dict[str, list[str]] = {}
  for k in ids:
    members.setdefault(root(k), []).append(k)
  return tuple(
    Row(first, tuple(map(label, options[first])), tuple(group), options[first])
    for first, group in members.items()
  )


def _shared(base: Plan, options) -> list[list[str]]:
  """Sites that read one stored parameter."""
  readers: dict[str, list[str]] = {}
  for k in options:
    for path in base.sites[k].paths:
      if path in base.leaves:
        readers.setdefault(path, []).append(k)
  return [g for g in readers.values() if len(g) > 1 and len(options[g[0]]) > 1]


def _matched(ids: Sequence[str], ties) -> list[list[str]]:
  found = []
  for group in ties:
    words = [group] if isinstance(group, str) else list(group)
    if not words:
      raise ValueError('ties hold an empty group; a group names sites')
    hits: list[str] = []
    for word in words:
      match = [word] if word in ids else []
      match = match or list(filter(expression(word, 'the tie').search, ids))
      if not match:
        raise ValueError(
          f'the tie {word!r} finds no site that is chosen; there are {ids}'
        )
      hits += match
    found.append(list(dict.fromkeys(hits)))
  return found


def _price(traced, made: Space, models):
  """Costs of every option, and of what is not chosen."""
  base, column_of, places = made.plan, made.column_of, made.places
  folds = {
    s.id: {traced.paths[i] for i in s.fold.leaves}
    for s in traced.analysis.sites
    if s.fold is not None
  }
  costs: dict[str, Columns] = {}
  fixed: dict[str, float] = {}
  for name, model in models.items():
    by_column = [_priced(name, model, plan) for plan in made.columns]
    if model is cost.nbytes:
      by_column = [
        {
          k: v + _unfolded(base, plan, folds.get(k, ()))
          for k, v in found.items()
        }
        for found, plan in zip(by_column, made.columns, strict=True)
      ]
    costs[name] = tuple(
      np.array(
        [
          sum(
            by_column[column_of[s][k]][s] / len(made.names(s))
            for s, _ in map(places.__getitem__, row.sites)
          )
          for k in range(len(row.rules))
        ],
        float,
      )
      for row in made.rows
    )
    chosen = {places[s][0] for row in made.rows for s in row.sites}
    rest = {k: v for k, v in by_column[0].items() if k not in chosen}
    fixed[name] = float(sum(rest.values()))
  if 'bytes' in fixed and models['bytes'] is cost.nbytes:
    fixed['bytes'] += cost.rest_nbytes(base)
  return costs, fixed


def _priced(name: str, model: Cost, plan: Plan) -> Mapping[str, float]:
  """What a cost model says of each site.

  Raises:
    TypeError: it cannot be called so, or says nothing by site.
    ValueError: it leaves sites out.
  """
  usage = f'the cost {name!r} must be a function plan -> {{site: number}}'
  try:
    found = model(plan)
  except TypeError as error:
    raise TypeError(f'{usage}: {error}') from error
  if not isinstance(found, Mapping):
    raise TypeError(f'{usage}; it returned {found!r}')
  if missing := [k for k in plan.sites if k not in found]:
    raise ValueError(f'{usage}; it says nothing of {missing[:5]}')
  return found


def _unfolded(base: Plan, plan: Plan, leaves: Iterable[str]) -> int:
  """Bytes of a BatchNorm that is kept where its site stays in float."""
  kept = [p for p in leaves if p in base.dropped and p not in plan.dropped]
  return sum(base.parameters[p][0] for p in kept)
