"""The definition of quantize_activation.

A division by a scale is a multiplication by its float32 reciprocal: XLA makes
that change by itself wherever the divisor is broadcast (one quotient in four
is then a unit in the last place off), and codes would depend on what
surrounds them: eager, jit, or NumPy.
"""

import jax.numpy as jnp
import numpy as np

from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401

# Smallest normal float32: XLA may flush what lies below to zero.
TINY = np.float32(2.0**-126)


def route(x, scale, zero_point, **options) -> str:
  """Says how it runs."""
  del x, zero_point, options
  found = 'measured' if scale is None else 'given'
  return f'scale {found}, one elementwise pass'


def run(x, scale, zero_point, *, bits, axes, symmetric, narrow):
  """Returns (codes, scale, zero_point) with scales reduced over `axes`."""
  x = x.astype(jnp.float32)
  qmax = 2 ** (bits - 1) - 1
  qmin = -qmax if narrow else -qmax - 1
  if scale is None and symmetric:
    scale = _scale(_largest(x, axes), qmax)
  elif scale is None:
    bad = jnp.isnan(x).any(axes, keepdims=True)
    low = jnp.min(x, axes, keepdims=True, initial=0.0)
    high = jnp.max(x, axes, keepdims=True, initial=0.0)
    scale = _scale(jnp.where(bad, jnp.nan, high - low), qmax - qmin)
    z = jnp.clip(jnp.round(-low * (1 / scale)) + qmin, qmin, qmax)
    zero_point = jnp.nan_to_num(z).astype(jnp.int32)
  else:
    scale = jnp.where(jnp.isfinite(_largest(x, axes)), scale, jnp.nan)
  q = jnp.round(x * (1 / scale))
  q = q if zero_point is None else q + zero_point.astype(jnp.float32)
  # NaN has no code: its unit is marked by the scale, the code is arbitrary.
  q = jnp.where(jnp.isnan(q), 0.0, jnp.clip(q, qmin, qmax))
  return q.astype(jnp.int8), scale, zero_point


def _largest(x, axes):
  """The largest magnitude, NaN where there is one: XLA's maximum drops it."""
  found = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
  return jnp.where(jnp.isnan(x).any(axes, keepdims=True), jnp.nan, found)


def _scale(span, levels):
  """The scale that maps `span` onto `levels`; TINY for a unit of zeros."""
  return jnp.maximum(span * (np.float32(1) / np.float32(levels)), TINY)
