"""The public dense-and-sparse product: checks and dispatch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from quantlab_kernels import registry, shapes
from quantlab_kernels.w4a16_matmul import w4a16_matmul

_OP = registry.Op('dense_and_sparse_matmul')


def dense_and_sparse_matmul(
  x: Float[Array, '*m k'],
  w: Float[Array, 'k n'] | UInt8[Array, 'kp n'],
  values: Float[Array, ' nnz'],
  rows: Int[Array, ' nnz'],
  columns: Int[Array, ' nnz'],
  scale: jax.typing.ArrayLike | None = None,
  *,
  out_dtype: jax.typing.DTypeLike | None = None,
  implementation: str | None = None,
  **dense: Any,
) -> Float[Array, '*m n']:
  """Multiplies by decoded codes, and by a few entries that are kept in float.

    y[m, n] = sum_k x[m, k] (w_hat[k, n] + s[k, n])

  where w_hat are the decoded codes, and s is zero but for `values` at `rows`
  and `columns`; entries given twice add up. The dense part is `w4a16_matmul`.

  Args:
    x: floating activations, shape (..., K).
    w: codes or weight, as `w4a16_matmul` takes them, without leading axes.
    values: floating entries kept apart, shape (nnz,).
    rows: their indices along K.
    columns: their indices along N. Sorted ones are faster on some backends.
    scale: of the codes.
    out_dtype: dtype of y; None is that of x.
    implementation: of the sparse part, None for the preferred one, or its
      name; a name holds for the dense part too.
    **dense: of the dense part: bits, group, zero_point, signed, decode,
      precision.

  Returns:
    y of shape (..., N); NaN where an index is out of range, in all of it.

  References:
    SqueezeLLM, arXiv:2306.07629, section 4.2.
  """
  x, w, values = jnp.asarray(x), jnp.asarray(w), jnp.asarray(values)
  rows, columns = jnp.asarray(rows), jnp.asarray(columns)
  if w.ndim != 2:
    raise ValueError(
      f'dense_and_sparse_matmul takes a weight of two axes, found {w.shape}'
    )
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise TypeError(f'values must be floating, found {values.dtype}')
  for name, index in (('rows', rows), ('columns', columns)):
    if not jnp.issubdtype(index.dtype, jnp.integer):
      raise TypeError(f'{name} must be integers, found {index.dtype}')
    if index.shape != values.shape or index.ndim != 1:
      raise ValueError(
        f'{name} has shape {index.shape}, expected that of values, '
        f'{values.shape}, one axis'
      )
  y = w4a16_matmul(
    x, w, scale, out_dtype=jnp.float32, implementation=implementation, **dense
  )
  folded, lead = shapes.fold_rows('x', x, (), x.shape[-1])
  apart = _OP(
    implementation,
    *(folded.astype(jnp.float32), values.astype(jnp.float32), rows, columns),
    n=w.shape[1],
  )
  out = y + apart.reshape(*lead, w.shape[1])
  return out.astype(x.dtype if out_dtype is None else out_dtype)
