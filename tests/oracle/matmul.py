"""Low-bit products in NumPy: int64 sums, float64 scales, plain loops."""

import itertools

import numpy as np


def int_product(x, w, x_zero=0, w_zero=0):
  """Sum over k of (x - x_zero) (w - w_zero), in int64."""
  x = np.asarray(x, np.int64) - np.asarray(x_zero, np.int64)
  w = np.asarray(w, np.int64) - np.asarray(w_zero, np.int64)
  return np.matmul(x, w)


def grouped_product(x, w, scale, group, zero=None, x_scale=1.0, x_zero=0):
  """Sum over groups of x_scale scale (int64 partial sum), in float64.

  x (M, K) and w (K, N) are integers, scale and zero (G, N), x_scale and
  x_zero broadcast to (M, G).
  """
  x, w = np.asarray(x, np.int64), np.asarray(w, np.int64)
  scale = np.asarray(scale, np.float64)
  m, k = x.shape
  groups = scale.shape[0]
  x_scale = np.broadcast_to(np.asarray(x_scale, np.float64), (m, groups))
  x_zero = np.broadcast_to(np.asarray(x_zero, np.int64), (m, groups))
  y = np.zeros((m, w.shape[1]))
  for g in range(groups):
    part = slice(g * group, min((g + 1) * group, k))
    z = 0 if zero is None else np.asarray(zero, np.int64)[g]
    acc = int_product(x[:, part], w[part], x_zero[:, g : g + 1], z)
    y += x_scale[:, g : g + 1] * scale[g] * acc
  return y


def dequantize(values, scale, group, zero=None):
  """(values - zero) scale by group along axis 0, in float64."""
  values = np.asarray(values, np.float64)
  out = np.empty_like(values)
  for i in range(values.shape[0]):
    z = 0.0 if zero is None else np.asarray(zero, np.float64)[i // group]
    out[i] = (values[i] - z) * np.asarray(scale, np.float64)[i // group]
  return out


def signed_value(code, bits):
  """Two's complement of the lowest bits."""
  code = np.asarray(code, np.int64) % 2**bits
  return np.where(code < 2 ** (bits - 1), code, code - 2**bits)


def conv(
  x,
  w,
  strides,
  pads,
  *,
  lhs_dilation=None,
  rhs_dilation=None,
  groups=1,
  x_zero=0,
  w_zero=0,
):
  """int64 convolution of (batch, *spatial, C) by (*kernel, C/groups, O).

  x_zero is a number or one for each image, w_zero one for each output.
  """
  x, w = np.asarray(x, np.int64), np.asarray(w, np.int64)
  rank = x.ndim - 2
  x_zero = np.asarray(x_zero, np.int64).reshape(-1, *(1,) * (rank + 1))
  x, w = x - x_zero, w - np.asarray(w_zero, np.int64)
  lhs_dilation = lhs_dilation or (1,) * rank
  rhs_dilation = rhs_dilation or (1,) * rank
  spaced = [
    (n - 1) * d + 1 for n, d in zip(x.shape[1:-1], lhs_dilation, strict=True)
  ]
  wide = np.zeros((x.shape[0], *spaced, x.shape[-1]), np.int64)
  wide[(slice(None), *(slice(None, None, d) for d in lhs_dilation))] = x
  wide = np.pad(wide, [(0, 0), *(np.maximum(p, 0) for p in pads), (0, 0)])
  crop = [
    slice(max(-a, 0), n - max(-b, 0))
    for (a, b), n in zip(pads, wide.shape[1:-1], strict=True)
  ]
  wide = wide[(slice(None), *crop)]
  kernel = w.shape[:-2]
  out = [
    (n - (k - 1) * d - 1) // s + 1
    for n, k, d, s in zip(
      wide.shape[1:-1], kernel, rhs_dilation, strides, strict=True
    )
  ]
  ci, per = w.shape[-2], w.shape[-1] // groups
  y = np.zeros((x.shape[0], *out, w.shape[-1]), np.int64)
  for place in itertools.product(*(range(o) for o in out)):
    for tap in itertools.product(*(range(k) for k in kernel)):
      at = tuple(
        p * s + t * d
        for p, s, t, d in zip(place, strides, tap, rhs_dilation, strict=True)
      )
      pixel = wide[(slice(None), *at)]
      for g in range(groups):
        o = slice(g * per, (g + 1) * per)
        y[(slice(None), *place, o)] += (
          pixel[:, g * ci : (g + 1) * ci] @ w[tap][:, o]
        )
  return y


def quantize(x, bits=8, axes=(-1,), symmetric=True, narrow=False):
  """(codes, scale, zero) in float32: ties to even, x / s as x (1 / s)."""
  one, tiny = np.float32(1), np.float32(2.0**-126)
  x = np.asarray(x, np.float32)
  qmax = 2 ** (bits - 1) - 1
  qmin = -qmax if narrow else -qmax - 1
  levels = np.float32(qmax if symmetric else qmax - qmin)
  low = np.minimum(x.min(axes, keepdims=True), 0)
  high = np.maximum(x.max(axes, keepdims=True), 0)
  span = np.abs(x).max(axes, keepdims=True) if symmetric else high - low
  scale = np.maximum(span * (one / levels), tiny)
  zero = np.zeros_like(scale)
  if not symmetric:
    zero = np.clip(np.rint(-low * (one / scale)) + qmin, qmin, qmax)
  q = np.clip(np.rint(x * (one / scale)) + zero, qmin, qmax)
  return q.astype(np.int8), scale, zero.astype(np.int32)
