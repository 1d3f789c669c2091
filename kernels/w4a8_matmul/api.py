"""The public product with packed integer weights: checks and dispatch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from quantlab_kernels import codes, packing, panels, registry, shapes
from quantlab_kernels.panels import Panels

_OP = registry.Op('w4a8_matmul')


def w4a8_matmul(
  xq: Int8[Array, '*b m k'],
  packed: UInt8[Array, '*b kp n'] | Panels,
  scale: jax.typing.ArrayLike,
  *,
  bits: int = 4,
  group: int | None = None,
  zero_point: jax.typing.ArrayLike | None = None,
  signed: bool = True,
  x_scale: jax.typing.ArrayLike | None = None,
  x_zero: jax.typing.ArrayLike | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> Float[Array, '*b m n']:
  """Multiplies int8 activations by packed integer weights scaled by group.

    I[g, m, n] = sum_{k in g} (xq[m, k] - x_zero[m]) (w[k, n] - zero[g, n])
    y[m, n]    = sum_g x_scale[m, g] scale[g, n] I[g, m, n]

  I is exact in int32, the rest is float32. The last group may be shorter.

  Args:
    xq: int8 activations, shape (*lead, ..., K).
    packed: codes packed along K by `pack`, shape (*lead, Kp, N); or what
      `prepack` makes of them (of signed 8-bit codes: of int8 ones).
    scale: shape broadcasting to (*lead, G, N), G = ceil(K / group); a last
      axis that divides N holds one entry per block of columns.
    bits: width of a code, 1 to 8.
    group: codes along K that share a scale; None is all of K.
    zero_point: integer zero points of the codes as they are stored, shaped
      as `scale`.
    signed: codes are two's complement, else plain from 0.
    x_scale: broadcasts to (*lead, ..., 1 or G); None is 1.
    x_zero: integer zero points of the rows, broadcasting to
      (*lead, ..., 1 or G).
    out_dtype: dtype of y, floating.
    implementation: None for the preferred one, or its name.

  Returns:
    y of shape (*lead, ..., N). A NaN or infinite scale gives NaN or infinity.
    Scales may be differentiated; codes carry no gradient.

  References:
    QServe, arXiv:2405.04532 (W4A8 by group); OdysseyLLM, arXiv:2311.09550.
  """
  xq, packed = jnp.asarray(xq), panels.operand(packed)
  shapes.require_dtype('xq', xq, jnp.int8)
  panels.require_packed('packed', packed, bits, signed)
  if not 1 <= bits <= 8:
    raise ValueError(f'w4a8_matmul takes codes of 1 to 8 bits, found {bits=}')
  if not jnp.issubdtype(out_dtype, jnp.floating):
    raise TypeError(f'w4a8_matmul returns floats, found {out_dtype=}')
  if packed.ndim < 2 or not xq.ndim:
    raise ValueError(
      'w4a8_matmul takes (..., K) by (..., Kp, N), found '
      f'{xq.shape} by {packed.shape}'
    )
  lead, k, n = packed.shape[:-2], xq.shape[-1], packed.shape[-1]
  if packed.shape[-2] != packing.packed_rows(k, bits):
    raise ValueError(
      f'packed has {packed.shape[-2]} rows, expected '
      f'{packing.packed_rows(k, bits)} for K={k} codes of {bits} bits'
    )
  group, groups = shapes.group_count(k, group)
  shapes.require_no_overflow(
    _OP.name,
    min(group, k),
    128 if x_zero is None else 255,
    codes.largest(bits, signed, zero_point is not None),
  )
  x, rows = shapes.fold_rows('xq', xq, lead, k)

  def run(*operands):
    return _OP(
      implementation,
      *operands,
      bits=bits,
      group=group,
      signed=signed,
      out_dtype=jnp.dtype(out_dtype),
    )

  zero = shapes.per_column('zero_point', zero_point, lead, groups, n)
  y = (jax.vmap(run) if lead else run)(
    x,
    packed.reshape(*x.shape[:-2], *packed.shape[-2:]),
    shapes.as_scale(shapes.per_column('scale', scale, lead, groups, n)),
    shapes.as_zero('zero_point', zero),
    shapes.as_scale(shapes.per_row('x_scale', x_scale, rows, lead, groups)),
    shapes.as_zero(
      'x_zero', shapes.per_row('x_zero', x_zero, rows, lead, groups)
    ),
  )
  return y.reshape(*rows, n)
