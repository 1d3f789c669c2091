"""The error that a choice of scales leaves in what reads an input."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab import core
from quantlab.core import Quantizer, scales
from quantlab.graph.sites import Site
from quantlab.ops import ConvDims
from quantlab.ptq.inputs import Input, grid, over_matrix, own
from quantlab.ptq.statistics import Range
from quantlab.ptq.transform import Context

HIGHEST = lax.Precision.HIGHEST


def output_errors(
  ctx: Context,
  where: Input,
  rows: Mapping[str, np.ndarray],
  matrices: Mapping[str, Sequence[jax.Array]],
  s: np.ndarray,
  *,
  z: np.ndarray | None = None,
  found: Range | None = None,
) -> np.ndarray:
  """|| (X - z) W - Q((X - z) / s) Q(s W) ||^2 of each candidate s.

  Args:
    ctx: the context.
    where: the input X.
    rows: by site, (*loops, batch..., m, K); see `statistics.RowSample`.
    matrices: by site, the weights W.
    s: candidates (g, *loops, channels).
    z: shift (*loops, channels).
    found: ranges of X, which a static quantizer takes; without them X stays
      in float, and the error is that of the weights alone.

  Returns:
    (g, *loops): the sum over all sites that read the input.
  """
  z = np.zeros(where.shape, np.float32) if z is None else z
  total = np.zeros(s.shape[: 1 + len(where.loops)])
  for site in where.sites:
    rule = ctx.plan.sites[site.id].rule
    given = rule.input if rule and found is not None else None
    bounds = None
    if given is not None and given.static:
      bounds = _bounds(where, site, found, s, z)
    for w in matrices[site.id]:
      total += _errors(
        rows[site.id],
        w,
        _over_rows(where, site, z, 0),
        _over_rows(where, site, s, 1),
        over_matrix(where, site, s, 1, w.shape[-1]),
        bounds,
        weight=_nearest(rule.weight if rule else None),
        given=_nearest(given),
        groups=site.dims.groups if isinstance(site.dims, ConvDims) else 1,
        loops=len(where.loops),
      )
  return total


def _nearest(quantizer: Quantizer | None) -> Quantizer | None:
  """A quantizer for simulation: its range is passed, nothing is random."""
  if quantizer is None:
    return None
  scale = quantizer.scale
  if isinstance(scale, scales.kl):  # of whole histograms; a sample has none
    scale = scales.full(quantizer.symmetric)
  return dataclasses.replace(
    quantizer, static=False, rounding='nearest', scale=scale
  )


def _over_rows(where: Input, site: Site, vector, neutral):
  """A vector over the input's channels as it meets the rows of a site."""
  mine = own(where, site, vector, neutral)
  if not isinstance(site.dims, ConvDims):
    batch = len(site.dims.w_batch)  # type: ignore[union-attr]
    return np.expand_dims(mine, tuple(range(-2 - batch, -1)))
  groups = site.dims.groups
  index = grid(site, groups).T  # (groups or 1, K)
  mine = mine[..., index]
  return mine[..., None, :] if groups > 1 else mine


def _bounds(where, site, found, s, z):
  """The range of (X - z) / s, (g, *loops) each."""
  lo, hi = ((own(where, site, v - z, 0)) for v in (found.lo, found.hi))
  mine = own(where, site, s, 1)
  return np.min(lo / mine, -1), np.max(hi / mine, -1)


@functools.partial(
  jax.jit, static_argnames=('weight', 'given', 'groups', 'loops')
)
def _errors(x, w, z, sx, sw, bounds, *, weight, given, groups, loops):
  x, w = x - z, w.astype(jnp.float32)
  exact = jnp.matmul(x, _split(w, groups), precision=HIGHEST)

  def one(candidate):
    sx, sw, bounds = candidate
    w_hat = w * sw
    if weight is not None:
      w_hat = core.fake_quantize(w_hat, weight, axis=-2)
    x_hat = _quantized(x / sx, given, bounds, loops)
    out = jnp.matmul(x_hat, _split(w_hat, groups), precision=HIGHEST)
    return jnp.sum((out - exact) ** 2, tuple(range(loops, out.ndim)))

  return lax.map(one, (sx, sw, bounds))


def _split(w, groups):
  """Columns of a grouped convolution by group, (..., groups, K, N / groups)."""
  if groups == 1:
    return w
  *lead, k, n = w.shape
  return jnp.moveaxis(w.reshape(*lead, k, groups, n // groups), -2, -3)


def _quantized(x, q: Quantizer | None, bounds, loops):
  """Rows quantized as the site quantizes its input.

  A scale for each token of a convolution, an image, becomes one for each
  window: the sample holds no whole images.
  """
  if q is None:
    return x
  matrix = x.reshape(*x.shape[:loops], 1, -1) if q.per == 'tensor' else x
  qparams = None
  if bounds is not None and isinstance(q.scale, scales.absmax | scales.minmax):
    lo, hi = (b[..., None, None] for b in bounds)
    qparams = core.fit_range(lo, hi, q)
  return core.fake_quantize(matrix, q, qparams, axis=-1).reshape(x.shape)
