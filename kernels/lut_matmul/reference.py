"""The definition of lut_matmul on 2-D operands: int32, then float32."""

import jax.numpy as jnp

from quantlab_kernels import packing, panels, shapes
from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(x, p, table, scale, x_scale, x_zero, *, bits, group, out_dtype):
  """Returns the scaled product, shape (M, N)."""
  k, groups = x.shape[1], scale.shape[0]
  q = packing.unpack(panels.plain_bytes(p), bits, k)
  w = table.astype(jnp.int32)[q.astype(jnp.int32)]
  # A short last group ends in zeros, which add nothing.
  w = shapes.split_group_rows(w, group, groups)
  x = shapes.split_groups(x.astype(jnp.int32), group, groups)
  if x_zero is not None:
    x = x - x_zero[:, :, None]
  acc = jnp.einsum('mgk,gkn->gmn', x, w).astype(jnp.float32)
  acc = acc * scale[:, None, :]
  if x_scale is not None:
    acc = acc * x_scale.T[:, :, None]
  return jnp.sum(acc, axis=0).astype(out_dtype)
