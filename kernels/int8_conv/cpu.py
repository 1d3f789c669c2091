"""int8_conv through the C++ kernels."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantlab_kernels import shapes
from quantlab_kernels.cpu import library, product
from quantlab_kernels.int8_conv import xla

# A group that is smaller leaves most of a vector empty.
LEAST_INPUTS, LEAST_OUTPUTS = 4, 8


class Window(NamedTuple):
  """What is static of a convolution; as entry.cc reads it."""

  height: int
  width: int
  channels: int
  kernel_height: int
  kernel_width: int
  groups: int
  stride_h: int
  stride_w: int
  dilation_h: int
  dilation_w: int
  top: int
  left: int
  out_h: int
  out_w: int


def _is_depthwise(x, w, groups) -> bool:
  return groups > 1 and groups == x.shape[-1] == w.shape[-1]


def refuses(
  x, w, *rest, strides, pads, lhs_dilation, rhs_dilation, groups, out_dtype
) -> str | None:
  """Says why it cannot run."""
  del rest, out_dtype
  rank = x.ndim - 2
  if rank not in (1, 2):
    return f'the kernels convolve along one axis or two, not {rank}'
  if any(d != 1 for d in lhs_dilation):
    return f'the kernels take no {lhs_dilation=}'
  inputs, outputs = w.shape[-2], w.shape[-1] // groups
  small = inputs < LEAST_INPUTS or outputs < LEAST_OUTPUTS
  if groups > 1 and small and not _is_depthwise(x, w, groups):
    return (
      f'groups of {inputs} input and {outputs} output features are narrower '
      f'than {LEAST_INPUTS} and {LEAST_OUTPUTS}'
    )
  if 0 in xla.out_sizes(
    x.shape, w.shape, strides, pads, lhs_dilation, rhs_dilation
  ):
    return 'the output is empty'
  return product.refuses(x, w)


def route(x, w, *rest, groups, **options) -> str:
  """Says how it runs."""
  del rest, options
  isa = library.isa()
  if _is_depthwise(x, w, groups):
    return f'C++ on {isa}, depthwise, channels and pixels side by side'
  each = '' if groups == 1 else f', {groups} groups one after the other'
  return (
    f'C++ on {isa}, windows of {math.prod(w.shape[:-1])} read in place{each}'
  )


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
  given = {
    'strides': strides,
    'pads': pads,
    'lhs_dilation': lhs_dilation,
    'rhs_dilation': rhs_dilation,
  }
  out = xla.out_sizes(x.shape, w.shape, **given)
  one = (1,) * (2 - len(strides))  # along one axis: a single row
  sizes = (*one, *x.shape[1:], *one, *w.shape[:-2], groups)
  steps = (*one, *strides, *one, *rhs_dilation)
  begins = (*(0,) * len(one), *(low for low, _ in pads))
  window = Window._make((*sizes, *steps, *begins, *one, *out))
  batch, features = x.shape[0], w.shape[-1]
  floats = jnp.issubdtype(out_dtype, jnp.floating)
  call = _mapped(window, 'float32' if floats else 'int32', library.isa())

  def fast(x, w, scale, zero, x_scale, x_zero, table):
    del table
    operands = (x, w, scale, zero, x_scale, x_zero)
    return call(*jax.tree.map(lambda a: a[None], operands))[0]

  def otherwise(rows, kernel, scale, zero, x_scale, x_zero, table):
    del table
    image = (batch, *(1,) * (x.ndim - 1))
    y = xla.run(
      rows.reshape(x.shape),
      kernel.reshape(w.shape),
      None if x_scale is None else x_scale.reshape(image),
      None if scale is None else scale[0],
      None if x_zero is None else x_zero.reshape(image),
      None if zero is None else zero[0],
      **given,
      groups=groups,
      out_dtype=jnp.dtype('float32'),
    )
    return y.reshape(batch, -1)

  operands = (
    x.reshape(batch, -1),
    w.reshape(-1, features),
    _entries(w_scale, (1, features)),
    _entries(w_zero, (1, features)),
    _entries(x_scale, (batch, 1)),
    _entries(x_zero, (batch, 1)),
    None,
  )
  f = product.differentiable(fast, otherwise) if floats else fast
  y = f(*operands)
  return y.reshape(batch, *out, features).astype(out_dtype)


def _entries(s, shape):
  """One entry, or one for each row or column, as (rows, columns)."""
  if s is None:
    return None
  flat = s.reshape(-1)
  return jnp.broadcast_to(flat.reshape(shape) if flat.size > 1 else flat, shape)


@functools.cache
def _mapped(window: Window, out: str, isa: str):
  call = functools.partial(_call, window, out, isa)
  return product.mapped(call, rows=(0, 4, 5))


def _call(window: Window, out: str, isa: str, *operands):
  """Calls the kernels on (x, w, scale, zero, x_scale, x_zero)."""
  x, w = operands[:2]
  batch = max(a.shape[0] for a in operands if a is not None)
  size = window.out_h * window.out_w * w.shape[2]
  dtypes = ('int8', 'int8', *('float32', 'int32') * 2)
  given = [
    jnp.zeros((0, 0, 0), d) if a is None else a
    for a, d in zip(operands, dtypes, strict=True)
  ]
  shape = jax.ShapeDtypeStruct((batch, x.shape[1], size), jnp.dtype(out))
  y = jax.ffi.ffi_call(library.CONVOLVE, shape)(
    *given,
    window=np.array(window, np.int64),
    isa=np.int64(library.ISAS[isa]),
  )
  return shapes.varying(y, given)
