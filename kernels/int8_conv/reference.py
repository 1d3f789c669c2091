"""The definition of int8_conv on (batch, *spatial, features) operands."""

import jax.numpy as jnp
from jax import lax

from quantlab_kernels.int8_matmul.reference import rescale
from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(
  x,
  w,
  x_scale,
  w_scale,
  x_zero,
  w_zero,
  *,
  strides,
  pads,
  lhs_dilation,
  rhs_dilation,
  groups,
  out_dtype,
):
  """Returns the scaled convolution, shape (batch, *spatial, O)."""
  x, w = x.astype(jnp.int32), w.astype(jnp.int32)
  x = x if x_zero is None else x - x_zero
  w = w if w_zero is None else w - w_zero
  axes = tuple(range(1, x.ndim - 1))
  last = x.ndim - 1
  dims = lax.ConvDimensionNumbers(
    (0, last, *axes), (last, last - 1, *(a - 1 for a in axes)), (0, last, *axes)
  )
  acc = lax.conv_general_dilated(
    x,
    w,
    strides,
    pads,
    lhs_dilation,
    rhs_dilation,
    dims,
    feature_group_count=groups,
    preferred_element_type=jnp.int32,
  )
  return rescale(acc, x_scale, w_scale, out_dtype)
