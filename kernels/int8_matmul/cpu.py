"""int8_matmul through the C++ kernels."""

import jax.numpy as jnp

from quantlab_kernels.cpu import product
from quantlab_kernels.int8_matmul import xla


def refuses(x, w, *rest, transpose_w, out_dtype) -> str | None:
  """Says why it cannot run."""
  del rest, out_dtype
  if transpose_w:
    return 'the kernels read the weight as (K, N)'
  return product.refuses(x, w)


def route(x, w, x_scale, w_scale, x_zero, w_zero, **options) -> str:
  """Says how it runs."""
  del x_scale, w_scale, w_zero, options
  return product.route(x, w, 8, x_zero)


def run(x, w, x_scale, w_scale, x_zero, w_zero, *, transpose_w, out_dtype):
  """Returns the scaled product, shape (M, N)."""

  def otherwise(x, w, w_scale, w_zero, x_scale, x_zero, table):
    del table
    return xla.run(
      *(x, w, x_scale, w_scale, x_zero, w_zero),
      transpose_w=transpose_w,
      out_dtype=jnp.dtype('float32'),
    )

  floats = jnp.issubdtype(out_dtype, jnp.floating)
  y = product.multiply(
    *(x, w, w_scale, w_zero, x_scale, x_zero),
    bits=8,
    group=x.shape[1],
    signed=True,
    otherwise=otherwise if floats else None,
  )
  return y.astype(out_dtype)
