"""Batches without data: inputs that BatchNorms expect (ZeroQ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from quantlab import rewrites
from quantlab.core import rng
from quantlab.core.tree import named_leaves
from quantlab.graph import known, tracing

Statistics = dict[str, tuple[jax.Array, jax.Array]]


def batch_norms(apply: Callable, params: Any, *args: Any) -> Statistics:
  """(mean, standard deviation) that the BatchNorm after each site expects.

  Of the product itself, before its bias, by output channel. Found by dataflow
  from how the map y = a z + b that follows a product changes with the
  parameters it is computed from: mu is the one with db = -a dmu, the variance
  the one with d log a / dvar = -1 / (2 sigma^2); names do not matter.

  Args:
    apply: `apply(params, *args)` in inference mode.
    params: parameters.
    *args: example arguments.

  Raises:
    ValueError: no product is followed by a BatchNorm.
  """
  traced, leaves, _ = tracing.Tracer(apply)(params, args, {})
  sites = _scaled(traced)
  chosen = frozenset(sites)
  involved = {i: leaves[i] for _, f in sites.values() for i in f.leaves}

  def maps(changed):
    values = [changed.get(i, x) for i, x in enumerate(leaves)]
    return known.weights(traced, values, chosen, chosen)

  raw = known.weights(traced, leaves, chosen, frozenset())
  found: Statistics = {}
  for name, (site, fold) in sites.items():
    moved = {
      i: jax.jvp(maps, (involved,), (_only(involved, i),))[1][name]
      for i in fold.leaves
    }
    folded = maps({})[name]['weight']
    stats = _statistics(site, raw[name]['weight'], folded, moved, leaves)
    if stats is not None:
      found[name] = stats
  if not found:
    raise ValueError(
      'no product is followed by a BatchNorm in inference mode: there are no '
      'statistics to distill data from. Use real calibration data'
    )
  return found


def scaled(apply: Callable, params: Any, *args: Any) -> tuple[str, ...]:
  """Ids of the products that a scale of each channel follows.

  From shapes alone; where there is none there is no BatchNorm, while a scale
  may be another's.

  Args:
    apply: `apply(params, *args)` in inference mode.
    params: parameters, or their shapes.
    *args: example arguments, or their shapes.
  """
  traced, _, _ = tracing.Tracer(apply)(params, args, {})
  return tuple(_scaled(traced))


def _scaled(traced) -> dict[str, Any]:
  return {
    s.id: (s, s.fold)
    for s in traced.analysis.sites
    if s.fold is not None and s.side is not None and not s.loops
  }


def _only(involved, index):
  return {
    i: jnp.ones_like(x) if i == index else jnp.zeros_like(x)
    for i, x in involved.items()
  }


def _statistics(site, weight, folded, moved, leaves):
  """Mean and deviation of one site's product, or None without a BatchNorm."""
  axes = tuple(i for i in range(weight.ndim) if i not in site.dims.w_free)

  def ratio(a, b):  # by channel, of arrays that are a multiple of each other
    return ((a * b).sum(axes) / (b * b).sum(axes)).reshape(-1)

  a = ratio(folded, weight)
  mean, variance = jnp.zeros_like(a), None
  for i, change in moved.items():
    value = jnp.asarray(leaves[i]).reshape(-1)
    rate = ratio(change['weight'], folded)
    shift = change['shift'].reshape(-1) / a
    if _like(rate, 0):  # no factor: the mean, a bias before it, or beta
      mean += value if _like(shift, -1) else 0
      mean -= value if _like(shift, 1) and not _like(a, 1) else 0
    elif not _like(rate * value, 1):  # gamma is a factor itself
      variance = -1 / (2 * rate)
  return None if variance is None else (mean, jnp.sqrt(variance))


def _like(x: jax.Array, value: float) -> bool:
  return bool(jnp.allclose(x, value, rtol=1e-3, atol=1e-5))


class _Moments:
  """Observer: mean and variance of chosen products by output channel."""

  def __init__(self, sites):
    self.sites = frozenset(sites)

  def init(self, site):
    if site.id not in self.sites:
      return None
    n = site.out[site.fold.axis]
    return {'mean': jnp.zeros(n), 'var': jnp.zeros(n)}

  def update(self, site, stat, lhs, rhs, out, state):
    del stat, lhs, rhs, state
    axes = tuple(i for i in range(out.ndim) if i != site.fold.axis)
    out = out.astype(jnp.float32)
    return {'mean': out.mean(axes), 'var': out.var(axes)}

  def merge(self, site, a, b):
    raise TypeError('a BatchNorm inside a loop is not distilled')


def distill(
  apply: Callable,
  params: Any,
  like: jax.ShapeDtypeStruct | jax.Array,
  key: jax.Array,
  *,
  steps: int = 500,
  learning_rate: float = 0.1,
  epsilon: float = 1e-6,
) -> tuple[jax.Array, list[float]]:
  """A batch of distilled data (ZeroQ, arXiv 2001.00281, equation 5).

    min_x sum_l |mean(z_l) - mu_l|^2 + |std(z_l) - sigma_l|^2

  with x ~ N(0, 1) to begin with and its own mean 0 and deviation 1 as one
  more term; moments over the batch and all positions. Inputs are taken to be
  normalised.

  Args:
    apply: `apply(params, x)` in inference mode, one array in.
    params: parameters.
    like: shape and dtype of the batch.
    key: of the first draw.
    steps: of Adam, with a cosine schedule.
    learning_rate: the first one.
    epsilon: under the root of variances.

  Returns:
    The batch, and the loss after every step.

  Raises:
    ValueError: there is no BatchNorm; parameters that are not finite; steps,
      rate or epsilon that are not positive; an empty `like`.
    TypeError: `key` is no random key.
  """
  if key is None:
    raise TypeError('key= takes one random key; pass jax.random.key(seed)')
  rng.check_key(key)
  if not (type(steps) is int and steps > 0):
    raise ValueError(f'steps is a positive whole number, got {steps!r}')
  for what, value in (('learning_rate', learning_rate), ('epsilon', epsilon)):
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'{what} is a positive number, got {value!r}')
  if 0 in like.shape:
    raise ValueError(f'like= is empty: its shape is {like.shape}')
  for path, x in named_leaves(params):
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    if floats and not bool(jnp.isfinite(x).all()):
      raise ValueError(f'the parameter {path!r} holds NaN or infinity')
  shape, dtype = like.shape, like.dtype
  start = jax.random.normal(key, shape, dtype)
  targets = batch_norms(apply, params, start)
  observed = rewrites.observe(apply, _Moments(targets))

  def loss(x):
    _, stats = observed(params, x)
    axes = tuple(range(x.ndim - 1))
    total = jnp.square(x.mean(axes)).sum()
    total += jnp.square(jnp.sqrt(x.var(axes) + epsilon) - 1).sum()
    for name, (mean, std) in targets.items():
      found = stats[name]
      total += jnp.square(found['mean'] - mean).sum()
      deviation = jnp.sqrt(found['var'] + epsilon)
      total += jnp.square(deviation - std).sum()
    return total

  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

  @jax.jit
  def step(x, state):
    value, gradient = jax.value_and_grad(loss)(x)
    change, state = optimizer.update(gradient, state)
    return optax.apply_updates(x, change), state, value

  x, state, losses = start, optimizer.init(start), []
  for _ in range(steps):
    x, state, value = step(x, state)
    losses.append(value)
  return x, [float(v) for v in np.asarray(losses)]
