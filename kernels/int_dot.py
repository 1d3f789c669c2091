"""Exact int8 products with int32 accumulators, as XLA runs them best.

Measured on XLA:CPU (jax 0.10.2), and the reason for each rule:
- a product with a single row or column leaves the int8 kernels and converts
  the whole weight first, 10 to 20 times slower: pad it to two;
- a weight past the caches is re-packed at full size: walking K in slices is
  2 to 3 times faster (4096 x 4096, one row: 4.7 ms whole, 1.7 ms in slices);
- int8 with int8 is faster than float32 nearly everywhere, int32 with int32
  is 10 times slower: never convert the operands.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8, Int32

SLICE = 512  # rows of K in one slice
SLICE_BEYOND = 2**23  # bytes of int8 weight that still run best whole


def on_one_cpu() -> bool:
  """Whether walking an axis in slices is safe and worth it.

  A loop over slices of an axis that is sharded would gather it, and what is
  sharded is not visible while tracing: with several devices the plain product
  is left to the partitioner.
  """
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def slice_rows(k: int, n: int, transpose_w: bool = False) -> int:
  """Returns the rows of one slice of K, or 0 to take the weight whole."""
  wide = k * n > SLICE_BEYOND and k >= 2 * SLICE
  return SLICE if wide and not transpose_w and on_one_cpu() else 0


def describe(m: int, k: int, n: int, transpose_w: bool = False) -> str:
  """Says in words what `int_dot` does with these shapes."""
  how = ['int8 x int8 -> int32 dot']
  if m == 1:
    how.append('one row padded to two')
  if n == 1:
    how.append('one column padded to two')
  rows = slice_rows(k, n, transpose_w)
  if rows:
    how.append(
      f'K in slices of {rows} (weight of {k * n / 2**20:.0f} MiB is past the '
      'caches)'
    )
  return ', '.join(how)


def int_dot(
  x: Int8[Array, 'm k'],
  w: Int8[Array, 'k n'],
  *,
  transpose_w: bool = False,
  rows: int | None = None,
) -> Int32[Array, 'm n']:
  """Returns the exact product x w.

  Args:
    x: int8 rows.
    w: int8 weight, (K, N), or (N, K) with `transpose_w` (contracting the last
      axes of both is as fast; transposing first is three times slower).
    transpose_w: whether w is (N, K).
    rows: rows of K in one slice, 0 for all; None decides by size.
  """
  m, k = x.shape
  n = w.shape[0] if transpose_w else w.shape[1]
  rows = slice_rows(k, n, transpose_w) if rows is None else rows
  if m == 1:
    x = jnp.pad(x, ((0, 1), (0, 0)))
  if n == 1:
    w = jnp.pad(w, ((0, 1), (0, 0)) if transpose_w else ((0, 0), (0, 1)))
  dims = (((1,), (1 if transpose_w else 0,)), ((), ()))

  def dot(a, b):
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)

  if not rows or rows >= k:
    acc = dot(x, w)
    return acc if acc.shape == (m, n) else acc[:m, :n]
  count = k // rows
  body = count * rows
  xs = jnp.swapaxes(x[:, :body].reshape(x.shape[0], count, rows), 0, 1)
  ws = w[:body].reshape(count, rows, w.shape[1])
  acc = dot(x[:, body:], w[body:])
  acc, _ = lax.scan(lambda a, s: (a + dot(*s), None), acc, (xs, ws))
  return acc[:m, :n]


def column_sums(
  w: Int8[Array, 'k n'], *, transpose_w: bool = False
) -> Int32[Array, '1 n']:
  """Returns the sums over K, as a product with ones (a reduction over the
  leading axis is eight times slower).
  """
  k = w.shape[1] if transpose_w else w.shape[0]
  return int_dot(jnp.ones((1, k), jnp.int8), w, transpose_w=transpose_w)


def centered_dot(
  x: Int8[Array, 'm k'],
  w: Int8[Array, 'k n'],
  x_zero: Int32[Array, ' m #1'] | None,
  w_zero: Int32[Array, '1 n'] | None,
  *,
  transpose_w: bool = False,
  terms: Int32[Array, ''] | int | None = None,
) -> Int[Array, 'm n']:
  """Returns (x - x_zero) (w - w_zero), exact in int32.

  Expanded to  x w - x_zero 1'w - (x 1) w_zero + k x_zero w_zero, so that the
  product stays in int8. Wrap-around of a term is harmless: the arithmetic is
  modulo 2^32 and the total fits. `terms` is k where the rest is zero padding.
  """
  m, k = x.shape
  if m == 1 and x_zero is not None:
    # The padding row of a single row may as well be the ones of column_sums.
    both = jnp.concatenate([x, jnp.ones_like(x)])
    acc, sums = jnp.split(int_dot(both, w, transpose_w=transpose_w), 2)
  else:
    acc = int_dot(x, w, transpose_w=transpose_w)
    sums = None
  if x_zero is not None:
    if sums is None:
      sums = column_sums(w, transpose_w=transpose_w)
    acc = acc - x_zero * sums
  if w_zero is not None:
    acc = acc - jnp.sum(x, 1, keepdims=True, dtype=jnp.int32) * w_zero
    if x_zero is not None:
      acc = acc + (k if terms is None else terms) * x_zero * w_zero
  return acc
