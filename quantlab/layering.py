"""Recipes with rules by layer: from one program to one in segments.

Every site of a scan whose layers have rules of their own becomes a site for
each run of layers that agree at all sites of the scan, with a plain rule (see
`graph.segments`). Planning, calibration and encoding see an ordinary program.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantlab.graph import segments, tracing
from quantlab.graph.sites import Address, Analysis, Site
from quantlab.recipe import PerLayer, Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
  """A call of a function with a recipe that has no rules by layer.

  Attributes:
    apply, params: of the program in segments, or as they were given.
    recipe: of its sites.
    traced, leaves, inputs: see `tracing.Tracer`.
    scans: what was cut.
  """

  apply: Callable
  params: Any
  recipe: Recipe
  traced: tracing.Traced
  leaves: Sequence[Any]
  inputs: Sequence[Any]
  scans: tuple[segments.Scan, ...] = ()


def resolve(
  apply: Callable,
  params: Any,
  recipe: Recipe,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> Call:
  """Traces a call, in segments where the recipe asks for them.

  Raises:
    ValueError: a rule by layer for a site that is in no scan over layers, in
      nested ones, in one of another length, or whose weight is no stack.
  """
  traced, leaves, inputs = tracing.Tracer(apply)(params, args, kwargs)
  if not any(isinstance(rule, PerLayer) for _, rule, _ in recipe.entries):
    return Call(apply, params, recipe, traced, leaves, inputs)
  analysis = traced.analysis
  rules = recipe.resolve(analysis.sites)
  for site in analysis.sites:
    if isinstance(rules.get(site.id), PerLayer):
      _check(site, len(rules[site.id].rules))
  cut = _cut(analysis, rules)
  if not cut:
    return Call(apply, params, _plain(recipe), traced, leaves, inputs)
  scans = _scans(traced, rules, cut)
  split = segments.split(params, scans)
  inner = segments.segmented(apply, scans)
  before = traced
  traced, leaves, inputs = tracing.Tracer(inner)(split, args, kwargs)
  scans, found = _renamed(scans, before, traced.analysis, rules, cut)
  made = Recipe.of_sites(found, recipe.strict)
  return Call(inner, split, made, traced, leaves, inputs, scans)


def _check(site: Site, count: int) -> None:
  """Whether a site can have a rule for each of so many layers."""
  if len(site.loops) == 1 and site.loops[0] != count:
    raise ValueError(
      f'per_layer has {count} rules for site {site.id!r}, which is in a scan '
      f'over {site.loops[0]} layers: give one for each'
    )
  if why := whole(site):
    raise ValueError(
      'per_layer is for a site whose layers are stacked in one scan, and '
      f'{site.id!r} {why}: give it one rule, before the pattern that matches '
      'it here'
    )


def whole(site: Site) -> str | None:
  """Why the layers of a site cannot have rules of their own, or None."""
  if not site.loops:
    return 'is in no scan over layers'
  if len(site.loops) > 1:
    return f'is in nested scans over {site.loops} layers'
  if site.side is not None and site.weight_loops != site.loops:
    return 'has one weight for all turns of its scan'
  if site.view is not None and not _stacked_first(site):
    return f'has its layers along axis {site.view.loops[0]} of {site.path!r}'
  return None


def _plain(recipe: Recipe) -> Recipe:
  """The recipe with one rule where all layers have the same."""
  entries = tuple(
    (p, rule.rules[0] if isinstance(rule, PerLayer) else rule, optional)
    for p, rule, optional in recipe.entries
  )
  return dataclasses.replace(recipe, entries=entries)


def _cut(
  analysis: Analysis, rules: Mapping[str, Any]
) -> dict[Address, tuple[int, ...]]:
  """Lengths of the segments, by scan; scans of one stack are cut alike."""
  ends: dict[Address, set[int]] = {}
  length: dict[Address, int] = {}
  stacks: dict[Address, set[str]] = {}
  for site in analysis.sites:
    if len(site.loops) != 1:
      continue
    scan = segments.layer_scan(analysis, site.address)
    rule = rules.get(site.id)
    mine = ends.setdefault(scan, set())
    length[scan] = site.loops[0]
    stacks.setdefault(scan, set()).update(site.paths)
    if isinstance(rule, PerLayer):
      pairs = enumerate(itertools.pairwise(rule.rules), 1)
      mine |= {i for i, (a, b) in pairs if a != b}
  for a, b in [*itertools.combinations(ends, 2)] * len(ends):
    if stacks[a] & stacks[b]:
      ends[a] = ends[b] = ends[a] | ends[b]
  return {
    scan: tuple(
      b - a for a, b in itertools.pairwise([0, *sorted(at), length[scan]])
    )
    for scan, at in ends.items()
    if at
  }


def _scans(traced, rules, cut) -> tuple[segments.Scan, ...]:
  """What is cut, with the parameters that are held in parts."""
  sites = traced.analysis.sites
  inside = {s.id: scan for s in sites if (scan := _scan_of(s, cut)) is not None}
  held = {
    path
    for s in sites
    if s.id in inside and _has_weight(rules.get(s.id)) and _stacked_first(s)
    for path in s.paths
  }
  for site in sites:
    both = held & set(site.paths)
    if both and not (site.id in inside and _stacked_first(site)):
      raise ValueError(
        f'the layers of {sorted(both)} have formats of their own in a scan, '
        f'but {site.id!r} reads them outside of it: give them one format'
      )
  found = []
  for scan, lengths in cut.items():
    mine = [s for s in sites if inside.get(s.id) == scan]
    paths = dict.fromkeys(p for s in mine for p in s.paths if p in held)
    names = dict.fromkeys((s.id for s in mine), ())
    found.append(segments.Scan(lengths, names, tuple(paths)))
  return tuple(found)


def _has_weight(rule: Any) -> bool:
  rules = rule.rules if isinstance(rule, PerLayer) else (rule,)
  return any(r is not None and r.weight is not None for r in rules)


def _stacked_first(site: Site) -> bool:
  """Whether a scan goes over the first axis of what the weight is made of."""
  return site.view is not None and site.view.loops[:1] == (0,)


def _scan_of(site: Site, cut: Mapping[Address, Any]) -> Address | None:
  """The scan in segments that a site lies in."""
  return next((a for a in cut if site.address[: len(a)] == a), None)


def _renamed(scans, before: tracing.Traced, after: Analysis, rules, cut):
  """The scans with the new names of their sites, and the rules by them."""
  new = iter(after.sites)
  names: dict[str, dict[int, str]] = {}
  found: dict[str, Any] = {}
  groups = itertools.groupby(before.analysis.sites, lambda s: _scan_of(s, cut))
  for scan, group in groups:
    order = list(range(len(cut.get(scan, (1,)))))
    starts = [a for a, _ in segments.bounds(cut.get(scan, (1,)))]
    if scan is not None and segments.is_reversed(before.program, scan):
      order.reverse()
    for i, site in itertools.product(order, list(group)):
      twin = _twin(site, next(new, None))
      names.setdefault(site.id, {})[i] = twin.id
      if site.id in rules:
        rule = rules[site.id]
        by_layer = isinstance(rule, PerLayer)
        found[twin.id] = rule.rules[starts[i]] if by_layer else rule
  renamed = (
    {k: tuple(names[k][i] for i in range(len(s.lengths))) for k in s.sites}
    for s in scans
  )
  pairs = zip(scans, renamed, strict=True)
  return tuple(dataclasses.replace(s, sites=r) for s, r in pairs), found


def _twin(site: Site, found: Site | None) -> Site:
  """The product of the program in segments that stands for a product."""
  if found is None or (found.kind, found.side, found.derivation) != (
    site.kind,
    site.side,
    site.derivation,
  ):
    raise ValueError(
      f'per_layer: the weight of {site.id!r} cannot be followed through the '
      'program to the scan it is in, where it is needed in parts; stack the '
      'layers as they are used, or give them one format'
    )
  return found
