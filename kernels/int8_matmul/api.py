"""The public int8 product: checks, folding, dispatch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from quantlab_kernels import panels, registry, shapes
from quantlab_kernels.panels import Panels

_OP = registry.Op('int8_matmul')


def int8_matmul(
  xq: Int8[Array, '*b m k'],
  wq: Int8[Array, '*b k n'] | Panels,
  *,
  x_scale: jax.typing.ArrayLike | None = None,
  w_scale: jax.typing.ArrayLike | None = None,
  x_zero: jax.typing.ArrayLike | None = None,
  w_zero: jax.typing.ArrayLike | None = None,
  transpose_w: bool = False,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> Float[Array, '*b m n'] | Int[Array, '*b m n']:
  """Multiplies int8 codes, exactly, then applies the scales.

    I[m, n] = sum_k (xq[m, k] - x_zero[m]) (wq[k, n] - w_zero[n])     in int32
    y[m, n] = x_scale[m] (w_scale[n] I[m, n])                      in float32

  Args:
    xq: int8 activations, shape (*lead, ..., K).
    wq: int8 weight, shape (*lead, K, N), or (*lead, N, K) with `transpose_w`;
      or what `prepack` makes of it. Leading axes (experts, heads) must lead
      xq too.
    x_scale: scale of each row, broadcasting to (*lead, ..., 1); None is 1.
    w_scale: scale of each column, broadcasting to (*lead, 1, N); None is 1.
    x_zero: integer zero points of the rows, within the range of the codes.
    w_zero: integer zero points of the columns, likewise.
    transpose_w: whether the last axis of wq is the contraction, as for the
      keys of attention.
    out_dtype: dtype of y; int32 returns I, and takes no scales.
    implementation: None for the preferred one, or its name.

  Returns:
    y of shape (*lead, ..., N). A NaN or infinite scale gives NaN or infinity.
    Scales may be differentiated; codes are integers, and carry no gradient
    (`jax.grad` with allow_int gives float0 zeros).

  References:
    Jacob et al., arXiv:1712.05877, equation 7.
  """
  xq = jnp.asarray(xq)
  wq = panels.operand(wq)
  if isinstance(wq, Panels) and transpose_w:
    raise ValueError('wq is packed ahead, as (K, N): transpose_w=True is not')
  shapes.require_dtype('xq', xq, jnp.int8)
  shapes.require_dtype('wq', wq, jnp.int8)
  if wq.ndim < 2:
    raise ValueError(f'wq must be (..., K, N), found {wq.shape}')
  lead = wq.shape[:-2]
  k, n = wq.shape[:-3:-1] if transpose_w else wq.shape[-2:]
  shapes.require_no_overflow(
    _OP.name, k, 128 if x_zero is None else 255, 128 if w_zero is None else 255
  )
  dtype = jnp.dtype(out_dtype)
  shapes.require_output(dtype, x_scale, w_scale)
  x, rows = shapes.fold_rows('xq', xq, lead, k)
  w = wq.reshape(*x.shape[:-2], *wq.shape[-2:])

  def run(x, w, x_scale, w_scale, x_zero, w_zero):
    return _OP(
      implementation,
      *(x, w, x_scale, w_scale, x_zero, w_zero),
      transpose_w=transpose_w,
      out_dtype=dtype,
    )

  y = (jax.vmap(run) if lead else run)(
    x,
    w,
    shapes.as_scale(shapes.per_row('x_scale', x_scale, rows, lead)),
    shapes.as_scale(shapes.per_column('w_scale', w_scale, lead, 1, n)),
    shapes.as_zero('x_zero', shapes.per_row('x_zero', x_zero, rows, lead)),
    shapes.as_zero('w_zero', shapes.per_column('w_zero', w_zero, lead, 1, n)),
  )
  return y.reshape(*rows, n)
