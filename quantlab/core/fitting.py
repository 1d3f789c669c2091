"""Finding the parameters of a tensor: `fit` and `fit_range`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantlab.core import kmeans, scales, snap
from quantlab.core.qparams import QParams, from_range
from quantlab.core.quantizer import Quantizer
from quantlab.core.units import Units


def fit(
  x: Float[Array, '*b p q'],
  quantizer: Quantizer,
  *,
  axis: int = -2,
  bits: Array | int | None = None,
) -> QParams:
  """Scale, zero point and table for every unit of x.

  Args:
    x: weights (loops..., K, N) with axis=-2, activations (loops..., M, K)
      with axis=-1. Loop axes are separate tensors.
    quantizer: what to fit; its range rule decides how.
    axis: the contraction axis.
    bits: a traced width, for integer formats (see `fake_quantize`).

  Returns:
    QParams, see there for shapes.
  """
  check_float(x, quantizer)
  return _fit(x, bits, quantizer=quantizer, axis=axis)


def fit_range(
  lo: Float[Array, '*s'], hi: Float[Array, '*s'], quantizer: Quantizer
) -> QParams:
  """Parameters for ranges observed elsewhere (static activations).

  Args:
    lo: smallest values, of the shape of the wanted scales.
    hi: largest values, likewise.
    quantizer: what to fit; its range rule is not consulted.

  Returns:
    QParams of the shape of lo and hi.
  """
  if quantizer.learned:
    raise ValueError(f'{quantizer!r} learns a table, which a range cannot give')
  lo = jnp.minimum(jnp.asarray(lo, jnp.float32), 0)
  hi = jnp.maximum(jnp.asarray(hi, jnp.float32), 0)
  if quantizer.symmetric and quantizer.format.signed:
    hi = jnp.maximum(-lo, hi)
  limits = snap.bounds(quantizer.grid, None, lo.ndim)
  return from_range(lo, hi, quantizer, limits)


def check_float(x: Array, quantizer: Quantizer) -> None:
  """Raises TypeError unless x is a real floating-point array."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'{quantizer!r} quantizes real floating-point arrays, found dtype '
      f'{dtype} of shape {jnp.shape(x)}; give it None in the recipe, or cast '
      'it to float32 first'
    )


@functools.partial(jax.jit, static_argnames=('quantizer', 'axis'))
def _fit(x, bits, *, quantizer: Quantizer, axis: int) -> QParams:
  q, grid, rule = quantizer, quantizer.grid, quantizer.scale
  units = Units.of(x.shape, q, axis)
  limits = snap.bounds(grid, bits, x.ndim)
  x = units.split(x.astype(jnp.float32))
  # Unsigned codes without zero point hold no negative value: it is clipped.
  seen = jnp.maximum(x, 0) if q.symmetric and not grid.signed else x
  lo, hi = rule.range(seen, units, q.symmetric)
  params = from_range(lo, hi, q, limits)
  if isinstance(rule, scales.mse):
    best = _search(x, lo, hi, params.scale2, units, q, limits, rule)
    params = from_range(lo * best, hi * best, q, limits, params.scale2)
  if q.learned:
    table = _table(x * params.inverse, units, 2**q.bits, axis)
    params = params._replace(codebook=table)
  return params


def simulate(
  x: Array,
  params: QParams,
  units: Units,
  quantizer: Quantizer,
  limits: snap.Bounds,
  key: Array | None = None,
) -> Array:
  """Quantizes and dequantizes a split array."""
  grid = quantizer.grid
  traced = not isinstance(limits[1], float)
  zero_point, table = params.zero_point, params.codebook
  if zero_point is not None:
    zero_point = units.expand(zero_point)
  if traced and jnp.ndim(limits[1]):
    limits = tuple(units.expand(v) for v in limits)  # type: ignore
  if table is not None:
    table = spread(table, units.axis, x.ndim)
  step, inverse = units.expand(params.step), units.expand(params.inverse)
  return snap.snap(
    grid, traced, x, step, inverse, zero_point, limits, table, key
  )


def spread(table: Array, axis: int, ndim: int) -> Array:
  """Codebooks (loops..., 2^bits, Nb) as (2^bits, loops..., 1, Nb).

  Loop axes that the codebooks lack, up to rank `ndim` of the array, are 1.
  """
  table = jnp.expand_dims(jnp.moveaxis(table, axis, 0), axis)
  return table.reshape(
    table.shape[0], *(1,) * (ndim + 1 - table.ndim), *table.shape[1:]
  )


def _search(x, lo, hi, scale2, units, quantizer, limits, rule) -> Array:
  """The ratio in `rule.ratios()` of least error, unit by unit (A3).

  One candidate at a time: all at once would hold `candidates` copies of x.
  """
  mask = units.mask()

  def error(ratio):
    p = from_range(lo * ratio, hi * ratio, quantizer, limits, scale2)
    e = jnp.abs(simulate(x, p, units, quantizer, limits) - x)
    e = e * e if rule.p == 2 else e**rule.p
    if mask is not None:
      e = jnp.where(mask, e, 0)
    return units.squeeze(jnp.sum(e, axis=units.reduce, keepdims=True))

  def step(carry, ratio):
    least, best = carry
    e = error(ratio)
    better = e < least
    return (jnp.where(better, e, least), jnp.where(better, ratio, best)), None

  start = jnp.full(hi.shape, jnp.inf), jnp.ones(hi.shape)
  (_, best), _ = lax.scan(step, start, rule.ratios())
  return best


def _table(y: Array, units: Units, entries: int, axis: int) -> Array:
  """Learned tables (loops..., 2^bits, Nb) of an array that is not split."""
  if axis == -2:
    y = jnp.swapaxes(y, -2, -1)  # one row for each output channel
  if len(units.reduce) == 2:
    y = y.reshape(*y.shape[:-2], 1, -1)
  table = kmeans.kmeans(y, entries)
  return jnp.swapaxes(table, -2, -1) if axis == -2 else table
