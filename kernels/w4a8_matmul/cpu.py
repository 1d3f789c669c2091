"""w4a8_matmul through the C++ kernels."""

import jax.numpy as jnp

from quantlab_kernels.cpu import product
from quantlab_kernels.w4a8_matmul import xla


def refuses(x, p, *rest, bits, group, **options) -> str | None:
  """Says why it cannot run."""
  del rest, options
  return product.refuses_packed(x, p, bits, group)


def route(x, p, scale, zero, x_scale, x_zero, *, bits, **options) -> str:
  """Says how it runs."""
  del scale, zero, x_scale, options
  return product.route(x, p, bits, x_zero)


def run(x, p, scale, zero, x_scale, x_zero, *, bits, group, signed, out_dtype):
  """Returns the scaled product, shape (M, N)."""

  def otherwise(x, p, scale, zero, x_scale, x_zero, table):
    del table
    return xla.run(
      *(x, p, scale, zero, x_scale, x_zero),
      bits=bits,
      group=group,
      signed=signed,
      out_dtype=jnp.dtype('float32'),
    )

  y = product.multiply(
    *(x, p, scale, zero, x_scale, x_zero),
    bits=bits,
    group=group,
    signed=signed,
    otherwise=otherwise,
  )
  return y.astype(out_dtype)
