"""The public product with codebook weights: checks, folding, dispatch."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from quantlab_kernels import packing, panels, registry, shapes
from quantlab_kernels.panels import Panels

_OP = registry.Op('lut_matmul')


def lut_matmul(
  xq: Int8[Array, '*b m k'],
  packed: UInt8[Array, '*b kp n'] | Panels,
  table: Int8[Array, '*b codes'],
  scale: jax.typing.ArrayLike,
  *,
  bits: int = 4,
  group: int | None = None,
  x_scale: jax.typing.ArrayLike | None = None,
  x_zero: jax.typing.ArrayLike | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> Float[Array, '*b m n']:
  """Multiplies int8 activations by entries of an int8 table.

    I[g, m, n] = sum_{k in g} (xq[m, k] - x_zero[m, g]) table[code[k, n]]
    y[m, n]    = sum_g x_scale[m, g] scale[g, n] I[g, m, n]

  I is exact in int32, the rest is float32. A codebook of floats is rounded to
  int8 first, by `int8_table`, which says how much that moves it.

  Args:
    xq: int8 activations, shape (*lead, ..., K).
    packed: codes packed along K by `pack`, shape (*lead, Kp, N); or what
      `prepack` makes of them.
    table: what the codes stand for, (2^bits,) or (*lead, 2^bits).
    scale: shape broadcasting to (*lead, G, N), G = ceil(K / group).
    bits: width of a code, 2 to 4.
    group: codes along K that share a scale; None is all of K. The last group
      may be shorter.
    x_scale: broadcasts to (*lead, ..., 1 or G); None is 1.
    x_zero: integer zero points of the rows, likewise.
    out_dtype: dtype of y, floating.
    implementation: None for the preferred one, or its name.

  Returns:
    y of shape (*lead, ..., N). A NaN or infinite scale gives NaN or infinity.
    Scales may be differentiated; codes and table carry no gradient.

  References:
    QLoRA (NF4), arXiv:2305.14314; SqueezeLLM (k-means), arXiv:2306.07629.
  """
  xq, table = jnp.asarray(xq), jnp.asarray(table)
  packed = panels.operand(packed)
  shapes.require_dtype('xq', xq, jnp.int8)
  shapes.require_dtype('packed', packed, jnp.uint8)
  shapes.require_dtype('table', table, jnp.int8)
  if not 2 <= bits <= 4:
    raise ValueError(f'lut_matmul takes codes of 2 to 4 bits, found {bits=}')
  if not jnp.issubdtype(out_dtype, jnp.floating):
    raise TypeError(f'lut_matmul returns floats, found {out_dtype=}')
  if packed.ndim < 2 or not xq.ndim:
    raise ValueError(
      f'lut_matmul takes (..., K) by (..., Kp, N), found {xq.shape} by '
      f'{packed.shape}'
    )
  lead, k, n = packed.shape[:-2], xq.shape[-1], packed.shape[-1]
  if packed.shape[-2] != packing.packed_rows(k, bits):
    raise ValueError(
      f'packed has {packed.shape[-2]} rows, expected '
      f'{packing.packed_rows(k, bits)} for K={k} codes of {bits} bits'
    )
  if table.shape not in ((2**bits,), (*lead, 2**bits)):
    raise ValueError(
      f'table has shape {table.shape}, expected {(2**bits,)} or '
      f'{(*lead, 2**bits)}: one entry for each code of {bits} bits'
    )
  group, groups = shapes.group_count(k, group)
  shapes.require_no_overflow(
    _OP.name, min(group, k), 128 if x_zero is None else 255, 128
  )
  x, rows = shapes.fold_rows('xq', xq, lead, k)
  batch = (math.prod(lead),) if lead else ()
  table = jnp.broadcast_to(table, (*lead, 2**bits))

  def run(*operands):
    return _OP(
      implementation,
      *operands,
      bits=bits,
      group=group,
      out_dtype=jnp.dtype(out_dtype),
    )

  y = (jax.vmap(run) if lead else run)(
    x,
    packed.reshape(*batch, *packed.shape[-2:]),
    table.reshape(*batch, 2**bits),
    shapes.as_scale(shapes.per_column('scale', scale, lead, groups, n)),
    shapes.as_scale(shapes.per_row('x_scale', x_scale, rows, lead, groups)),
    shapes.as_zero(
      'x_zero', shapes.per_row('x_zero', x_zero, rows, lead, groups)
    ),
  )
  return y.reshape(*rows, n)


def int8_table(
  values: Float[Array, ' codes'],
) -> tuple[Int8[Array, ' codes'], Float[Array, '']]:
  """Rounds a codebook to int8: values ~ table * unit, unit = max|values| / 127.

  Each entry moves by at most unit / 2, 0.4 % of the largest. Those of NF4 move
  by 0.0037 at most and 0.0017 on average, against 0.08 between its two closest
  entries. Multiply the scales by `unit`. It is not finite if a value is not.
  """
  values = jnp.asarray(values, jnp.float32)
  top = jnp.max(jnp.abs(values), initial=0.0)
  unit = jnp.where(top == 0, 1.0, top) / 127
  return jnp.round(values / unit).astype(jnp.int8), unit
