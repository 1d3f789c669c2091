"""w4a16_matmul through XLA's float product.

XLA writes a decoded weight out in float32 before it multiplies, which costs
ten times the product itself at decode. Measured on XLA:CPU (jax 0.10.2),
4096 x 4096, 4 bits in groups of 128, milliseconds at 1 / 16 / 256 rows: float32
product 3.0 / 10 / 84; decoded whole 30 / 37 / 126; codes unpacked to bytes,
then decoded slice by slice 5.3 / 11 / 92; unpacked in the loop too
23 / 28 / 110. Below the size of the caches whole is as fast.
"""

import functools

import jax.numpy as jnp
from jax import lax

from quantlab_kernels import int_dot, packing, shapes
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401
from quantlab_kernels.w4a16_matmul.reference import decoded

SLICE = 128  # least rows of K decoded at a time


def slice_rows(k: int, n: int, group: int) -> int:
  """Returns the rows of K decoded at a time, or 0 to decode all at once."""
  rows = 4 * SLICE if group >= k else -(-SLICE // group) * group
  wide = k * n > int_dot.SLICE_BEYOND and rows < k
  return rows if wide and int_dot.on_one_cpu() else 0


def route(x, w, scale, zero, *, bits, group, **options):
  """Says how it runs."""
  del options
  if bits is None and scale is None and zero is None:
    return 'one float dot with float32 sums'
  k, n = x.shape[1], w.shape[1]
  rows = slice_rows(k, n, group)
  if rows:
    return (
      f'a loop of float32 dots, {rows} rows of K decoded at a time (decoded '
      f'weight of {4 * k * n / 2**20:.0f} MiB is past the caches)'
    )
  return 'weight decoded whole, one float32 dot'


def run(x, w, scale, zero, *, bits, group, signed, decode, precision):
  """Returns the float32 product, shape (M, N)."""
  k, n = x.shape[1], w.shape[1]
  if bits is None and scale is None and zero is None:
    return _dot(x, w, precision)
  x = x.astype(jnp.float32)
  q = w if bits is None else packing.unpack(w, bits, k)

  def product(x, q, s, z, group):
    w = decoded(q, bits, signed, decode)
    w = w if z is None else w - _spread(z, group, w.shape[0])
    w = w if s is None else w * _spread(s, group, w.shape[0])
    return _dot(x, w, precision)

  rows = slice_rows(k, n, group)
  if not rows:
    return product(x, q, scale, zero, group)
  loops = -(-k // rows)
  group = min(group, rows)
  parts = (
    jnp.swapaxes(shapes.split_groups(x, rows, loops), 0, 1),
    shapes.split_group_rows(q, rows, loops),
    _by_slice(scale, loops, rows // group),
    _by_slice(zero, loops, rows // group),
  )
  terms = functools.partial(product, group=group)
  return shapes.summed(terms, parts, (x.shape[0], n))


def _dot(x, w, precision):
  """One product with float32 sums; a single row of 16-bit floats as two."""
  if x.dtype != w.dtype:
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  m = x.shape[0]
  if m == 1 and x.dtype == jnp.bfloat16:
    x = jnp.pad(x, ((0, 1), (0, 0)))
  dims = (((1,), (0,)), ((), ()))
  y = lax.dot_general(
    x, w, dims, precision=precision, preferred_element_type=jnp.float32
  )
  return y[:m]


def _spread(s, group, k):
  """Repeats each row of (G, N) `group` times, up to k rows."""
  if s.shape[0] == 1:
    return s
  g, n = s.shape
  s = jnp.broadcast_to(s[:, None], (g, group, n))
  return s.reshape(g * group, n)[:k]


def _by_slice(s, loops, per):
  """Reshapes (G, N) to (loops, per, N); one group of all of K is repeated."""
  if s is None:
    return None
  g, n = s.shape
  if g == 1:
    return jnp.broadcast_to(s, (loops, 1, n))
  s = jnp.pad(s, ((0, loops * per - g), (0, 0)))
  return s.reshape(loops, per, n)
