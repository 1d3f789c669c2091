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
from typing import Any, Protocol

import jax

from quantlab import ops
from quantlab.core import QParams, QTensor
from quantlab.graph import known, rewrite, tracing
from quantlab.graph.sites import NOTHING, Site
from quantlab.graph.values import Dropped
from quantlab.plan import Plan
from quantlab.recipe import Rule

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


def _shifted(site, out, state):
  """The product with the shift of a folded map, and its own bias, added."""
  shift = state.get('fold', {}).get('shift')
  if shift is not None:
    shape = [1] * out.ndim
    shape[site.fold.axis] = -1
    out = out + shift.reshape(shape).astype(out.dtype)
  if 'bias' in state:
    out = ops.add_bias(out, site.dims, state['bias'])
  return out


def _output(site, rule, out, state):
  """The product with its shift added, quantized if the rule says so."""
  out = _shifted(site, out, state)
  if rule is None or rule.output is None:
    return out
  given = _need(site, 'output', rule.output, state)
  bits = state.get('output', {}).get('bits')
  return ops.fake_quantize_activation(
    out, rule.output, site.dims, 'output', given, bits
  )


def computing(site, lhs, rhs, default, state):
  """The float product, with what is folded into it."""
  return _shifted(site, default(lhs, rhs), state), None


def simulating(plan: Plan) -> rewrite.Handler:
  """Fake quantization of every operand; differentiable (straight-through).

  Parameters that are stored as codes are simulated where they are stored, see
  `fake_quantized`; here come activations and effective weights.
  """

  def handler(site, lhs, rhs, default, state):
    rule = plan.sites[site.id].rule or Rule()
    operands = {'lhs': lhs, 'rhs': rhs}
    roles = {'lhs': 'lhs', 'rhs': 'rhs'}
    if site.side is not None:
      del roles[site.side]
      roles = dict.fromkeys(roles, 'input')
      if site.id in plan.effective and rule.weight is not None:
        bits = state.get('weight', {}).get('bits')
        operands[site.side] = ops.fake_quantize_weight(
          operands[site.side], rule.weight, site.dims, bits
        )
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
    known_site = plan.sites.get(site.id) if plan is not None else None
    rule = known_site.rule if known_site is not None else None
    return _output(
      site, rule, _product(rule, site, lhs, rhs, default, state), state
    ), None

  return handler


def _product(rule, site, lhs, rhs, default, state):
  """A product on codes, as its rule says."""
  if site.kind == 'gather' and isinstance(lhs, QTensor):
    return ops.embed(lhs, rhs, site.dims)
  if rule is None:
    lhs, rhs = (
      v.dequantize() if isinstance(v, QTensor) else v for v in (lhs, rhs)
    )
    return default(lhs, rhs)
  if site.side is None:
    given = {
      r: _need(site, r, q, state)
      for r, q in rule.quantizers.items()
      if r in ('lhs', 'rhs')
    }
    return ops.activation_product(site, lhs, rhs, rule, given, default)
  qparams = None
  if rule.input is not None:
    qparams = _need(site, 'input', rule.input, state)
  return ops.product(site, lhs, rhs, rule.input, qparams, default)


def observing(observer: Observer, inner: rewrite.Handler) -> rewrite.Handler:
  """Statistics of every product, computed as `inner` computes it."""

  def handler(site, lhs, rhs, default, state):
    out, _ = inner(site, lhs, rhs, default, state)
    stat = observer.init(site)
    if stat is not None:
      stat = observer.update(site, stat, lhs, rhs, out, state)
    return out, stat

  return handler


# The transforms ---------------------------------------------------------------


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
    self.tracer = tracing.Tracer(apply, plan.captured if plan else None)
    self.plan = plan
    self.evaluate = evaluate
    self.name = getattr(apply, '__name__', 'apply')

  def __call__(self, variables, args, kwargs):
    weights, state = _split(variables)
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
  apply: Callable, plan: Plan | None = None, *, strict: bool | None = None
) -> Callable:
  """`apply` on quantized variables.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    plan: how to compute; without one every product with a QTensor runs on
      dequantized weights.
    strict: a QTensor that reaches an operation without a rule is an error;
      False dequantizes it there, with a warning. By default as the plan says,
      and strict without one.

  Returns:
    A function of `(variables, *args, **kwargs)`, where variables may be a
    plain parameter tree with QTensor leaves. Wrap it in `jax.jit`.
  """
  handler = deploying(plan)

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


def fake_quantized(apply: Callable, plan: Plan) -> Callable:
  """`apply` with simulated quantization, on float variables; differentiable.

  What is simulated is what `ql.quantized` deploys: a parameter that is stored
  as codes is quantized once, as it is stored; BatchNorms that the plan folds
  are folded here too, and the effective weight is quantized. Bit-widths may be
  traced: `variables['sites'][site]['weight']['bits']` (and 'input', 'lhs',
  'rhs', 'output') is an array, with the loop axes of a scanned site, so one
  compiled function serves every assignment. The width of a parameter with
  several uses belongs to the first.

  Returns:
    A function of `(params or variables, *args, **kwargs)`.
  """
  handler = simulating(plan)

  def evaluate(traced, leaves, inputs, state):
    _refuse_codes(leaves, traced.paths)
    state = fold(traced, leaves, plan, state)
    leaves, state = _simulated(traced, leaves, plan, state)
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
  observer: Observer,
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
  inner = deploying(plan) if plan is not None and quantize else computing

  def evaluate(traced, leaves, inputs, state):
    wanted = frozenset(
      s.id for s in traced.analysis.sites if observer.init(s) is not None
    )
    if plan is not None and not quantize:
      state = fold(traced, leaves, plan, state)
      chosen = wanted | plan.folded | adjusted(state)
    else:
      chosen = wanted | _chosen(plan, state)
    evaluator = evaluator_of(
      traced,
      leaves,
      chosen,
      observing(observer, inner),
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
    k for k, roles in state.items() if {'transform', 'bias'} & set(roles)
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
  traced: tracing.Traced, leaves: Sequence[Any], plan: Plan, state: Mapping
) -> dict[str, dict[str, Any]]:
  """`state` with the dense effective weights and shifts of folded sites."""
  found = known.weights(traced, leaves, plan.folded, plan.folded)
  new = {k: dict(v) for k, v in state.items()}
  for name, stat in found.items():
    mine = new.setdefault(name, {})
    mine['effective'] = stat['weight']
    mine['fold'] = {'shift': stat['shift']}
  return new


def _simulated(traced, leaves, plan, state):
  """Leaves as their codes stand for them; `state` without their widths."""
  owners = plan.owners
  values = dict(zip(traced.paths, leaves, strict=True))
  for path, storage in plan.leaves.items():
    bits = state.get(owners[path], {}).get('weight', {}).get('bits')
    values[path] = storage.simulate(values[path], bits)
  wrong = [
    k
    for k, s in state.items()
    if 'weight' in s and k not in {*owners.values(), *plan.effective}
  ]
  if wrong:
    raise ValueError(
      f'the variables give a width to the weights of {wrong}, which have none '
      f'of their own; widths belong to {sorted({*owners.values()})}'
    )
  rest = {
    k: {r: v for r, v in s.items() if r != 'weight' or k in plan.effective}
    for k, s in state.items()
  }
  return [values[p] for p in traced.paths], rest


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
