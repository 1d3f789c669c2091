"""Second moments of the inputs of each weight, streamed as sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantlab import handlers
from quantlab.ops import ConvDims, DotDims, RaggedDims
from quantlab.plan import Plan


class InputMoments:
  """Observer: sum of x x^T over rows, and their number, of every weight.

  x is what the weight meets: quantized, where the site quantizes its input.

  Shapes are those that `second_order` takes for the stored matrix: batch axes
  of the weight (experts) in front; for a grouped convolution one matrix a
  group.
  """

  def __init__(self, plan: Plan):
    self.plan = plan
    self.chosen = {
      k
      for k, s in plan.quantized.items()
      if s.rule is not None and s.rule.weight is not None and s.kind != 'gather'
    }

  def init(self, site):
    if site.id not in self.chosen:
      return None
    lead, k = _shape(site)
    return {
      'moments': jnp.zeros((*lead, k, k), jnp.float32),
      'rows': jnp.zeros(lead, jnp.float32),
    }

  def update(self, site, stat, lhs, rhs, out, state):
    x = lhs if site.side == 'rhs' else rhs
    x = input_rows(site, handlers.as_seen(self.plan, site, x, state))
    moments = jnp.einsum(
      '...mi,...mj->...ij', x, x, precision=lax.Precision.HIGHEST
    )
    return {
      'moments': stat['moments'] + moments,
      # Rows of zeros are no tokens: padding of what an expert was sent.
      'rows': stat['rows'] + jnp.any(x != 0, -1).sum(-1, dtype=jnp.float32),
    }

  def merge(self, site, a, b):
    return jax.tree.map(jnp.add, a, b)


def _shape(site) -> tuple[tuple[int, ...], int]:
  shape, dims = site.weight_shape, site.dims
  k = 1
  for axis in dims.w_contract:
    k *= shape[axis]
  if isinstance(dims, ConvDims):
    return ((dims.groups,) if dims.groups > 1 else ()), k
  return tuple(shape[i] for i in dims.w_batch), k


def input_rows(site: Any, x: Array) -> Float[Array, '*b m k']:
  """The rows that a weight multiplies, contraction in storage order.

  A convolution is unfolded into its windows; a row of one of its groups holds
  that group's channels.
  """
  x = x.astype(jnp.float32)
  if isinstance(site.dims, DotDims):
    return site.dims.x_matrix(x)
  if isinstance(site.dims, RaggedDims):
    raise ValueError(
      f'site {site.id!r} is a ragged product, whose rows belong to experts by '
      'count; second-order methods need a stacked product: use rtn() for it'
    )
  return _windows(site, x)


def _windows(site, x):
  dims: ConvDims = site.dims
  strides, padding, lhs_dilation, rhs_dilation = dims.window
  order = (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1])
  x = jnp.transpose(x, order)  # (batch, spatial..., channels)
  spatial = [site.weight_shape[i] for i in dims.rhs_spec[2:]]
  n = len(spatial)
  letters = ''.join('DHW'[-n:])
  patches = lax.conv_general_dilated_patches(
    x,
    spatial,
    strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
    precision=lax.Precision.HIGHEST,
  )  # (batch, spatial..., channels * window), channels major
  taps = 1
  for size in spatial:
    taps *= size
  per_group = x.shape[-1] // dims.groups
  rows = patches.reshape(-1, dims.groups, per_group, taps)
  rows = rows.transpose(1, 0, 3, 2).reshape(dims.groups, -1, taps * per_group)
  return rows if dims.groups > 1 else rows[0]
