"""lut_matmul through XLA: codes looked up, then products of int8 by group."""

import jax.numpy as jnp
from jax import lax

from quantlab_kernels import packing, panels
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401
from quantlab_kernels.w4a8_matmul import xla


def route(x, p, table, scale, x_scale, x_zero, *, bits, **options) -> str:
  """Says how it runs."""
  del table, options
  how = xla.route(x, p, scale, None, x_scale, x_zero, bits=8)
  return f'{bits}-bit codes looked up in the table, then: {how}'


def run(x, p, table, scale, x_scale, x_zero, *, bits, group, out_dtype):
  """Returns the scaled product, shape (M, N)."""
  codes = packing.unpack(panels.plain_bytes(p), bits, x.shape[1])
  w = lax.bitcast_convert_type(table, jnp.uint8)[codes.astype(jnp.int32)]
  return xla.run(
    *(x, w, scale, None, x_scale, x_zero),
    bits=8,
    group=group,
    signed=True,
    out_dtype=out_dtype,
  )
