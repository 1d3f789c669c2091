"""Making a plan: a recipe resolved for one program, checked from shapes.

Nothing is computed. The plan is checked by evaluating the quantized function
on abstract arrays, so that nothing fails later: where codes cannot be carried
to a product by changing metadata, the product gets an effective weight of its
own, and parameters that only effective weights use are dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import handlers, layering, ops, rewrites
from quantlab.core import Layout, Quantizer, rng
from quantlab.graph import rewrite, roles, tracing
from quantlab.graph import sites as sites_lib
from quantlab.graph.values import Dropped
from quantlab.plan import Plan, SitePlan, Storage
from quantlab.recipe import Recipe, Rule
from quantlab.recipe import recipe as as_recipe


def plan(
  apply: Callable,
  params: Any,
  recipe: Recipe | Mapping[str, Any] | Any,
  *args: Any,
  **kwargs: Any,
) -> Plan:
  """Resolves a recipe for one function and one shape of its arguments.

  Args:
    apply: `apply(params, *args, **kwargs)`.
    params: parameters, or their shapes (`jax.ShapeDtypeStruct` leaves).
    recipe: see `ql.recipe`.
    *args: example arguments, or their shapes.
    **kwargs: example keyword arguments.

  Raises:
    ValueError: a rule matches nothing, a group does not divide, a site cannot
      take its quantizer, one stored parameter would need two formats.
    TypeError: a parameter that is not floating point, or is codes already.
  """
  call = layering.resolve(apply, params, as_recipe(recipe), args, kwargs)
  made = make(call.traced, call.leaves, call.inputs, call.recipe)
  return dataclasses.replace(made, scans=call.scans)


def make(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  inputs: Sequence[Any],
  recipe: Recipe,
) -> Plan:
  """`plan` for a call that is already traced."""
  coded = [
    path
    for path, leaf in zip(traced.paths, leaves, strict=True)
    if tracing.is_stored(leaf)
  ]
  if coded:
    raise TypeError(
      f'parameters are quantized already: {", ".join(coded[:5])}; a plan is '
      'made for the float parameters'
    )
  rules = recipe.resolve(traced.analysis.sites)
  computed: set[str] = set()
  while True:
    draft = _Builder(traced, leaves, rules, computed).build(recipe.strict)
    candidates = _droppable(traced, draft)
    while True:
      draft = dataclasses.replace(draft, dropped=tuple(sorted(candidates)))
      failures, notes = _check(traced, leaves, inputs, draft)
      kept = {p for f in failures for p in f.lost.paths} & candidates
      if not kept:
        break
      candidates -= kept
    if not failures:
      return dataclasses.replace(draft, notes=(*draft.notes, *notes))
    again = {f.site for f in failures if f.site in draft.quantized}
    again -= {*computed, *draft.effective, None}
    if not again:
      raise _planning_error(traced, draft, failures[0])
    computed |= {s for s in again if s is not None}


def _droppable(traced, draft) -> set[str]:
  """Parameters that perhaps nothing but effective weights reads."""
  weights = {p for s in draft.effective for p in draft.sites[s].paths}
  maps = {
    traced.paths[i]
    for site in traced.analysis.sites
    if site.id in draft.folded
    for i in site.fold.leaves
  }
  return (weights | maps) - set(draft.leaves)


def _check(traced, leaves, inputs, draft):
  """Runs the quantized program on shapes: (failures, notes)."""
  weights = [
    draft.leaves[p].abstract()
    if p in draft.leaves
    else Dropped(tuple(leaf.shape), str(leaf.dtype))
    if p in draft.dropped
    else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for p, leaf in zip(traced.paths, leaves, strict=True)
  ]
  state = draft.abstract_state()
  for name, storage in draft.effective.items():
    state.setdefault(name, {})['effective'] = storage.abstract()
  failures: list[rewrite.Failure] = []
  report: list[str] = []

  def run(weights, inputs, state):
    evaluator = rewrites.evaluator_of(
      traced,
      weights,
      frozenset(draft.quantized),
      handlers.deploying(draft),
      folded=draft.folded,
      strict=draft.strict,
      report=report,
      failures=failures,
    )
    return evaluator.run(inputs, state)[0]

  jax.eval_shape(run, weights, list(inputs), state)
  return failures, tuple(dict.fromkeys(report))


def _planning_error(traced, draft, failure: rewrite.Failure) -> Exception:
  uses = traced.analysis.other_uses
  also = sorted({u for p in failure.lost.paths for u in uses.get(p, ())})
  text = f' It is also read by: {", ".join(also)}.' if also else ''
  return ValueError(f'{failure.lost.error(failure.where)}{text}')


class _Builder:
  """Collects storage and site decisions, refusing what cannot be.

  Attributes:
    computed: sites whose weight cannot be carried to them as codes, though it
      is a layout-only view: they get effective weights.
  """

  def __init__(self, traced, leaves, rules, computed):
    self.traced = traced
    self.leaf = dict(zip(traced.paths, leaves, strict=True))
    self.rules = rules
    self.computed = computed
    self.stored: dict[str, Storage] = {}
    self.owner: dict[str, str] = {}
    self.effective: dict[str, Storage] = {}
    self.turned: set[str] = set()  # sites whose codes lie otherwise
    self.notes: list[str] = []

  def build(self, strict: bool) -> Plan:
    found = {}
    for site in self.traced.analysis.sites:
      rule = _for_kind(site, self.rules.get(site.id))
      fold = self.place(site, rule) if rule is not None else False
      found[site.id] = self.site_plan(site, rule, fold)
    if not any(s.rule for s in found.values()):
      raise ValueError('every rule of the recipe is None: nothing is quantized')
    self.check_shared(found)
    for name, count in self.traced.analysis.opaque:
      self.notes.append(
        f'{count} product(s) inside {name} are left as they are'
      )
    self.note_hidden()
    return Plan(
      sites=found,
      leaves=self.stored,
      effective=self.effective,
      captured=tracing.closed_over(self.traced),
      parameters={k: _bytes(v) for k, v in self.leaf.items()},
      notes=tuple(dict.fromkeys(self.notes)),
      strict=strict,
    )

  def note_hidden(self):
    """Products of parameters alone are no sites: nothing is quantized."""
    sited = {p for s in self.traced.analysis.sites for p in s.paths}
    for path, uses in self.traced.analysis.other_uses.items():
      if path not in sited and any(u in roles.KINDS for u in uses):
        self.notes.append(
          f'{path} is multiplied with other parameters only, before any input: '
          'no site'
        )

  def is_effective(self, site) -> bool:
    return site.derivation == 'effective' or site.id in self.computed

  def place(self, site, rule) -> bool:
    """Decides where a site's weight is stored; returns whether it folds."""
    self.check(site, rule)
    quantizer = rule.weight
    if quantizer is None or site.side is None:
      return False
    fold = rule.fold and site.fold is not None and site.kind != 'gather'
    fold = fold and not self.shared_leaf(site)
    if self.is_effective(site) or fold:
      self.effective[site.id] = self.operand_storage(site, quantizer)
      self.note_growth(site)
      return fold
    for part, leaf in enumerate(site.view.leaves):
      self.place_leaf(site, part, self.traced.paths[leaf], quantizer)
    return False

  def note_growth(self, site):
    size = math.prod(self.effective[site.id].shape)
    given = sum(math.prod(self.leaf[p].shape) for p in site.paths)
    if size > given:
      self.notes.append(
        f'{site.id}: its effective weight has {size} elements, the parameters '
        f'it is computed from have {given}'
      )

  def shared_leaf(self, site) -> bool:
    """Whether another site reads the same stored parameter."""
    return any(
      set(other.paths) & set(site.paths)
      for other in self.traced.analysis.sites
      if other.id != site.id
    )

  def check(self, site, rule):
    roles = rule.quantizers
    if site.refused:
      raise ValueError(f'site {site.id!r} cannot be quantized: {site.refused}')
    wants = {'weight', 'input'} if site.side else {'lhs', 'rhs'}
    wrong = [r for r in roles if r not in wants | {'output'}]
    if wrong:
      kind = (
        'a product with a weight'
        if site.side
        else 'a product of two activations'
      )
      raise ValueError(
        f'site {site.id!r} is {kind}: a rule for it takes {sorted(wants)}, got '
        f'{sorted(wrong)}'
      )
    dtype = jnp.dtype(site.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f'site {site.id!r} has {dtype} parameters; only floating-point '
        'parameters are quantized. Leave it in float (rule None).'
      )
    for role, q in roles.items():
      if role != 'weight':
        check_activation(site, role, q)
      elif q.static:
        raise ValueError(
          f'{q!r} for the weight of site {site.id!r}: static ranges are for '
          'activations; a weight is its own calibration'
        )
      elif site.weight_shape is not None and site.dims is not None:
        k = math.prod(site.contraction)
        n = math.prod(site.weight_shape[i] for i in site.dims.w_free)
        if k == 0:
          raise ValueError(
            f'the weight of site {site.id!r} has no elements to quantize: its '
            f'shape is {site.weight_shape}. Leave it in float (rule None)'
          )
        q.check(k, n, site.path if '/' in site.path else repr(site.path))

  def operand_storage(self, site, quantizer) -> Storage:
    """Storage in the axes of the product's operand, layer loops in front."""
    loops = len(site.loops)
    shape = (*site.loops, *site.weight_shape)
    layout = Layout.of(
      shape,
      tuple(loops + i for i in site.dims.w_contract),
      (*range(loops), *(loops + i for i in site.dims.w_batch)),
    )
    return Storage(quantizer, layout, shape, site.dtype)

  def place_leaf(self, site, part, path, quantizer):
    leaf = self.leaf[path]
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(f'parameter {path!r} is {leaf.dtype}, not floating point')
    layout = leaf_layout(site, part, leaf.shape)
    new = Storage(quantizer, layout, tuple(leaf.shape), str(leaf.dtype))
    old = self.stored.setdefault(path, new)
    self.owner.setdefault(path, site.id)
    if old.quantizer != quantizer:
      raise ValueError(
        f'parameter {path!r} is stored once but its uses ask for two formats: '
        f'{old.quantizer} at {self.owner[path]!r}, {quantizer} at {site.id!r}'
      )
    if old.layout != layout:
      self.turned.add(site.id)
      self.notes.append(
        f'{path}: its use at {site.id} contracts other axes than at '
        f'{self.owner[path]}, where its scales are; the product there runs on '
        'dequantized weights'
      )

  def check_shared(self, found):
    """A stored parameter has one value: every use of it sees the codes."""
    for site in self.traced.analysis.sites:
      own = found[site.id].rule
      if site.view is None or site.id in self.effective:
        continue
      for path in site.paths:
        if path in self.stored and (own is None or own.weight is None):
          raise ValueError(
            f'parameter {path!r} is quantized at {self.owner[path]!r} but left '
            f'in float at {site.id!r}, and it is stored once. Give both uses '
            'one rule, or leave both in float.'
          )

  def compute(self, site, rule) -> str:
    if rule is None:
      return 'float'
    way = ops.route(site.kind, rule.quantizers)
    return 'simulated' if way == 'int8' and site.id in self.turned else way

  def site_plan(self, site, rule, fold) -> SitePlan:
    computed = self.is_effective(site) or fold
    weight_loops = site.loops if computed else site.weight_loops
    matrix: tuple[int, ...] = ()
    if site.side is not None and site.dims is not None:
      shape = site.weight_shape
      matrix = (
        *weight_loops,
        *(shape[i] for i in site.dims.w_batch),
        math.prod(shape[i] for i in site.dims.w_contract),
        math.prod(shape[i] for i in site.dims.w_free),
      )
    return SitePlan(
      id=site.id,
      kind=site.kind,
      paths=site.paths,
      derivation='effective' if self.is_effective(site) else site.derivation,
      loops=site.loops,
      weight_loops=weight_loops,
      matrix=matrix,
      macs=site.macs,
      rule=rule,
      compute=self.compute(site, rule),
      fold=fold,
      tensors=(site.lhs, site.rhs, site.out),
    )


def _for_kind(site: sites_lib.Site, rule: Rule | None) -> Rule | None:
  """A rule without what a site has not: a lookup's input is an index."""
  if rule is None or site.kind != 'gather' or rule.input is None:
    return rule
  rule = dataclasses.replace(rule, input=None)
  return rule if rule.quantizers else None


def leaf_layout(
  site: sites_lib.Site, part: int, shape: Sequence[int]
) -> Layout:
  """How a parameter that a site's weight is a view of lies as (..., K, N).

  Args:
    site: whose weight is a view of its parameters.
    part: which of them.
    shape: of that parameter.
  """
  view, dims = site.view, site.dims
  if view is None or dims is None:
    raise ValueError(f'the weight of site {site.id!r} is no view of parameters')
  k_axes = view.axes(dims.w_contract, part)
  n_axes = view.axes(dims.w_free, part)
  batch = view.axes(dims.w_batch, part)
  # An axis that no operand axis comes from was indexed away: a layer.
  indexed = [
    i
    for i in range(len(shape))
    if i not in (*k_axes, *n_axes, *batch, *view.loops) and shape[i] != 1
  ]
  loop_axes = tuple(dict.fromkeys((*view.loops, *indexed, *batch)))
  order = _stored_order(site, view, part, k_axes)
  return Layout.of(tuple(shape), order, loop_axes)


def _stored_order(site, view, part, k_axes) -> tuple[int, ...]:
  """Contraction axes of a parameter in the order the product flattens them.

  A convolution flattens (spatial..., input channel), whatever the kernel's
  own order.
  """
  pieces = [p for i in site.dims.w_contract for p in view.dims[part][i]]
  order = tuple(dict.fromkeys(p.axis for p in pieces))
  return order if set(order) == set(k_axes) else k_axes


def check_activation(site: sites_lib.Site, role: str, q: Quantizer) -> None:
  """Refuses an activation quantizer that a site cannot take."""
  if q.static and q.per != 'tensor':
    raise ValueError(
      f'{q!r} for the {role} of site {site.id!r}: a static range needs '
      "per='tensor' (a batch has no fixed number of tokens)"
    )
  if q.learned:
    raise ValueError(
      f'{q!r} for the {role} of site {site.id!r}: a learned table is for '
      'weights; an activation takes a format whose values are fixed'
    )
  if q.static and q.scale.direct:
    raise ValueError(
      f'{q!r} for the {role} of site {site.id!r}: {q.scale!r} is no range that '
      'calibration finds; use absmax(), minmax(), percentile() or mse()'
    )
  if q.group is not None and role != 'output' and site.kind != 'conv':
    q.check(math.prod(site.contraction), 1, f"the {role} of '{site.id}'")
  if site.kind == 'conv' and q.per != 'tensor' and q.per != 'token':
    raise ValueError(
      f'{q!r} for the {role} of convolution {site.id!r}: a convolution takes '
      "per='tensor', or per='token' (one scale per image)"
    )
  if q.per == 'channel':
    raise ValueError(
      f'{q!r} for the {role} of site {site.id!r}: an activation takes '
      "per='token', 'tensor' or 'head', or group=; a scale per channel cannot "
      'be taken out of the sum over channels'
    )
  if q.rounding == 'stochastic':
    raise ValueError(
      f'{q!r} for the {role} of site {site.id!r}: stochastic rounding of '
      'activations needs a key in every call; it is for training only'
    )


def _bytes(leaf: Any) -> tuple[int, int]:
  """(bytes, elements) of a parameter; keys count their raw words."""
  size = math.prod(leaf.shape)
  if rng.is_key(leaf):
    return leaf.dtype.itemsize * size, size
  return size * jnp.dtype(leaf.dtype).itemsize, size
