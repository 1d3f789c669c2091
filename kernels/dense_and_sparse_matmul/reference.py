"""The definition of the sparse part: a dense matrix, mostly zero."""

import jax.numpy as jnp
from jax import lax

from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(x, values, rows, columns, *, n):
  """Returns x s, shape (M, N)."""
  k = x.shape[1]
  outside = (rows < 0) | (rows >= k) | (columns < 0) | (columns >= n)
  s = jnp.zeros((k, n)).at[rows, columns].add(values, mode='drop')
  y = jnp.matmul(x, s, precision=lax.Precision.HIGHEST)
  return jnp.where(outside.any(), jnp.nan, y)
