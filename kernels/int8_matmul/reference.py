"""The definition of int8_matmul on 2-D operands: int32 throughout."""

import jax.numpy as jnp

from quantlab_kernels import panels
from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(x, w, x_scale, w_scale, x_zero, w_zero, *, transpose_w, out_dtype):
  """Returns the scaled product, shape (M, N)."""
  x, w = x.astype(jnp.int32), panels.plain(w).astype(jnp.int32)
  w = w.T if transpose_w else w
  x = x if x_zero is None else x - x_zero
  w = w if w_zero is None else w - w_zero
  return rescale(x @ w, x_scale, w_scale, out_dtype)


def rescale(acc, x_scale, w_scale, out_dtype):
  """Returns x_scale (w_scale acc) in float32, then in out_dtype."""
  if jnp.issubdtype(out_dtype, jnp.integer):
    return acc.astype(out_dtype)
  y = acc.astype(jnp.float32)
  y = y if w_scale is None else y * w_scale
  y = y if x_scale is None else y * x_scale
  return y.astype(out_dtype)
