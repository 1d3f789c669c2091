"""int8_conv as int8 products or shifted sums, exact by construction.

XLA:CPU (jax 0.10.2) has no int8 convolution worth the name: it falls back to
scalar loops for few channels and for every depthwise convolution. Measured,
batch 64, milliseconds (best of 7, 2 cores):

  input, kernel                  float32  int8 conv  here
  32x32x16  3x3x16 (ResNet-20)     3.1      22.5      2.6
  16x16x32  3x3x32                 3.0       2.2      1.7
  8x8x64    3x3x64                 2.8       2.2      1.3
  12x12x64  1x1x128 (MobileNet)    1.5       1.1      0.6
  24x24x32  3x3 depthwise         30.6      37.6      0.4
  6x6x128   3x3 depthwise          7.8       9.4      0.2

So windows are gathered with one strided slice for each kernel position and
axis, and multiplied by int8 x int8 -> int32 dots; a depthwise convolution is
a sum of shifted int32 products. A float32 convolution on integers would be
exact below 1024 terms only, and slower.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from quantlab_kernels import int_dot
from quantlab_kernels.int8_matmul.reference import rescale
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401

MOST_TAPS = 64  # kernel positions a sum of shifted products is unrolled over
WHOLE_BYTES = 2**26  # bytes of gathered windows past which images are walked
WALK_BYTES = 2**24


def out_sizes(x_shape, w_shape, strides, pads, lhs_dilation, rhs_dilation):
  """Returns the spatial shape of the result."""
  spatial = zip(
    x_shape[1:-1],
    w_shape[:-2],
    strides,
    pads,
    lhs_dilation,
    rhs_dilation,
    strict=True,
  )
  sizes = []
  for length, k, s, (low, high), ld, rd in spatial:
    length = max((length - 1) * ld + 1, 0) + low + high
    sizes.append(max((length - (k - 1) * rd - 1) // s + 1, 0))
  return tuple(sizes)


def _shifted(x_shape, w_shape, groups) -> bool:
  taps = math.prod(w_shape[:-2])
  return groups == x_shape[-1] and groups > 1 and taps <= MOST_TAPS


def _images(x_shape, w_shape, out) -> int:
  """Returns how many images to gather windows of at a time."""
  each = math.prod(out) * math.prod(w_shape[:-2]) * x_shape[-1]
  batch = x_shape[0]
  if not int_dot.on_one_cpu() or each * batch <= WHOLE_BYTES:
    return batch
  fit = [n for n in range(1, batch + 1) if batch % n == 0]
  return max([n for n in fit if n * each <= WALK_BYTES], default=1)


def route(x, w, *rest, strides, pads, lhs_dilation, rhs_dilation, groups, **_):
  """Says how it runs."""
  del rest
  taps = math.prod(w.shape[:-2])
  if _shifted(x.shape, w.shape, groups):
    return f'depthwise: an int32 sum of {taps} shifted products'
  out = out_sizes(x.shape, w.shape, strides, pads, lhs_dilation, rhs_dilation)
  images = _images(x.shape, w.shape, out)
  m, k = images * math.prod(out), taps * w.shape[-2]
  walk = '' if images == x.shape[0] else f', {images} image(s) at a time'
  if groups > 1:
    return f'{groups} groups of windows, one batched int8 dot{walk}'
  n = w.shape[-1]
  return f'windows of {k} as rows: {int_dot.describe(m, k, n)}{walk}'


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
  out = out_sizes(x.shape, w.shape, strides, pads, lhs_dilation, rhs_dilation)
  if 0 in (x.shape[0], *out, *w.shape):
    acc = jnp.zeros((x.shape[0], *out, w.shape[-1]), jnp.int32)
    return rescale(acc, x_scale, w_scale, out_dtype)
  x = _pad(x, x_zero, pads, lhs_dilation)
  sums = w_zero is not None  # window sums are needed
  if _shifted(x.shape, w.shape, groups):
    acc, window = _shifted_sum(x, w, out, strides, rhs_dilation, sums)
  else:

    def product(x):
      patches = _windows(x, w.shape[:-2], out, strides, rhs_dilation)
      return _grouped_dot(patches, w, groups, sums)

    acc, window = _walk(product, x, _images(x.shape, w.shape, out))
  if x_zero is not None:
    each = jnp.sum(w, axis=range(w.ndim - 1), dtype=jnp.int32)
    acc = acc - x_zero * each
  if w_zero is not None:
    acc = acc - jnp.repeat(window, w.shape[-1] // groups, -1) * w_zero
    if x_zero is not None:
      acc = acc + math.prod(w.shape[:-1]) * x_zero * w_zero
  return rescale(acc, x_scale, w_scale, out_dtype)


def _pad(x, x_zero, pads, lhs_dilation):
  """Pads and dilates with the code of zero."""
  config = [
    (0, 0, 0),
    *((a, b, d - 1) for (a, b), d in zip(pads, lhs_dilation, strict=True)),
    (0, 0, 0),
  ]
  if not any(any(c) for c in config):
    return x
  if x_zero is None or x_zero.size == 1:
    zero = 0 if x_zero is None else x_zero.reshape(())
    return lax.pad(x, jnp.asarray(zero).astype(jnp.int8), config)
  inside = lax.pad(jnp.ones(x.shape, bool), False, config)
  padded = lax.pad(x, jnp.int8(0), config)
  return jnp.where(inside, padded, x_zero.astype(jnp.int8))


def _slice(x, axis, start, size, stride):
  return lax.slice_in_dim(
    x, start, start + (size - 1) * stride + 1, stride, axis
  )


def _windows(x, kernel, out, strides, dilation):
  """Gathers (batch, *out, *kernel, C), one axis after the other."""
  for i, (k, o, s, d) in enumerate(
    zip(kernel, out, strides, dilation, strict=True)
  ):
    x = jnp.stack([_slice(x, 1 + i, t * d, o, s) for t in range(k)], axis=-2)
  return x


def _grouped_dot(patches, w, groups, sums):
  """Multiplies windows (batch, *out, *kernel, C) by the kernel.

  Returns:
    int32 (batch, *out, O), and window sums (batch, *out, groups) or None.
  """
  out, c, features = patches.shape[: w.ndim - 1], patches.shape[-1], w.shape[-1]
  m, taps, ci = math.prod(out), math.prod(w.shape[:-2]), c // groups
  if groups == 1:
    rows = patches.reshape(m, taps * c)
    acc = int_dot.int_dot(rows, w.reshape(taps * c, features))
    window = jnp.sum(rows, -1, dtype=jnp.int32) if sums else None
  else:
    rows = patches.reshape(m, taps, groups, ci)
    window = jnp.sum(rows, (1, 3), dtype=jnp.int32) if sums else None
    rows = jnp.moveaxis(rows, 2, 0).reshape(groups, m, taps * ci)
    w = jnp.moveaxis(w.reshape(taps, ci, groups, -1), 2, 0)
    acc = jax.vmap(int_dot.int_dot)(rows, w.reshape(groups, taps * ci, -1))
    acc = jnp.moveaxis(acc, 0, 1)
  acc = acc.reshape(*out, features)
  return acc, None if window is None else window.reshape(*out, groups)


def _walk(product, x, images):
  """Applies `product` to `images` at a time."""
  batch = x.shape[0]
  if images == batch:
    return product(x)
  y = lax.map(product, x.reshape(batch // images, images, *x.shape[1:]))
  return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), y)


def _shifted_sum(x, w, out, strides, dilation, sums):
  """Depthwise: sums shifted inputs times one kernel position each."""
  c = x.shape[-1]
  parts, weights = [], []
  for taps in itertools.product(*(range(k) for k in w.shape[:-2])):
    part = x
    for i, t in enumerate(taps):
      part = _slice(part, 1 + i, t * dilation[i], out[i], strides[i])
    parts.append(part.astype(jnp.int32))
    weights.append(w[taps].reshape(c, -1).astype(jnp.int32))
  acc = (
    sum(p[..., None] * v for p, v in zip(parts[1:], weights[1:], strict=True))
    + parts[0][..., None] * weights[0]
  )
  window = sum(parts[1:], parts[0]) if sums else None
  return acc.reshape(*acc.shape[:-2], -1), window
