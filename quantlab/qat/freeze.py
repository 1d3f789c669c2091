"""From trained variables to the model that runs on codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from quantlab import core, rewrites
from quantlab.core.tree import named_leaves
from quantlab.plan import check_variables
from quantlab.ptq.model import Quantized, stored
from quantlab.qat.estimators import need_leaves
from quantlab.qat.start import KEPT, Tracing


def freeze(
  tracer: Tracing,
  by_role: Mapping[str, Any],
  variables: Mapping[str, Any],
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
) -> Quantized:
  """The model whose codes and scales the variables simulate; see `qat`.

  Raises:
    TypeError: no variables of `init`.
    ValueError: quantization has not fully set in, a variable is not finite, or
      the variables are of another model than the plan.
  """
  plan = tracer.plan
  check_variables(variables, 'freeze')
  params, state = variables['weights'], variables['sites']
  plan.check_state(state)
  _refuse_unfinished(state)
  estimator = by_role['weight']

  def quantize(w, storage, site, role='weight'):
    leaves = state.get(site, {}).get(role, {})
    need_leaves(estimator, site, role, leaves)
    q = storage.quantizer
    w = storage.on_matrix(w, lambda x: estimator.prepare(x, q, -2))
    x = storage.layout.to_canonical(w)
    return storage.quantize(w, qparams=estimator.qparams(x, q, leaves, -2))

  values = dict(named_leaves(params))
  if bad := core.nonfinite(dict(named_leaves(variables))):
    raise ValueError(
      f'the variables hold NaN or infinity: {", ".join(bad[:5])}; training '
      'diverged. Freeze an earlier save'
    )
  for path, storage in plan.leaves.items():
    _check_shape(path, values.get(path), storage)
  coded = {
    path: quantize(values[path], storage, *plan.weight_roles[path])
    for path, storage in plan.leaves.items()
  }
  found = tracer.effective(params, args, kwargs)
  computed = {k: v['weight'] for k, v in found.items()}
  if bad := core.nonfinite(computed):
    raise ValueError(
      f'effective weights hold NaN or infinity: {", ".join(bad[:5])}; a '
      'BatchNorm or norm that was folded gives them'
    )
  effective = {
    name: quantize(found[name]['weight'], storage, name)
    for name, storage in plan.effective.items()
  }

  variables = {
    'weights': stored(params, plan, coded),
    'sites': _ranges(plan, by_role, state, found),
    'effective': effective,
  }
  return Quantized(
    rewrites.quantized(tracer.apply, plan),
    variables,
    plan,
    {'transform': ['qat']},
  )


def _ranges(plan, by_role, state, found) -> dict[str, dict[str, Any]]:
  """Site state of the frozen model: static ranges, shifts, what was kept."""
  sites: dict[str, dict[str, Any]] = {}
  for name, roles in state.items():
    if kept := {r: v for r, v in roles.items() if r in KEPT}:
      sites[name] = kept
  for name, roles in plan.static.items():
    for role, quantizer in roles.items():
      leaves = state.get(name, {}).get(role, {})
      need_leaves(by_role[role], name, role, leaves)
      made = by_role[role].qparams(None, quantizer, leaves, -1)
      sites.setdefault(name, {})[role] = {
        k: v for k, v in made._asdict().items() if v is not None
      }
  for name, stat in found.items():
    if 'shift' in stat:
      sites.setdefault(name, {})['fold'] = {'shift': stat['shift']}
  return sites


def _refuse_unfinished(state: Mapping[str, Any]) -> None:
  for name, roles in state.items():
    for role, leaves in roles.items():
      if role in KEPT:
        continue
      if 'bits' in leaves:
        raise ValueError(
          f'the {role} of {name!r} has a width of its own (bits); freeze by a '
          'plan that has that format, without the leaf'
        )
      strength = float(np.min(leaves.get('strength', 1)))
      if strength != 1:
        raise ValueError(
          f'quantization has not fully set in: the strength of the {role} of '
          f'{name!r} is {strength:g}. Train on with it at 1, or set it: '
          "ql.set_leaves(variables, 'strength', 1.0)"
        )


def _check_shape(path: str, w: Any, storage: Any) -> None:
  """Refuses a weight that is absent, or that the plan cannot lay out."""
  why = 'absent'
  if w is not None:
    try:
      jax.eval_shape(storage.layout.to_canonical, w)
      return
    except ValueError as error:
      why = f'of shape {w.shape}: {error}'
  raise ValueError(
    f'the variables are of another model than the plan: the weight {path!r} '
    f'is {why}. Freeze what init of this plan made'
  )
