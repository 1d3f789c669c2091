"""`qat`: quantization-aware training of any JAX function."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantlab import rewrites
from quantlab.core.units import Units
from quantlab.plan import LEARNED, Plan
from quantlab.ptq.model import Quantized
from quantlab.qat import freeze as freeze_lib
from quantlab.qat import start as start_lib
from quantlab.qat.estimators import Estimator, clipped_ste, lsq, need_leaves

ROLES = ('weight', 'input', 'output', 'lhs', 'rhs')


class QAT(NamedTuple):
  """Quantization-aware training of one function by one plan.

  The variables are `{'weights': float parameters in the user's structure,
  'sites': {site id: {role: leaves}}}`; `plan.labels(variables)` says which
  leaves are weights, learned steps or state. Stacks whose layers have rules of
  their own are in parts. All functions are pure.

  Attributes:
    init: `(params, batches=None, *, start=None) -> variables`.
    apply: `(variables, *args, **kwargs) -> outputs`, simulated and
      differentiable; jit it.
    freeze: `(variables, *args, **kwargs) -> Quantized`.
  """

  init: Callable[..., dict[str, Any]]
  apply: Callable[..., Any]
  freeze: Callable[..., Quantized]


def qat(
  apply: Callable,
  plan: Plan,
  estimator: Estimator | Mapping[str, Estimator] | None = None,
) -> QAT:
  """Quantization-aware training.

  `init(params, batches, start=)` gives the variables to begin with: ranges
  calibrated on `batches` of inputs, each a tuple of arguments or one array
  (needed where activations have static quantizers),
  learned leaves from them. `params` are float, or the variables of a model
  that `ql.ptq` made: then codes, scales and ranges are where training begins.
  `start=` takes such variables beside float parameters of one's own.

  `apply(variables, *args)` computes what the frozen model will, on floats.
  Gradients reach the weights and the learned leaves, nothing else; an
  optimizer should leave the rest alone too:

    optax.multi_transform(
      {'weight': optax.adamw(1e-3), 'step': optax.adam(1e-4),
       'state': optax.set_to_zero()}, plan.labels(variables))

  `freeze(variables, *args)` returns the model with the codes and scales that
  `apply` simulates. An example of the arguments, or their shapes, is needed
  where the plan computes effective weights (folded BatchNorms, weight norm).

  A function in training mode (live BatchNorms, dropout) of the same parameters
  is `ql.qat(train_apply, plan, estimator).apply`, on the same variables, where
  the plan folds no BatchNorm: `ql.rule(..., fold=False)`.

  Args:
    apply: pure function `apply(params, *args, **kwargs)`.
    plan: what is quantized: `ql.plan(apply, params, recipe, *args)`.
    estimator: of all roles, or by role ('weight', 'input', 'output', 'lhs',
      'rhs'; `clipped_ste()` where one is not named); `ql.estimators.lsq()`
      by default.

  Raises:
    TypeError: the plan or an estimator is none.
    ValueError: an unknown role, or an estimator that cannot train a
      quantizer of the plan; the site is named.
  """
  if not isinstance(plan, Plan):
    raise TypeError(
      f'the plan is what ql.plan(...) returns, got {type(plan).__name__}; a '
      'recipe, or an allocation, becomes one: ql.plan(apply, params, recipe, '
      '*inputs)'
    )
  by_role = _by_role(lsq() if estimator is None else estimator)
  for name, site in plan.quantized.items():
    assert site.rule is not None
    for role, quantizer in site.rule.quantizers.items():
      by_role[role].check(role, quantizer, f'site {name!r}')

  def simulate(site, role, x, quantizer, leaves, *, axis, shape):
    found = by_role[role.partition(':')[0]]
    need_leaves(found, site, role, leaves)
    fixed = {
      k: v if k in LEARNED or k == 'bits' else lax.stop_gradient(v)
      for k, v in leaves.items()
    }
    if axis == -2:
      count = math.prod(Units.of(x.shape, quantizer, axis).size)
    else:  # of one example: gradients are sums over a batch, losses means
      count = math.prod(shape[1:])
    return found.simulate(x, quantizer, fixed, axis, count)

  tracer = start_lib.Tracing(*plan.inside(apply))

  def init(params, batches: Iterable[Any] | None = None, *, start=None):
    params = plan.split(params)
    return start_lib.start(tracer, by_role, params, batches, start)

  def freeze(variables, *args, **kwargs):
    found = freeze_lib.freeze(tracer, by_role, variables, args, kwargs)
    run = rewrites.quantized(apply, plan)
    return dataclasses.replace(found, apply=run, plan=plan)

  run = rewrites.fake_quantized(apply, plan, simulate)
  return QAT(init, run, freeze)


def _by_role(given: Any) -> dict[str, Estimator]:
  """The estimator of every role."""
  if isinstance(given, Estimator):
    return dict.fromkeys(ROLES, given)
  if not isinstance(given, Mapping):
    raise TypeError(
      'the estimator is one such as ql.estimators.lsq(), or a dict from roles '
      f'to estimators, got {given!r}'
    )
  unknown = sorted(set(given) - set(ROLES))
  if unknown:
    raise ValueError(
      f'estimators for unknown roles {unknown}; known: {list(ROLES)}'
    )
  wrong = {r: e for r, e in given.items() if not isinstance(e, Estimator)}
  if wrong:
    raise TypeError(f'no estimators: {wrong}; use ql.estimators')
  return {r: given.get(r, clipped_ste()) for r in ROLES}


def set_leaves(
  variables: Mapping[str, Any], name: str, value: Any
) -> dict[str, Any]:
  """The variables with every leaf of this name in the sites set to a value.

  Such as `set_leaves(variables, 'strength', schedule(step))`; pure, and the
  value may be traced.

  Raises:
    ValueError: no site has such a leaf.
  """
  found = 0

  def one(path, leaf):
    nonlocal found
    if getattr(path[-1], 'key', None) != name:
      return leaf
    found += 1
    return jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape)

  sites = jax.tree_util.tree_map_with_path(one, variables['sites'])
  if not found:
    raise ValueError(
      f'no site has a leaf {name!r}; is the estimator the one that makes it '
      '(warm_up for strength)?'
    )
  return {**variables, 'sites': sites}
