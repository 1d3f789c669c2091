"""Codes and back: `fake_quantize`, `encode`, `decode`.

For one key, `decode(encode(x)) == fake_quantize(x)` bit for bit.

NaN in x stays NaN in `fake_quantize`, and makes a range found from x NaN, so
that its whole unit shows it. Its code is a NaN code in fp8_e4m3 and fp8_e5m2;
in the other formats, which have none, it is unspecified. Infinities saturate
under given parameters, and make a range found from x infinite: NaN results.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantlab.core import fitting, snap
from quantlab.core.qparams import QParams
from quantlab.core.quantizer import Quantizer
from quantlab.core.units import Units
from quantlab.formats.base import Codes, nearest_even, stochastic_floor


def fake_quantize(
  x: Float[Array, '*b p q'],
  quantizer: Quantizer,
  qparams: QParams | None = None,
  *,
  axis: int = -2,
  bits: Array | int | None = None,
  key: Array | None = None,
) -> Float[Array, '*b p q']:
  """Quantizes and dequantizes, differentiably.

  The derivative goes straight through rounding and is zero where x is
  clipped. Parameters found from x are constants to it; those given in
  `qparams` receive the derivative of LSQ (see `snap.snap`).

  Args:
    x: weights (loops..., K, N) with axis=-2, activations (loops..., M, K)
      with axis=-1.
    quantizer: what to simulate.
    qparams: its parameters; found from x when None.
    axis: the contraction axis.
    bits: replaces the width of an integer format by a value that may be
      traced: one compiled function serves every width. A scalar, one for
      each loop entry (loops...,), or one for each unit.
    key: for rounding='stochastic'; ignored otherwise.

  Returns:
    x_hat of the shape and dtype of x; float32 inside.
  """
  fitting.check_float(x, quantizer)
  key = check_key(quantizer, key)
  return _fake_quantize(x, qparams, bits, key, quantizer=quantizer, axis=axis)


def encode(
  x: Float[Array, '*b p q'],
  quantizer: Quantizer,
  qparams: QParams,
  *,
  axis: int = -2,
  key: Array | None = None,
) -> Codes:
  """Codes of x, one in each uint8 (uint16 for 16 bits), of its shape."""
  fitting.check_float(x, quantizer)
  key = check_key(quantizer, key)
  return _encode(x, qparams, key, quantizer=quantizer, axis=axis)


@functools.partial(jax.jit, static_argnames=('quantizer', 'axis'))
def decode(
  codes: Codes, quantizer: Quantizer, qparams: QParams, *, axis: int = -2
) -> Float[Array, '*b p q']:
  """Numbers that the codes stand for, float32, of their shape."""
  units = Units.of(codes.shape, quantizer, axis)
  tables = _tables(qparams, axis, codes.ndim)
  y = quantizer.grid.decode(units.split(codes), *tables)
  if qparams.zero_point is not None:
    y = y - units.expand(qparams.zero_point)
  return units.merge(y * units.expand(qparams.step))


@functools.partial(jax.jit, static_argnames=('quantizer', 'axis'))
def _fake_quantize(x, qparams, bits, key, *, quantizer: Quantizer, axis: int):
  if qparams is None:
    qparams = fitting.fit(lax.stop_gradient(x), quantizer, axis=axis, bits=bits)
  units = Units.of(x.shape, quantizer, axis)
  limits = snap.bounds(quantizer.grid, bits, x.ndim)
  y = units.split(x.astype(jnp.float32))
  y = fitting.simulate(y, qparams, units, quantizer, limits, key)
  return units.merge(y).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=('quantizer', 'axis'))
def _encode(x, qparams, key, *, quantizer: Quantizer, axis: int):
  grid = quantizer.grid
  units = Units.of(x.shape, quantizer, axis)
  tables = _tables(qparams, axis, x.ndim)
  y = units.split(x.astype(jnp.float32)) * units.expand(qparams.inverse)
  if qparams.zero_point is not None:
    y = nearest_even(y) if key is None else stochastic_floor(key, y)
    y = y + units.expand(qparams.zero_point)
  elif key is not None:
    y = grid.stochastic_round(key, y, *tables)
  return units.merge(grid.encode(y, *tables))


def _tables(qparams: QParams, axis: int, ndim: int) -> tuple[Array, ...]:
  """The learned table as a format's method takes it, if there is one."""
  if qparams.codebook is None:
    return ()
  return (fitting.spread(qparams.codebook, axis, ndim),)


def check_key(quantizer: Quantizer, key: Array | None) -> Array | None:
  """The key where rounding needs one, else None; raises where it is missing."""
  if quantizer.rounding == 'nearest':
    return None
  if key is None:
    raise ValueError(
      f'{quantizer!r} needs a random key: pass key=jax.random.key(seed)'
    )
  return key
