"""The definition of w4a16_matmul on 2-D operands."""

import jax.numpy as jnp

from quantlab_kernels import packing
from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(x, w, scale, zero, *, bits, group, signed, decode, precision):
  """Returns the float32 product, shape (M, N)."""
  q = w if bits is None else packing.unpack(w, bits, x.shape[1])
  w = decoded(q, bits, signed, decode)
  g = jnp.arange(w.shape[0]) // group
  w = w if zero is None else w - zero[g]
  w = w if scale is None else w * scale[g]
  return jnp.dot(x.astype(jnp.float32), w, precision=precision)


def decoded(q, bits, signed, decode):
  """Returns unpacked codes as float32, before zero point and scale."""
  if decode is not None:
    return decode(q).astype(jnp.float32)
  v = q.astype(jnp.float32)
  if bits is None or not signed:
    return v
  return jnp.where(v >= 2.0 ** (bits - 1), v - 2.0**bits, v)
