"""Matrices of few bits: codes of a normal law's quantiles (arXiv 2307.16867).

A matrix is taken for normal numbers of its own mean and spread, and each of
them rounded to the levels that are best for such numbers. What is stored is a
`QTensor` with a codebook for each matrix.
"""

from __future__ import annotations

import functools
import statistics

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantlab import core
from quantlab.core import Layout, QParams, QTensor

EPS = np.float32(1e-5)


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
  """The 2^bits values of least mean |error| for a standard normal number.

  Each is the median of its part of the law, the parts end halfway between
  values (arXiv 2307.16867, section 4.2); found by iteration.
  """
  law = statistics.NormalDist()
  p = (np.arange(2**bits) + 0.5) / 2**bits
  levels = np.array([law.inv_cdf(v) for v in p])
  for _ in range(20_000):
    ends = [law.cdf(v) for v in (levels[1:] + levels[:-1]) / 2]
    mass = np.array([0.0, *ends, 1.0])
    new = np.array([law.inv_cdf(v) for v in (mass[1:] + mass[:-1]) / 2])
    if np.abs(new - levels).max() < 1e-10:
      break
    levels = new
  return (levels - levels[::-1]) / 2  # symmetric to the last bit


def _statistics(w: Array) -> tuple[Array, Array]:
  mean = jnp.mean(w, (-2, -1), keepdims=True)
  return mean, jnp.std(w, (-2, -1), keepdims=True)


def _codebook(w: Array, bits: int) -> QParams:
  """Parameters whose codebook is std x levels + mean, a table a matrix."""
  mean, std = _statistics(lax.stop_gradient(w))
  levels = jnp.asarray(normal_levels(bits), jnp.float32)[:, None]
  values = levels * (std + EPS) + mean
  scale = jnp.max(jnp.abs(values), -2, keepdims=True)
  return QParams(scale, codebook=values / scale)


def simulate(
  w: Float[Array, '*b k n'], quantizer: core.Quantizer
) -> Float[Array, '*b k n']:
  """An adapter matrix as its codes stand for it, straight through rounding.

  Rounding is that of (w - mean) / std to `normal_levels`; mean and std belong
  to the graph (arXiv 2307.16867, equation 5).

  Args:
    w: one matrix for each index in front.
    quantizer: `ql.codebook(bits=..., per='tensor')`.
  """
  value = core.fake_quantize(w, quantizer, _codebook(w, quantizer.bits))
  mean, std = _statistics(w)
  spread = std + EPS
  rounded = lax.stop_gradient((value - mean) / spread - (w - mean) / spread)
  smooth = ((w - mean) / spread + rounded) * spread + mean
  return smooth + lax.stop_gradient(value - smooth)


def store(w: Float[Array, '*b k n'], quantizer: core.Quantizer) -> QTensor:
  """The codes of an adapter matrix, as `simulate` has it."""
  layout = Layout.of(w.shape, (w.ndim - 2,), range(w.ndim - 2))
  return core.quantize(w, quantizer, layout, _codebook(w, quantizer.bits))
