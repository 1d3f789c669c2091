"""Rounding in the scaled domain, with a straight-through derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import quantlab_kernels as kernels
from quantlab.formats import Format, Integer, base
from quantlab.formats.integer import positive_zero

Bounds = tuple[float | Array, float | Array]


def bounds(fmt: Format, bits: Array | int | None, ndim: int) -> Bounds:
  """Smallest and largest code value, of a static or a traced width.

  Args:
    fmt: the format; its own width holds when bits is None.
    bits: widths, for integer formats only: a scalar, one for each loop
      entry (loops...,), or one for each unit (loops..., count0, count1).
    ndim: rank of the array to be quantized.

  Returns:
    (lo, hi): two floats, or two float32 arrays that broadcast like scales.
  """
  if bits is None:
    return fmt.min, fmt.max
  if not isinstance(fmt, Integer):
    raise TypeError(
      f'bits= applies to integer formats, {fmt.name} has a fixed width'
    )
  b = jnp.asarray(bits)
  if not jnp.issubdtype(b.dtype, jnp.integer):
    raise TypeError(f'bits= takes integers, found {b.dtype}')
  if b.ndim and b.ndim == ndim - 2:
    b = b[..., None, None]
  one = jnp.ones((), jnp.int32)
  hi = (one << (b.astype(jnp.int32) - int(fmt.signed))) - 1
  hi = hi.astype(jnp.float32)
  if not fmt.signed:
    return jnp.zeros_like(hi), hi
  return -hi - np.float32(not fmt.narrow), hi


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def snap(
  fmt: Format,
  traced: bool,
  x: Float[Array, '*s'],
  step: Array,
  inverse: Array,
  zero_point: Array | None,
  limits: Bounds,
  table: Array | None,
  key: Array | None,
) -> Float[Array, '*s']:
  """Quantizes and dequantizes.

    x_hat = (clip(round(x / s) + z, lo, hi) - z) s

  The derivative is that of clip(x, (lo - z) s, (hi - z) s): straight through
  where x is merely rounded (arXiv 1308.3432), to the bound where it is
  clipped. The scale's is that of LSQ, x_hat / s - x / s where x is not
  clipped and x_hat / s where it is (arXiv 1902.08153, equation 3).

  Args:
    fmt: the format.
    traced: whether limits replace the format's own (integers only).
    x: numbers.
    step: s, broadcasting against x.
    inverse: 1 / s, a constant to differentiation.
    zero_point: integers z that broadcast against x, or None.
    limits: smallest and largest code value (see `bounds`).
    table: a learned table (2^bits, ...), or None.
    key: for stochastic rounding; None rounds to nearest.

  Returns:
    x_hat.
  """
  return _value(fmt, traced, x * inverse, zero_point, limits, table, key) * step


@snap.defjvp
def _snap_jvp(fmt, traced, primals, tangents):
  x, step, inverse, z, limits, table, key = primals
  dx, ds, _, dz, _, dtable, _ = tangents
  # Not the value alone: it may be derived again.
  x_hat = kernels.whole(functools.partial(snap, fmt, traced), *primals)
  y = lax.stop_gradient(x * inverse)
  value = lax.stop_gradient(_value(fmt, traced, y, z, limits, table, key))
  shifted = y if z is None else y + z
  lo, hi = limits
  inside = (shifted >= lo - fmt.edge) & (shifted <= hi + fmt.edge)
  outside = 0 if dz is None else -step * dz
  # One product with ds, and with a scalar where there is one scale: its
  # transpose is then a single full sum, fifteen times as fast on a CPU.
  along = ds.reshape(()) if ds.size == 1 else ds
  by_step = jnp.where(inside, value - y, value)
  tangent = jnp.where(inside, dx, outside) + by_step * along
  if table is not None:
    tangent += fmt.decode(fmt.encode(y, table), dtable) * step
  return x_hat, tangent


def _value(fmt, traced, y, zero_point, limits, table, key) -> Array:
  """What snap gives, in units of the scale."""
  if zero_point is None and not traced:
    tables = () if table is None else (table,)
    if key is None:
      return fmt.round(y, *tables)
    return fmt.stochastic_round(key, y, *tables)
  q = base.nearest_even(y) if key is None else base.stochastic_floor(key, y)
  if zero_point is not None:
    q = q + zero_point
  q = jnp.clip(q, *limits) if traced else fmt.round(q)
  return positive_zero(q) if zero_point is None else q - zero_point
