"""Embedding lookup: only the rows asked for are decoded."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantlab.core import QTensor
from quantlab.ops.dims import GatherDims


def embed(table: QTensor, index: jax.Array, dims: GatherDims) -> jax.Array:
  """Rows of a table, as the traced gather gives them.

  Args:
    table: stored as (K = features, N = rows).
    index: integers (batch..., 1).
    dims: axis roles of the traced gather; out-of-range rows follow its mode.
  """
  ids = index[..., 0]
  rows = table.shape[dims.row]
  flat = jnp.clip(ids.reshape(-1), 0, rows - 1)
  dense = jnp.moveaxis(table.take_columns(flat).dequantize(), dims.row, 0)
  out = dense.reshape(*ids.shape, *dense.shape[1:])
  if 'fill' in dims.mode:
    inside = (ids >= 0) & (ids < rows)
    mask = inside.reshape(*ids.shape, *[1] * (dense.ndim - 1))
    out = jnp.where(mask, out, jnp.nan)
  batch = [i for i in range(out.ndim) if i not in dims.offset]
  order = [0] * out.ndim
  for position, axis in enumerate((*batch, *dims.offset)):
    order[axis] = position
  return jnp.transpose(out, order)
