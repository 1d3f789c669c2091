"""`Quantized`: what quantization returns and what is saved and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import rewrites
from quantlab.core import tree as tree_lib
from quantlab.graph.values import Dropped
from quantlab.plan import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
  """A quantized model.

  Attributes:
    apply: pure function of `(params, *args, **kwargs)`; jit it.
    params: variables tree `{'weights', 'sites', 'effective'}`.
    plan: what is quantized and how (static).
    report: facts found on the way, JSON-able.
  """

  apply: Callable
  params: Any
  plan: Plan
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def summary(self) -> str:
    """A table of the sites with formats, bytes and ways of computing."""
    return self.plan.summary(self.params)

  @property
  def nbytes(self) -> int:
    """Bytes of everything that is stored."""
    return tree_lib.nbytes(self.params)


def stored(params: Any, plan: Plan, values: Mapping[str, Any]) -> Any:
  """The user's tree with codes, by path, and without dropped parameters."""

  def one(path, leaf):
    name = tree_lib.path_str(path)
    if name in plan.dropped:
      return Dropped(tuple(jnp.shape(leaf)), str(jnp.result_type(leaf)))
    return values.get(name, leaf)

  return jax.tree_util.tree_map_with_path(one, params)


def restore(apply: Callable, params: Any, plan: Plan | Mapping) -> Quantized:
  """A quantized model from its stored parts; `apply` is the float function."""
  if not isinstance(plan, Plan):
    plan = Plan.from_json(plan)
  return Quantized(rewrites.quantized(apply, plan), params, plan)
