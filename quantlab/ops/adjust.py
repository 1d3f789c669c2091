"""What an equivalent transform leaves to be done at run time.

State of a site, where nothing could take the transform in:

  transform   of the input, by channel: x' = (x - shift) gain, then signs, then
              the Kronecker product of `rotation`'s matrices on the last
              channels; any of them may be absent.
  bias        added to the product, by output channel.
  adapter     (x a) b scale added to the product, of low rank; see `ql.lora`.

The weight holds the inverse, so that the product is what it was; not so of an
adapter, which changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import quantlab_kernels as kernels
from quantlab.core import QTensor
from quantlab.ops.dims import ConvDims, Dims, DotDims

TRANSFORM = ('shift', 'gain', 'signs', 'rotation')


def adjust_input(
  x: jax.Array, dims: Dims, transform: Mapping[str, Any]
) -> jax.Array:
  """The input as the site's weight expects it; shape and dtype are kept.

  Args:
    x: the activation, in the axes of the traced product.
    dims: roles of the product's axes.
    transform: see the module; vectors (batch..., C) with C the channels of a
      convolution, else the flattened contraction in storage order.

  Raises:
    ValueError: a key that is not known.
    TypeError: a lookup or a ragged product.
  """
  unknown = sorted(set(transform) - set(TRANSFORM))
  if unknown:
    raise ValueError(f'unknown input transforms {unknown}; known: {TRANSFORM}')
  if not transform:
    return x
  rows, restore = _channels_last(x, dims)
  y = rows.astype(jnp.float32)
  if 'shift' in transform:
    y = y - transform['shift'][..., None, :]
  if 'gain' in transform:
    y = y * transform['gain'][..., None, :]
  if 'signs' in transform:
    y = y * transform['signs'][..., None, :]
  if 'rotation' in transform:
    y = kernels.hadamard(y, transform['rotation'])
  return restore(y).astype(x.dtype)


def add_bias(out: jax.Array, dims: Dims, bias: jax.Array) -> jax.Array:
  """A product with a bias added to each output channel.

  Args:
    out: the product.
    dims: roles of its axes.
    bias: (batch..., N), N in storage order.
  """
  bias = bias.astype(out.dtype)
  if isinstance(dims, ConvDims):
    shape = [1] * out.ndim
    shape[dims.out_spec[1]] = -1
    return out + bias.reshape(shape)
  if not isinstance(dims, DotDims):
    raise TypeError('a lookup or a ragged product takes no bias')
  return out + dims.out_vector(bias, out.shape)


def add_adapter(
  out: jax.Array,
  x: jax.Array,
  dims: Dims,
  shape: Sequence[int],
  adapter: Mapping[str, Any],
) -> jax.Array:
  """A product with that of two thin matrices added.

  Args:
    out: the product.
    x: the activation, in the axes of the traced product.
    dims: roles of the product's axes.
    shape: of the weight operand.
    adapter: 'a' (batch..., K, r), 'b' (batch..., r, N), arrays or codes, and
      'scale' (batch..., 1, 1), a constant to the gradient.
  """
  if not isinstance(dims, DotDims):
    raise TypeError('a convolution, lookup or ragged product takes no adapter')
  a, b = (
    m.dequantize() if isinstance(m, QTensor) else m
    for m in (adapter['a'], adapter['b'])
  )
  y = (dims.x_matrix(x) @ a) @ b * jax.lax.stop_gradient(adapter['scale'])
  return out + dims.out_restore(y, x.shape, shape).astype(out.dtype)


def _channels_last(x, dims):
  """The operand as (..., rows, C), and the way back."""
  if isinstance(dims, ConvDims):
    axis = dims.lhs_spec[1]
    return jnp.moveaxis(x, axis, -1), lambda y: jnp.moveaxis(y, -1, axis)
  if isinstance(dims, DotDims):
    return dims.x_matrix(x), lambda y: dims.x_restore(y, x.shape)
  raise TypeError('a lookup or a ragged product takes no input transform')
