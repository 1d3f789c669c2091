"""The public int8 convolution: layouts, checks, dispatch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from quantlab_kernels import registry, shapes

_OP = registry.Op('int8_conv')


def int8_conv(
  xq: Int8[Array, '...'],
  wq: Int8[Array, '...'],
  *,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
  feature_group_count: int = 1,
  x_scale: jax.typing.ArrayLike | None = None,
  w_scale: jax.typing.ArrayLike | None = None,
  x_zero: jax.typing.ArrayLike | None = None,
  w_zero: jax.typing.ArrayLike | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> Float[Array, '...'] | Int[Array, '...']:
  """Convolves int8 codes, exactly, then applies the scales.

    I[b, p, o] = sum over the window of (xq - x_zero[b]) (wq - w_zero[o]),
    y[b, p, o] = x_scale[b] (w_scale[o] I[b, p, o])

  I is exact in int32, the rest is float32. Padding (and the gaps of
  `lhs_dilation`) are the value zero, hence the code x_zero.

  Args:
    xq: int8 activations.
    wq: int8 kernel.
    window_strides: as in `jax.lax.conv_general_dilated`, like the following.
    padding: 'SAME', 'SAME_LOWER', 'VALID' or (low, high) for each axis.
    lhs_dilation: gaps of a transposed convolution.
    rhs_dilation: gaps of a dilated kernel.
    dimension_numbers: layouts, for example ('NHWC', 'HWIO', 'NHWC'); None is
      batch and features first.
    feature_group_count: groups of input features; as many as there are input
      features is a depthwise convolution.
    x_scale: scale of xq: one, or one for each image.
    w_scale: scale of wq: one, or one for each output feature.
    x_zero: integer zero points of xq, within int8, likewise.
    w_zero: integer zero points of wq, within int8, likewise.
    out_dtype: dtype of y; int32 returns I, and takes no scales.
    implementation: None for the preferred one, or its name.

  Returns:
    y in the layout of `dimension_numbers`. A NaN or infinite scale gives NaN
    or infinity. Scales may be differentiated; codes carry no gradient.

  References:
    Jacob et al., arXiv:1712.05877, section 2.
  """
  xq, wq = jnp.asarray(xq), jnp.asarray(wq)
  shapes.require_dtype('xq', xq, jnp.int8)
  shapes.require_dtype('wq', wq, jnp.int8)
  rank = xq.ndim - 2
  dims = lax.conv_dimension_numbers(xq.shape, wq.shape, dimension_numbers)
  x = jnp.transpose(
    xq, (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1])
  )
  w = jnp.transpose(
    wq, (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0])
  )
  strides = _per_axis('window_strides', window_strides, rank)
  lhs_dilation = _per_axis('lhs_dilation', lhs_dilation, rank)
  rhs_dilation = _per_axis('rhs_dilation', rhs_dilation, rank)
  _require_groups(x.shape[-1], w.shape, feature_group_count)
  shapes.require_no_overflow(
    _OP.name,
    math.prod(w.shape[:-1]),
    128 if x_zero is None else 255,
    128 if w_zero is None else 255,
  )
  dtype = jnp.dtype(out_dtype)
  shapes.require_output(dtype, x_scale, w_scale)
  batch, features = x.shape[0], w.shape[-1]
  y = _OP(
    implementation,
    x,
    w,
    shapes.as_scale(
      _along('x_scale', x_scale, batch, (-1, *(1,) * (rank + 1)))
    ),
    shapes.as_scale(_along('w_scale', w_scale, features, (-1,))),
    shapes.as_zero(
      'x_zero', _along('x_zero', x_zero, batch, (-1, *(1,) * (rank + 1)))
    ),
    shapes.as_zero('w_zero', _along('w_zero', w_zero, features, (-1,))),
    strides=strides,
    pads=_pads(padding, x.shape, w.shape, strides, lhs_dilation, rhs_dilation),
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    groups=feature_group_count,
    out_dtype=dtype,
  )
  out = (dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1])
  return jnp.transpose(y, [out.index(i) for i in range(rank + 2)])


def _per_axis(name, value, rank) -> tuple[int, ...]:
  value = (1,) * rank if value is None else tuple(int(v) for v in value)
  if len(value) != rank or min(value, default=1) < 1:
    raise ValueError(
      f'{name}={value} must be {rank} positive integers, one for each '
      'spatial axis'
    )
  return value


def _pads(padding, x_shape, w_shape, strides, lhs_dilation, rhs_dilation):
  """Returns explicit (low, high) pairs, negative ones crop."""
  if not isinstance(padding, str):
    pads = tuple((int(low), int(high)) for low, high in padding)
    if len(pads) != len(strides):
      raise ValueError(f'{padding=} must be {len(strides)} (low, high) pairs')
    return pads
  if any(d != 1 for d in lhs_dilation):
    raise ValueError(f'{padding=} needs lhs_dilation 1; give explicit pairs')
  windows = [
    (k - 1) * d + 1 for k, d in zip(w_shape[:-2], rhs_dilation, strict=True)
  ]
  return tuple(lax.padtype_to_pads(x_shape[1:-1], windows, strides, padding))


def _require_groups(c, w_shape, groups):
  *_, per_group, features = w_shape
  if groups < 1 or c != per_group * groups or features % groups:
    raise ValueError(
      f'feature_group_count={groups} does not fit {c} input features, a '
      f'kernel of {per_group} input and {features} output features: expected '
      f'input features = {per_group} x groups, and groups dividing {features}'
    )


def _along(name, s, size, shape):
  """Reshapes a scale of one entry, or of one for each index of an axis."""
  if s is None:
    return None
  s = jnp.asarray(s)
  if s.size not in (1, size):
    raise ValueError(f'{name} has shape {s.shape}, expected 1 entry or {size}')
  return s.reshape(shape)
