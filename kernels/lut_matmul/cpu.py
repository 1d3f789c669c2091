"""lut_matmul through the C++ kernels: a table is one byte shuffle."""

import jax.numpy as jnp

from quantlab_kernels.cpu import product
from quantlab_kernels.lut_matmul import xla


def refuses(x, p, *rest, bits, group, **options) -> str | None:
  """Says why it cannot run."""
  del rest, options
  return product.refuses_packed(x, p, bits, group)


def route(x, p, table, scale, x_scale, x_zero, *, bits, **options) -> str:
  """Says how it runs."""
  del table, scale, x_scale, options
  return product.route(x, p, bits, x_zero)


def run(x, p, table, scale, x_scale, x_zero, *, bits, group, out_dtype):
  """Returns the scaled product, shape (M, N)."""

  def otherwise(x, p, scale, zero, x_scale, x_zero, table):
    del zero
    return xla.run(
      *(x, p, table[0], scale, x_scale, x_zero),
      bits=bits,
      group=group,
      out_dtype=jnp.dtype('float32'),
    )

  y = product.multiply(
    *(x, p, scale, None, x_scale, x_zero, table),
    bits=bits,
    group=group,
    signed=False,
    otherwise=otherwise,
  )
  return y.astype(out_dtype)
