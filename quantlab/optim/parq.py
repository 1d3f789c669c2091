"""PARQ: parameters drawn onto their grid while they train.

Instead of a gradient estimator, a proximal map: gradients are taken at the
parameters p, the optimizer moves latents z, and p is z pulled towards the
levels of the quantizer, gently at first and wholly in the end (arXiv
2503.15748). The map of an interval between two levels is a line through its
middle, of slope 1 / r, cut off at the levels: r = 1 is float training, r = 0
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from quantlab import core
from quantlab.core import QParams, Quantizer
from quantlab.core.tree import named_leaves, path_str
from quantlab.core.units import Units
from quantlab.plan import Plan, Storage


class ParqState(NamedTuple):
  """State of `parq`.

  Attributes:
    count: updates done, int32.
    inner: state of the optimizer, of all parameters.
    latents: float32 parameters that the optimizer moves, by path.
    qparams: the grid of each, canonical, by path.
  """

  count: Array  # type: ignore[assignment]
  inner: Any
  latents: dict[str, Array]
  qparams: dict[str, QParams]


def inverse_slope(
  count: Array | int,
  start: int,
  end: int,
  *,
  steepness: float = 10.0,
  center: float = 0.5,
) -> Float[Array, '']:
  """The schedule of r: 1 up to `start`, 0 from `end`, a sigmoid between.

  Normalized so that it begins at 1 and ends at 0 for every center.

  Args:
    count: updates done.
    start, end: the updates between which it falls.
    steepness: of the sigmoid over the whole stretch.
    center: where it is steepest, as a part of the stretch.
  """
  fraction = (jnp.asarray(count, jnp.float32) - start) / (end - start)
  now, first, last = (
    jax.nn.sigmoid(steepness * (center - f)) for f in (fraction, 0.0, 1.0)
  )
  r = (now - last) / (first - last)
  return jnp.where(fraction <= 0, 1.0, jnp.where(fraction >= 1, 0.0, r))


def parq(
  optimizer: optax.GradientTransformation,
  plan: Plan,
  *,
  start: int,
  end: int,
  steepness: float = 10.0,
  center: float = 0.5,
  period: int = 10,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose parameters end on the grid that a plan stores.

  The parameters are the user's own tree, and the function is the float one:
  those that the plan stores as codes are annealed, the others follow the
  optimizer. Up to `start` the optimizer's own updates are applied. From `end`
  on the planned parameters are what their codes stand for (one that jumps
  across several levels is off by its last bits for one update), and `ranges`
  hands their scales to `ql.qat(...).freeze`.

  Values outside of the levels are drawn to the outermost one in proportion to
  r, rather than cut off at once as in the published code, so that annealing
  sets in without a jump also where the range rule clips (ternary).

  Args:
    optimizer: moves the latents; its weight decay and its moments are theirs.
    plan: what is stored as codes: formats with a fixed table of at most 8
      bits, such as integer, ternary and binary.
    start: updates after which annealing begins.
    end: updates after which every planned parameter is on its grid.
    steepness, center: see `inverse_slope`.
    period: updates between two fits of the grid to the latents.

  Returns:
    A transformation with `ParqState`; `update` needs `params`.

  Raises:
    ValueError: a stretch or period that is none, weights that the plan
      computes from several parameters, a format without a fixed table; from
      `init`: parameters of another structure.
  """
  if not 0 <= start < end or period < 1:
    raise ValueError(
      f'parq takes 0 <= start < end and period >= 1, found {start=}, {end=}, '
      f'{period=}'
    )
  _check(plan)
  optimizer = optax.with_extra_args_support(optimizer)
  leaves = plan.leaves

  def init(params):
    latents = _planned(params, plan)
    grids = {k: _fit(leaves[k], z) for k, z in latents.items()}
    count = jnp.zeros((), jnp.int32)
    return ParqState(count, optimizer.init(params), latents, grids)

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError(
        'parq needs the parameters: update(grads, state, params)'
      )
    at = _put(params, state.latents)
    updates, inner = optimizer.update(updates, state.inner, at, **extra)
    moves = _planned(updates, plan)
    latents = {k: z + moves[k] for k, z in state.latents.items()}
    grids = lax.cond(
      state.count % period == 0,
      lambda: {k: _fit(leaves[k], z) for k, z in latents.items()},
      lambda: state.qparams,
    )
    count = state.count + 1
    r = inverse_slope(count, start, end, steepness=steepness, center=center)
    old, new = _planned(params, plan), {}
    for k, z in latents.items():
      p = _drawn(z, leaves[k], grids[k], r)
      new[k] = jnp.where(r == 1, moves[k], _difference(p, old[k]))
    state = ParqState(count, inner, latents, grids)
    return _put(updates, new), state

  return optax.GradientTransformationExtraArgs(init, update)


def ranges(state: Any, plan: Plan) -> dict[str, dict[str, dict[str, Array]]]:
  """Site state that fixes the grids which `parq` ended on.

  With it, codes are those that the parameters lie on:

    variables = {'weights': params, 'sites': ranges(opt_state, plan)}
    model = ql.qat(apply, plan, ql.estimators.ste()).freeze(variables)

  Args:
    state: of the optimizer; the `ParqState` may be inside of others.
    plan: what `parq` was made with.

  Raises:
    ValueError: there is no `ParqState` in it, or several.
  """

  def is_mine(x):
    return isinstance(x, ParqState)

  found = [x for x in jax.tree.leaves(state, is_leaf=is_mine) if is_mine(x)]
  if len(found) != 1:
    raise ValueError(
      f'the optimizer state holds {len(found)} states of parq, expected one'
    )
  sites: dict[str, dict[str, dict[str, Array]]] = {}
  for path, qparams in found[0].qparams.items():
    site, role = plan.weight_roles[path]
    given = {k: v for k, v in qparams._asdict().items() if v is not None}
    sites.setdefault(site, {})[role] = given
  return sites


def prox(
  x: Float[Array, '*b k n'],
  quantizer: Quantizer,
  qparams: QParams,
  r: Array | float,
) -> Float[Array, '*b k n']:
  """Draws canonical weights towards their levels; see the module.

  Args:
    x: weights (loops..., K, N).
    quantizer: whose levels; a fixed table.
    qparams: the grid.
    r: inverse slope in [0, 1]; may be traced.
  """
  units, levels = Units.of(x.shape, quantizer, -2), quantizer.grid.values
  zero = 0 if qparams.zero_point is None else units.expand(qparams.zero_point)
  y = units.split(x) * units.expand(qparams.inverse) + zero
  i = jnp.searchsorted(levels, y, side='right', method='scan_unrolled') - 1
  i = jnp.clip(i, 0, len(levels) - 2)
  low, high = jnp.asarray(levels)[i], jnp.asarray(levels)[i + 1]
  middle = (low + high) / 2
  line = middle + (y - middle) / jnp.maximum(r, np.float32(2.0**-60))
  drawn = jnp.clip(line, low, high)
  edge = jnp.clip(y, levels[0], levels[-1])
  drawn = jnp.where(y == edge, drawn, edge + r * (y - edge))
  drawn = units.merge((drawn - zero) * units.expand(qparams.step))
  hard = core.fake_quantize(x, quantizer, qparams)
  return jnp.where(r == 1, x, jnp.where(r == 0, hard, drawn))


def _drawn(z: Array, storage: Storage, qparams: QParams, r: Array) -> Array:
  return storage.on_matrix(z, lambda x: prox(x, storage.quantizer, qparams, r))


def _fit(storage: Storage, z: Array) -> QParams:
  return core.fit(storage.layout.to_canonical(z), storage.quantizer)


def _difference(new: Array, old: Array) -> Array:
  """What is to be added to `old` to give `new`; rounded in favour of `new`."""
  delta = new - old
  return delta + (new - (old + delta))


def _planned(tree: Any, plan: Plan) -> dict[str, Array]:
  """Float32 leaves at the plan's paths."""
  found = dict(named_leaves(tree))
  if missing := [k for k in plan.leaves if k not in found]:
    raise ValueError(
      f'the plan stores {missing[:5]}, which these parameters lack; they have '
      f'{list(found)[:5]}. parq takes the parameters that the plan was made for'
    )
  return {k: jnp.asarray(found[k], jnp.float32) for k in plan.leaves}


def _put(tree: Any, values: Mapping[str, Array]) -> Any:
  """The tree with these leaves, by path, in its own dtypes."""

  def one(path, leaf):
    found = values.get(path_str(path))
    return leaf if found is None else found.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, tree)


def _check(plan: Plan) -> None:
  if plan.effective:
    raise ValueError(
      f'the plan computes the weights of {list(plan.effective)[:5]} from '
      'several parameters; parq moves parameters that are stored as codes '
      'themselves: plan with ql.rule(..., fold=False), or leave those sites out'
    )
  for path, storage in plan.leaves.items():
    q = storage.quantizer
    if q.learned or q.bits > 8:
      raise ValueError(
        f'parq draws parameters to a fixed table of at most 256 levels, '
        f'{path!r} is planned as {q!r}; use an integer, ternary or binary '
        'format'
      )
