"""Function transforms: run, simulate or observe a quantized program.

Each takes the user's `apply` and returns a function of the same arguments with
the variables tree in the place of `params`:
`{'weights': the user's structure with QTensor leaves, 'sites': {site: state},
'effective': {site: QTensor}}`. A plain parameter tree is accepted where no
state is needed. All of them are one rewrite with different handlers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import handlers
from quantlab.core import QTensor
from quantlab.graph import _jaxpr, known, rewrite, tracing
from quantlab.graph.segments import is_segments
from quantlab.graph.sites import NOTHING
from quantlab.graph.values import Dropped
from quantlab.plan import Plan
from quantlab.plan import is_variables as is_variables


def _split(tree: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
  """(weights, state by site with the effective weight under 'effective')."""
  if not is_variables(tree):
    return tree, {}
  state = {k: dict(v) for k, v in tree['sites'].items()}
  for site, q in tree.get('effective', {}).items():
    state.setdefault(site, {})['effective'] = q
  return tree['weights'], state


class _Rewrite:
  """A rewritten function: traced once and compiled once for each signature.

  Args:
    apply: the user's function.
    plan: whose sites the trace must not exceed, if there is one.
    evaluate: `(traced, leaves, inputs, state) -> result`.
  """

  def __init__(self, apply: Callable, plan: Plan | None, evaluate: Callable):
    if plan is not None and not isinstance(plan, Plan):
      raise TypeError(
        'the plan is what ql.plan(...) returns, or the plan of a model, got '
        f'{type(plan).__name__}'
      )
    self.given = plan
    inner, plan = (apply, None) if plan is None else plan.inside(apply)
    self.tracer = tracing.Tracer(inner, plan.captured if plan else None)
    self.plan = plan
    self.evaluate = evaluate
    self.name = getattr(apply, '__name__', 'apply')

  def __call__(self, variables, args, kwargs):
    # A replayed operation is as it was traced: it does not say, inside
    # shard_map, that an operand is shared where another one is not.
    variables, args, kwargs = _jaxpr.all_varying((variables, args, kwargs))
    weights, state = _split(variables)
    if self.given is not None:
      weights = self.given.split(weights)
    elif any(map(is_segments, jax.tree.leaves(weights, is_leaf=is_segments))):
      raise TypeError(
        'these parameters hold layers of several formats: pass the plan of '
        'their model too'
      )
    traced, leaves, inputs = self.tracer(weights, args, kwargs)
    if self.plan is not None:
      self.plan.check_state(state)
    # Compiled also where it is called eagerly: loops are not rebuilt each time.
    run = traced.compiled.get('run')
    if run is None:
      if self.plan is not None:
        self.plan.check_known(traced.analysis)
      run = traced.compiled['run'] = self._compile(traced)
    return run(leaves, inputs, state)

  def _compile(self, traced):
    def run(leaves, inputs, state):
      return self.evaluate(traced, leaves, inputs, state)

    run.__name__ = run.__qualname__ = self.name
    return jax.jit(run)


def _check_effective(plan, traced, state):
  """Weights that the plan computes beforehand must be there."""
  missing = [
    s.id
    for s in traced.analysis.sites
    if s.id in plan.effective and 'effective' not in state.get(s.id, {})
  ]
  if missing:
    raise ValueError(
      f'the variables lack the effective weights of {missing}; pass the whole '
      "tree that ql.ptq(...) returned as params, not its 'weights' alone"
    )


def quantized(
  apply: Callable,
  plan: Plan | None = None,
  *,
  strict: bool | None = None,
  integer: bool = True,
) -> Callable:
  """`apply` on quantized variables.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    plan: how to compute; without one every product with a QTensor runs on
      dequantized weights.
    strict: a QTensor that reaches an operation without a rule is an error;
      False dequantizes it there, with a warning. By default as the plan says,
      and strict without one.
    integer: False computes what low-bit products compute on floats. The
      derivatives of both are those of the floats, straight through what is
      rounded.

  Returns:
    A function of `(variables, *args, **kwargs)`, where variables may be a
    plain parameter tree with QTensor leaves. Wrap it in `jax.jit`.
  """
  handler = handlers.deploying(plan, integer=integer)

  def evaluate(traced, leaves, inputs, state):
    if plan is not None:
      plan.check_weights(dict(zip(traced.paths, leaves, strict=True)))
      _check_effective(plan, traced, state)
    evaluator = evaluator_of(
      traced,
      leaves,
      _chosen(plan, state),
      handler,
      strict=strict if strict is not None else plan is None or plan.strict,
      folded=plan.folded if plan else frozenset(),
    )
    outs, _ = evaluator.run(inputs, state)
    if plan is None:  # a plan has its notes already
      for note in dict.fromkeys(evaluator.report):
        warnings.warn(note, stacklevel=2)
    return jax.tree.unflatten(traced.program.out_tree, outs)

  rewritten = _Rewrite(apply, plan, evaluate)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    return rewritten(variables, args, kwargs)

  return run


def fake_quantized(
  apply: Callable,
  plan: Plan,
  simulate: handlers.Simulate = handlers.straight_through,
  product: handlers.Product = handlers.plainly,
) -> Callable:
  """`apply` with simulated quantization, on float variables; differentiable.

  What is simulated is what `ql.quantized` deploys: a parameter that is stored
  as codes is quantized once, as it is stored; BatchNorms that the plan folds
  are folded here too, and the effective weight is quantized. Bit-widths may be
  traced: `variables['sites'][site]['weight']['bits']` (and 'input', 'lhs',
  'rhs', 'output') is an array, with the loop axes of a scanned site, so one
  compiled function serves every assignment. The width of a parameter with
  several uses belongs to the first.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    plan: what is quantized.
    simulate: how; `ql.qat` gives gradient estimators here.
    product: how the product of simulated operands is computed.

  Returns:
    A function of `(params or variables, *args, **kwargs)`.
  """
  handler = handlers.simulating(plan, simulate, product)

  def evaluate(traced, leaves, inputs, state):
    _refuse_codes(leaves, traced.paths)
    state = fold(traced, leaves, plan.folded, state)
    leaves, state = _simulated(traced, leaves, plan, state, simulate)
    evaluator = evaluator_of(
      traced, leaves, _chosen(plan, state), handler, folded=plan.folded
    )
    outs, _ = evaluator.run(inputs, state)
    return jax.tree.unflatten(traced.program.out_tree, outs)

  rewritten = _Rewrite(apply, plan, evaluate)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    return rewritten(variables, args, kwargs)

  return run


def observe(
  apply: Callable,
  observer: handlers.Observer,
  plan: Plan | None = None,
  *,
  quantize: bool = True,
) -> Callable:
  """`apply` that also returns statistics keyed by site.

  A scan over stacked layers stacks them; any other loop and a branch merge
  them.

  Args:
    apply: the user's function.
    observer: what to measure; see `Observer`.
    plan: observe the quantized program instead of the float one.
    quantize: False observes the float program, with the BatchNorms folded
      that the plan folds.

  Returns:
    A function of `(variables, *args, **kwargs)` that returns
    `(output, {site id: statistics})`.
  """
  inner = (
    handlers.deploying(plan)
    if plan is not None and quantize
    else handlers.computing
  )

  def evaluate(traced, leaves, inputs, state):
    wanted = frozenset(
      s.id for s in traced.analysis.sites if observer.init(s) is not None
    )
    if plan is not None and not quantize:
      state = fold(traced, leaves, plan.folded, state)
      chosen = wanted | plan.folded | adjusted(state)
    else:
      chosen = wanted | _chosen(plan, state)
    evaluator = evaluator_of(
      traced,
      leaves,
      chosen,
      handlers.observing(observer, inner),
      monoid=observer,
      folded=plan.folded if plan else frozenset(),
    )
    outs, stats = evaluator.run(inputs, state)
    return jax.tree.unflatten(traced.program.out_tree, outs), stats

  rewritten = _Rewrite(apply, plan, evaluate)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    return rewritten(variables, args, kwargs)

  return run


class _Nothing:
  """An observer that leaves out every site."""

  def init(self, site):
    return None

  def update(self, *args):
    raise NotImplementedError

  def merge(self, *args):
    raise NotImplementedError


def transformed(apply: Callable, plan: Plan) -> Callable:
  """`apply` in float, with what transforms leave to be done at run time.

  Returns:
    A function of `(variables, *args, **kwargs)`, of float weights.
  """
  observed = observe(apply, _Nothing(), plan, quantize=False)

  @functools.wraps(apply)
  def run(variables, *args, **kwargs):
    return observed(variables, *args, **kwargs)[0]

  return run


def _chosen(plan: Plan | None, state: Mapping[str, Any]) -> frozenset[str]:
  quantized = frozenset(plan.quantized) if plan is not None else frozenset()
  return quantized | adjusted(state)


def adjusted(state: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
  """Sites whose state changes what they compute, quantized or not."""
  return frozenset(
    k
    for k, roles in state.items()
    if {'transform', 'bias', 'adapter'} & set(roles)
  )


def evaluator_of(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  chosen: frozenset[str],
  handler: rewrite.Handler,
  **options: Any,
) -> rewrite.Evaluator:
  """The evaluator of a traced call."""
  plain = not chosen and not any(map(tracing.is_stored, leaves))
  return rewrite.Evaluator(
    traced.program,
    NOTHING if plain else traced.analysis,
    leaves,
    traced.paths,
    traced.constant_leaf,
    chosen,
    handler,
    **options,
  )


def fold(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  folded: frozenset[str],
  state: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """`state` with the dense effective weights and shifts of folded sites."""
  found = known.weights(traced, leaves, folded, folded)
  new = {k: dict(v) for k, v in state.items()}
  for name, stat in found.items():
    mine = new.setdefault(name, {})
    mine['effective'] = stat['weight']
    mine['fold'] = {'shift': stat['shift']}
  return new


def _simulated(traced, leaves, plan, state, simulate):
  """Leaves as their codes stand for them; `state` without what they used."""
  homes = plan.weight_roles
  values = dict(zip(traced.paths, leaves, strict=True))
  for path, storage in plan.leaves.items():
    values[path] = _as_stored(
      values[path], homes[path], storage, state, simulate
    )
  known_roles = {*homes.values(), *((k, 'weight') for k in plan.effective)}
  wrong = [
    k if r == 'weight' else f'{k} ({r})'
    for k, s in state.items()
    for r in s
    if r.startswith('weight') and (k, r) not in known_roles
  ]
  if wrong:
    raise ValueError(
      f'the variables give state to the weights of {wrong}, which have none of '
      f'their own; it belongs to {sorted({k for k, _ in known_roles})}'
    )
  rest = {
    k: {
      r: v
      for r, v in s.items()
      if not r.startswith('weight') or k in plan.effective
    }
    for k, s in state.items()
  }
  return [values[p] for p in traced.paths], rest


def _as_stored(w, home, storage, state, simulate):
  """One parameter quantized and dequantized as it is stored."""
  site, role = home
  leaves = dict(state.get(site, {}).get(role, {}))
  bits = state.get(site, {}).get('weight', {}).get('bits')

  def f(x):
    if bits is not None:  # a scalar, or with the axes of loops in front
      loops, b = x.shape[:-2], jnp.asarray(bits)
      b = b.reshape(*b.shape, *[1] * (len(loops) - b.ndim))
      leaves['bits'] = jnp.broadcast_to(b, loops)
    return simulate(
      site, role, x, storage.quantizer, leaves, axis=-2, shape=w.shape
    )

  return storage.on_matrix(w, f)


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
