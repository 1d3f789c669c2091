"""The public ternary product: w4a8_matmul with codes of two bits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from quantlab_kernels.panels import Panels
from quantlab_kernels.w4a8_matmul import w4a8_matmul


def ternary_matmul(
  xq: Int8[Array, '*b m k'],
  packed: UInt8[Array, '*b kp n'] | Panels,
  scale: jax.typing.ArrayLike,
  *,
  group: int | None = None,
  x_scale: jax.typing.ArrayLike | None = None,
  x_zero: jax.typing.ArrayLike | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> Float[Array, '*b m n']:
  """Multiplies int8 activations by weights of -1, 0 and 1.

    y[m, n] = sum_g x_scale[m, g] scale[g, n]
              sum_{k in g} (xq[m, k] - x_zero[m, g]) w[k, n]

  The backends are those of `w4a8_matmul`, on two's complement codes of two
  bits, four to a byte; a fourth code, 0b10, would stand for -2.

  Args:
    xq: int8 activations, shape (*lead, ..., K).
    packed: codes packed along K by `pack` with two bits, (*lead, Kp, N); or
      what `prepack` makes of them.
    scale: shape broadcasting to (*lead, G, N), G = ceil(K / group); BitNet
      has one for the whole weight.
    group: weights along K that share a scale; None is all of K.
    x_scale: broadcasts to (*lead, ..., 1 or G); None is 1.
    x_zero: integer zero points of the rows, likewise.
    out_dtype: dtype of y, floating.
    implementation: None for the preferred one, or its name.

  Returns:
    y of shape (*lead, ..., N).

  References:
    BitNet b1.58, arXiv:2402.17764; bitnet.cpp, arXiv:2410.16144.
  """
  return w4a8_matmul(
    xq,
    packed,
    scale,
    bits=2,
    group=group,
    x_scale=x_scale,
    x_zero=x_zero,
    out_dtype=out_dtype,
    implementation=implementation,
  )
