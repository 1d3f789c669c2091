"""Function transforms: run, simulate or observe a quantized program.

Each takes the user's `apply` and returns a function of the same arguments with
the variables tree in the place of `params`:
`{'weights': the user's structure with QTensor leaves, 'sites': {site: state},
'effective': {site: QTensor}}`. A plain parameter tree is accepted where no
state is needed. All of them are one rewrite with different handlers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from quantlab import ops
from quantlab.core import QParams, QTensor
from quantlab.graph import folds, rewrite, tracing
from quantlab.graph.sites import Site
from quantlab.graph.values import Dropped
from quantlab.plan import Plan

VARIABLES = frozenset({'weights', 'sites', 'effective'})


class Observer(Protocol):
  """Statistics of a site as a streamed monoid."""

  def init(self, site: Site) -> Any:
    """The identity (arrays), or None to leave the site out."""

  def update(
    self, site: Site, stat: Any, lhs: Any, rhs: Any, out: Any, state: Any
  ) -> Any:
    """Adds one evaluation of the product; `state` is the site's own."""

  def merge(self, site: Site, a: Any, b: Any) -> Any:
    """Combines two statistics; associative, `init` is its identity."""


def is_variables(tree: Any) -> bool:
  """Whether a tree is a variables tree rather than plain parameters."""
  keys = set(tree) if isinstance(tree, Mapping) else set()
  return {'weights', 'sites'} <= keys <= VARIABLES


def _split(tree: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
  """(weights, state by site with the effective weight under 'effective')."""
  if not is_variables(tree):
    return tree, {}
  state = {k: dict(v) for k, v in tree['sites'].items()}
  for site, q in tree.get('effective', {}).items():
    state.setdefault(site, {})['effective'] = q
  return tree['weights'], state


# Handlers ---------------------------------------------------------------------


def _qparams(state: Mapping[str, Any], role: str) -> QParams | None:
  found = state.get(role)
  return None if not found or 'scale' not in found else QParams(**found)


def _need(site, role, quantizer, state) -> QParams | None:
  """Calibrated parameters of a static quantizer."""
  found = _qparams(state, role)
  if quantizer.static and found is None:
    raise ValueError(
      f'the {role} of site {site.id!r} has a static quantizer {quantizer!r}, '
      'but the variables hold no calibrated range for it; calibrate with '
      'ql.ptq(...) and pass its params'
    )
  return found if quantizer.static else None


def simulating(plan: Plan) -> rewrite.Handler:
  """Fake quantization of every operand; differentiable (straight-through)."""

  def handler(site, lhs, rhs, default, state):
    rule = plan.sites[site.id].rule
    operands = {'lhs': lhs, 'rhs': rhs}
    if site.side is not None:
      other = 'lhs' if site.side == 'rhs' else 'rhs'
      if rule.weight is not None:
        bits = state.get('weight', {}).get('bits')
        operands[site.side] = ops.fake_quantize_weight(
          operands[site.side], rule.weight, site.dims, bits
        )
      roles = {other: 'input'} if site.kind != 'gather' else {}
    else:
      roles = {'lhs': 'lhs', 'rhs': 'rhs'}
    for operand, role in roles.items():
      quantizer = getattr(rule, role)
      if quantizer is not None:
        operands[operand] = ops.fake_quantize_activation(
          operands[operand],
          quantizer,
          site.dims,
          role,
          _need(site, role, quantizer, state),
          state.get(role, {}).get('bits'),
        )
    out = default(operands['lhs'], operands['rhs'])
    return _output(site, rule, out, state), None

  return handler


def deploying(plan: Plan | None) -> rewrite.Handler:
  """Products on codes, with low-bit kernels where the plan says so."""

  def handler(site, lhs, rhs, default, state):
    known = plan.sites.get(site.id) if plan is not None else None
    rule = known.rule if known is not None else None
    if site.kind == 'gather' and isinstance(lhs, QTensor):
      out = ops.embed(lhs, rhs, site.dims)
    elif site.side is None and rule is not None:
      given = {
        r: _need(site, r, q, state)
        for r, q in rule.quantizers.items()
        if r in ('lhs', 'rhs')
      }
      out = ops.activation_product(site, lhs, rhs, rule, given, default)
    else:
      quantizer = rule.input if rule is not None else None
      given = quantizer and _need(site, 'input', quantizer, state)
      out = ops.product(site, lhs, rhs, quantizer, given, default)
    shift = state.get('fold', {}).get('shift')
    if shift is not None:
      shape = [1] * out.ndim
      shape[site.fold.axis] = -1
      out = out + shift.reshape(shape).astype(out.dtype)
    return (out if rule is None else _output(site, rule, out, state)), None

  return handler


def _output(site, rule, out, state):
  if rule.output is None:
    return out
  given = _need(site, 'output', rule.output, state)
  return ops.fake_quantize_activation(
    out, rule.output, site.dims, 'output', given
  )


def observing(
  observer: Observer, inner: rewrite.Handler | None = None
) -> rewrite.Handler:
  """Statistics of every product, computed as `inner` computes it."""

  def handler(site, lhs, rhs, default, state):
    out, _ = (
      (default(lhs, rhs), None)
      if inner is None
      else inner(site, lhs, rhs, default, state)
    )
    stat = observer.init(site)
    if stat is not None:
      stat = observer.update(site, stat, lhs, rhs, out, state)
    return out, stat

  return handler


# The transforms ---------------------------------------------------------------


def quantized(
  apply: Callable, plan: Plan | None = None, *, strict: bool = True
) -> Callable:
  """`apply` on quantized variables.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    plan: how to compute; without one every product with a QTensor runs on
      dequantized weights.
    strict: a QTensor that reaches an operation without a rule is an error;
      False dequantizes it there.

  Returns:
    A function of `(variables, *args, **kwargs)`, where variables may be a
    plain parameter tree with QTensor leaves. Wrap it in `jax.jit`.
  """
  tracer = tracing.Tracer(apply, plan.captured if plan else None)
  handler = deploying(plan)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    traced, leaves, inputs, state = _trace(
      tracer, variables, args, kwargs, plan
    )
    rewriter = evaluator(
      traced,
      leaves,
      plan,
      handler,
      strict=strict,
      folded=plan.folded if plan else frozenset(),
    )
    outs, _ = rewriter.run(inputs, state)
    return jax.tree.unflatten(traced.program.out_tree, outs)

  return run


def fake_quantized(apply: Callable, plan: Plan) -> Callable:
  """`apply` with simulated quantization, on float variables; differentiable.

  Bit-widths may be traced: `variables['sites'][site]['weight']['bits']` (and
  'input', 'lhs', 'rhs') is an array, with the loop axes of a scanned site, so
  one compiled function serves every assignment. BatchNorms that the plan folds
  stay in the program; the unfolded kernel is quantized (per channel the two
  are the same up to rounding).

  Returns:
    A function of `(params or variables, *args, **kwargs)`.
  """
  tracer = tracing.Tracer(apply, plan.captured)
  handler = simulating(plan)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    traced, leaves, inputs, state = _trace(
      tracer, variables, args, kwargs, plan
    )
    _refuse_codes(leaves, traced.paths)
    rewriter = evaluator(traced, leaves, plan, handler)
    outs, _ = rewriter.run(inputs, state)
    return jax.tree.unflatten(traced.program.out_tree, outs)

  return run


def observe(
  apply: Callable,
  observer: Observer,
  plan: Plan | None = None,
  mapped: frozenset[str] = frozenset(),
) -> Callable:
  """`apply` that also returns statistics keyed by site.

  A scan over stacked layers stacks them; any other loop and a branch merge
  them.

  Args:
    apply: the user's function.
    observer: what to measure; see `Observer`.
    plan: observe the quantized program instead of the float one.
    mapped: sites whose following affine map (BatchNorm) is to be measured:
      their statistics hold it under 'scale' and 'shift'.

  Returns:
    A function of `(variables, *args, **kwargs)` that returns
    `(output, {site id: statistics})`.
  """
  tracer = tracing.Tracer(apply, plan.captured if plan else None)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    traced, leaves, inputs, state = _trace(
      tracer, variables, args, kwargs, plan
    )
    wanted = frozenset(
      s.id for s in traced.analysis.sites if observer.init(s) is not None
    )
    chosen = wanted | frozenset(plan.quantized if plan else ())
    inner = deploying(plan) if plan else None
    rewriter = rewrite.Evaluator(
      traced.program,
      traced.analysis,
      leaves,
      traced.paths,
      traced.constant_leaf,
      chosen,
      observing(observer, inner),
      observer,
      folded=plan.folded if plan else frozenset(),
      mapped=mapped,
    )
    outs, stats = rewriter.run(inputs, state)
    return jax.tree.unflatten(traced.program.out_tree, outs), stats

  return run


def _trace(tracer, variables, args, kwargs, plan):
  weights, state = _split(variables)
  traced, leaves, inputs = tracer(weights, args, kwargs)
  if plan is not None:
    plan.check_known(traced.analysis)
    unknown = [k for k in state if k not in plan.sites]
    if unknown:
      raise ValueError(
        f'state for unknown sites {unknown}; known: {list(plan.sites)}'
      )
  return traced, leaves, inputs, state


def evaluator(traced, leaves, plan, handler, **options):
  """An evaluator of the plan's quantized sites."""
  chosen = frozenset(plan.quantized) if plan is not None else frozenset()
  return rewrite.Evaluator(
    traced.program,
    traced.analysis,
    leaves,
    traced.paths,
    traced.constant_leaf,
    chosen,
    handler,
    **options,
  )


def _refuse_codes(leaves, paths):
  coded = [
    p
    for leaf, p in zip(leaves, paths, strict=True)
    if isinstance(leaf, QTensor | Dropped)
  ]
  if coded:
    raise TypeError(
      f'fake_quantized takes float parameters; these are stored as codes: '
      f'{coded[:5]}. Use ql.quantized for them.'
    )


# Effective weights ------------------------------------------------------------


class _Weights:
  """Observer of weight operands (and of the affine maps to be folded)."""

  def __init__(self, plan: Plan):
    self.plan = plan

  def init(self, site):
    if site.id not in self.plan.effective:
      return None
    shape = site.weight_shape
    stat = {'weight': jnp.zeros(shape, site.dtype)}
    if site.id in self.plan.folded:
      return {**stat, **self._map(site)}
    return stat

  def _map(self, site):
    scale, shift = folds.identity(site.out, site.fold.axis, site.dtype)
    return {'scale': scale, 'shift': shift}

  def update(self, site, stat, lhs, rhs, out, state):
    return {**stat, 'weight': rhs if site.side == 'rhs' else lhs}

  def merge(self, site, a, b):
    return b  # the same weight at every step


def effective_weights(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  inputs: Sequence[Any],
  plan: Plan,
) -> dict[str, dict[str, jax.Array]]:
  """T(w) of every effective weight, loops in front, by site.

  A folded site has its map's 'scale' already in 'weight', and 'shift'.
  Inputs only give shapes: the weights do not depend on them.
  """
  if not plan.effective:
    return {}
  observer = _Weights(plan)
  evaluate = rewrite.Evaluator(
    traced.program,
    traced.analysis,
    leaves,
    traced.paths,
    traced.constant_leaf,
    frozenset(plan.effective),
    observing(observer),
    observer,
    mapped=plan.folded,
  )
  _, stats = evaluate.run(inputs, {})
  sites = {s.id: s for s in traced.analysis.sites}
  found = {}
  for name, stat in stats.items():
    weight = stat['weight']
    found[name] = {'weight': weight}
    if 'scale' in stat:
      site = sites[name]
      loops = weight.shape[: len(site.weight_loops)]
      [axis] = site.dims.w_free
      shape = [1] * len(site.weight_shape)
      shape[axis] = -1
      scale = stat['scale'].reshape(*loops, *shape).astype(weight.dtype)
      shift = stat['shift'].reshape(*loops, -1)
      found[name] = {'weight': weight * scale, 'shift': shift}
  return found
