"""Where training begins: float parameters, or a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from quantlab import core, rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.calibration import ranges
from quantlab.core import QParams, QTensor
from quantlab.core.tree import named_leaves, path_str
from quantlab.graph import known, tracing
from quantlab.graph.values import Dropped
from quantlab.plan import LEARNED, Plan

# What a transform left to be done at run time goes on being done.
KEPT = ('transform', 'bias', 'adapter')


class Tracing:
  """A function with its plan, traced where weights are computed from several.

  Attributes:
    apply: the function.
    plan: its plan.
  """

  def __init__(self, apply: Callable, plan: Plan):
    self.apply, self.plan = apply, plan
    self._tracer = tracing.Tracer(apply, plan.captured)

  def check(self, params, args, kwargs) -> None:
    """Refuses parameters and arguments that the plan was not made for.

    Raises:
      ValueError: lists the sites that differ.
    """
    traced, _, _ = self._tracer(params, args, kwargs)
    found = {s.id: s for s in traced.analysis.sites}
    planned = self.plan.sites
    missing = [k for k in planned if k not in found]
    extra = [k for k in found if k not in planned]
    other = [
      f'{k}: (..., K, N) planned {planned[k].tensors[:2]}, found '
      f'{(s.lhs, s.rhs)}'
      for k, s in found.items()
      if k in planned
      and _weight_shape(s, planned[k].tensors) != _weight_shape(s)
    ]
    if missing or extra or other:
      raise ValueError(
        'the plan is of another model. Sites it has and the function lacks: '
        f'{missing or "none"}; sites it does not know: {extra or "none"}; '
        f'sites of other shapes: {other or "none"}. Make a plan of this '
        'function with ql.plan(apply, params, recipe, *args)'
      )

  def effective(self, params, args, kwargs) -> dict[str, dict[str, jax.Array]]:
    """Float effective weights and shifts by site."""
    if not self.plan.effective:
      return {}
    if not args and not kwargs:
      raise ValueError(
        f'the plan computes the weights of {list(self.plan.effective)[:5]} '
        'from several parameters, which takes a trace: pass an example of the '
        "function's arguments, or their shapes"
      )
    traced, leaves, _ = self._tracer(params, args, kwargs)
    chosen = frozenset(self.plan.effective)
    return jax.jit(
      lambda ls: known.weights(traced, ls, chosen, self.plan.folded)
    )(leaves)


def _weight_shape(site, tensors=None):
  """Shape of the operand that is a weight."""
  lhs, rhs = (site.lhs, site.rhs) if tensors is None else tensors[:2]
  return {'lhs': lhs, 'rhs': rhs}.get(site.side)


def start(
  tracer: Tracing,
  by_role: Mapping[str, Any],
  params: Any,
  batches: Iterable[Any] | None,
  given: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Variables to begin with; see `qat`."""
  plan = tracer.plan
  if rewrites.is_variables(params):
    given, params = params, thawed(params)
  elif given is not None:
    _refuse_transformed(given)
  if given is not None:
    _refuse_trained(given)
  plan.check_finite(dict(named_leaves(params)))
  args = () if batches is None else batches_lib.first(batches)
  if args:
    tracer.check(params, args, {})
  sites: dict[str, dict[str, Any]] = {}
  kept = {} if given is None else given['sites']
  for name, roles in kept.items():
    if found := {r: v for r, v in roles.items() if r in KEPT}:
      sites[name] = found
  statics = _static(tracer, params, batches, sites, kept)
  weights = _weights(tracer, params, args, given)
  for name, site in plan.quantized.items():
    assert site.rule is not None
    for role, quantizer in site.rule.quantizers.items():
      if role == 'weight':
        continue
      qparams = statics.get(name, {}).get(role)
      leaves = by_role[role].leaves(qparams, quantizer, site.loops)
      if leaves:
        sites.setdefault(name, {})[role] = leaves
  for (name, role), (storage, qparams) in weights.items():
    loops = qparams.scale.shape[:-2]
    leaves = by_role['weight'].leaves(qparams, storage.quantizer, loops)
    if leaves:
      sites.setdefault(name, {})[role] = leaves
  return {'weights': params, 'sites': sites}


def thawed(variables: Mapping[str, Any]) -> Any:
  """The parameters of a quantized model as floats, in the user's structure.

  Raises:
    ValueError: parameters were dropped for the effective weights they made.
  """

  def one(path, leaf):
    if isinstance(leaf, Dropped):
      raise ValueError(
        f'parameter {path_str(path)!r} is not in the quantized model: only '
        'the effective weight computed from it is. Pass the float parameters, '
        'and the model as start=model.params'
      )
    return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

  def is_leaf(x):
    return isinstance(x, QTensor | Dropped)

  return jax.tree_util.tree_map_with_path(
    one, variables['weights'], is_leaf=is_leaf
  )


def _refuse_trained(given: Mapping[str, Any]) -> None:
  """Leaves of an estimator are not ranges of a quantized model."""
  for name, roles in given['sites'].items():
    for role, leaves in roles.items():
      if role not in KEPT and set(leaves) & {*LEARNED, 'strength'}:
        raise ValueError(
          f'the {role} of {name!r} has leaves of training, {sorted(leaves)}: '
          'go on with these variables as they are, or begin with what they '
          'freeze to, init(trained.freeze(variables).params, batches)'
        )


def _refuse_transformed(given: Mapping[str, Any]) -> None:
  if not rewrites.is_variables(given):
    raise TypeError(
      'start= takes the variables of a quantized model (model.params), got '
      f'{type(given).__name__}'
    )
  moved = [k for k, roles in given['sites'].items() if 'transform' in roles]
  if moved:
    raise ValueError(
      f'the model changed its weights for the input transforms of {moved[:5]}; '
      'these float parameters are those before. Start from its own: '
      'init(model.params, batches)'
    )


def _static(tracer, params, batches, sites, given):
  """Parameters of static activation quantizers, by site and role."""
  plan = tracer.plan
  known_ = {
    name: {r: given[name][r] for r in roles}
    for name, roles in plan.static.items()
    if all(r in given.get(name, {}) for r in roles)
  }
  if len(known_) < len(plan.static):
    if batches is None:
      raise ValueError(
        f'static ranges of {list(plan.static)[:5]} need calibration: '
        'init(params, batches)'
      )
    known_ = ranges.calibrate(tracer.apply, params, plan, batches, sites)
  return {
    name: {r: QParams(**v) for r, v in roles.items()}
    for name, roles in known_.items()
  }


def _weights(tracer, params, args, given):
  """(storage, parameters) of every weight, by (site, role)."""
  plan = tracer.plan
  found = {}
  values = dict(named_leaves(params))
  coded = {} if given is None else dict(named_leaves(given['weights']))
  for path, storage in plan.leaves.items():
    q = coded.get(path)
    if isinstance(q, QTensor):
      found[plan.weight_roles[path]] = storage, q.qparams
    else:
      x = storage.layout.to_canonical(values[path])
      found[plan.weight_roles[path]] = storage, core.fit(x, storage.quantizer)
  effective = {} if given is None else given.get('effective', {})
  missing = set(plan.effective) - set(effective)
  computed = tracer.effective(params, args, {}) if missing else {}
  for name, storage in plan.effective.items():
    if name in effective:
      found[name, 'weight'] = storage, effective[name].qparams
    else:
      x = storage.layout.to_canonical(computed[name]['weight'])
      found[name, 'weight'] = storage, core.fit(x, storage.quantizer)
  return found
