"""`ptq`: post-training quantization of any JAX function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.calibration import ranges
from quantlab.graph import known, tracing
from quantlab.graph.values import Dropped
from quantlab.plan import Plan
from quantlab.planner import make as make_plan
from quantlab.ptq.model import Quantized
from quantlab.ptq.rtn import Transform, rtn
from quantlab.recipe import Recipe
from quantlab.recipe import recipe as as_recipe


def ptq(
  apply: Callable,
  params: Any,
  recipe: Recipe | Mapping[str, Any],
  batches: Iterable[Any],
  transform: Transform | None = None,
  *,
  key: jax.Array | None = None,
) -> Quantized:
  """Quantizes a model after training.

  Args:
    apply: pure function; a batch that is a tuple is splatted into
      `apply(params, *batch)`, anything else is its one argument.
    params: float parameters.
    recipe: what is quantized and how; see `ql.recipe`.
    batches: re-iterable calibration batches. The first one gives the shapes;
      static activation ranges read all of them.
    transform: the algorithm; `ql.rtn()` by default.
    key: for stochastic rounding.

  Returns:
    The quantized model; `model.apply(model.params, *batch)` runs it.

  Raises:
    ValueError: see `ql.plan`; calibration is empty, changes its shape or is
      not finite; a weight is not finite.
  """
  transform = rtn() if transform is None else transform
  args = batches_lib.first(batches)
  tracer = tracing.Tracer(apply)
  traced, leaves, inputs = tracer(params, args, {})
  made = make_plan(traced, leaves, inputs, as_recipe(recipe))
  _refuse_nonfinite(made, traced.paths, leaves)
  _refuse_keyless(made, key)
  sites: dict[str, dict[str, Any]] = ranges.calibrate(
    apply, params, made, batches
  )
  found = jax.jit(
    lambda ls: known.weights(traced, ls, frozenset(made.effective), made.folded)
  )(leaves)
  effective = {
    name: transform.encode(name, stat['weight'], made.effective[name], key)
    for name, stat in found.items()
  }
  for name, stat in found.items():
    if 'shift' in stat:
      sites.setdefault(name, {})['fold'] = {'shift': stat['shift']}
  stored = dict(zip(traced.paths, leaves, strict=True))
  coded = {
    path: transform.encode(path, stored[path], storage, key)
    for path, storage in made.leaves.items()
  }
  variables = {
    'weights': _replace(params, made, coded),
    'sites': sites,
    'effective': effective,
  }
  report = {'transform': transform.name, 'batches': _count(batches)}
  return Quantized(rewrites.quantized(apply, made), variables, made, report)


def _replace(params: Any, made: Plan, coded: Mapping[str, Any]) -> Any:
  """The user's tree with codes and without dropped parameters."""

  def one(path, leaf):
    name = tracing.path_str(path)
    if name in coded:
      return coded[name]
    if name in made.dropped:
      return Dropped(tuple(jnp.shape(leaf)), str(jnp.result_type(leaf)))
    return leaf

  return jax.tree_util.tree_map_with_path(one, params)


def _refuse_nonfinite(made: Plan, paths, leaves) -> None:
  """A weight with NaN or infinity is refused by name."""
  used = {p for s in made.quantized.values() for p in s.paths}
  check = jax.jit(lambda xs: {k: jnp.isfinite(x).all() for k, x in xs.items()})
  chosen = {
    p: leaf
    for p, leaf in zip(paths, leaves, strict=True)
    if p in used and jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  bad = [k for k, fine in jax.device_get(check(chosen)).items() if not fine]
  if bad:
    raise ValueError(
      f'parameters hold NaN or infinity: {", ".join(bad)}; quantization needs '
      'finite weights'
    )


def _refuse_keyless(made: Plan, key) -> None:
  stochastic = [
    k
    for k, s in {**made.leaves, **made.effective}.items()
    if s.quantizer.rounding == 'stochastic'
  ]
  if stochastic and key is None:
    raise ValueError(
      f'stochastic rounding of {stochastic} needs ptq(..., key=...)'
    )


def _count(batches: Iterable[Any]) -> int | None:
  return len(batches) if hasattr(batches, '__len__') else None
