"""Stretches of equations that a rewrite leaves as they were traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantlab.graph import _jaxpr

# Fewer equations than this are evaluated one by one.
_SHORTEST = 3


def uses(jaxpr: Any) -> dict[Any, list[int]]:
  """Indices of the equations that read each variable, the end among them."""
  found: dict[Any, list[int]] = {}
  literal = _jaxpr.Literal
  for i, eqn in enumerate(jaxpr.eqns):
    for var in eqn.invars:
      if not isinstance(var, literal):
        found.setdefault(var, []).append(i)
  for var in jaxpr.outvars:
    if not isinstance(var, literal):
      found.setdefault(var, []).append(len(jaxpr.eqns))
  return found


def evaluate(
  jaxpr: Any,
  indices: Sequence[int],
  env: dict[Any, Any],
  used: dict[Any, list[int]],
) -> None:
  """Evaluates neighbouring equations, in one call if they are many.

  Args:
    jaxpr: the equations' own.
    indices: which, in order; nothing between them is evaluated elsewhere.
    env: values by variable; gets those that later equations read.
    used: see `uses`.
  """
  eqns = [jaxpr.eqns[i] for i in indices]
  literal = _jaxpr.Literal
  if len(eqns) < _SHORTEST:
    for eqn in eqns:
      vals = [v.val if isinstance(v, literal) else env[v] for v in eqn.invars]
      env.update(zip(eqn.outvars, _jaxpr.bind(eqn, vals), strict=True))
    return
  inputs: dict[Any, None] = {}
  made: dict[Any, None] = {}
  for eqn in eqns:
    for var in eqn.invars:
      if not isinstance(var, literal) and var not in made:
        inputs[var] = None
    for var in eqn.outvars:
      made[var] = None
  end = indices[-1]
  outputs = [v for v in made if v in used and used[v][-1] > end]
  values = [env[v] for v in inputs]
  outs = _jaxpr.bind_together(jaxpr, eqns, list(inputs), outputs, values)
  env.update(zip(outputs, outs, strict=True))
