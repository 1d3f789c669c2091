"""The public weight-only product: checks and dispatch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt16

from quantlab_kernels import packing, registry, shapes

_OP = registry.Op('w4a16_matmul')

Decode = Callable[[UInt8[Array, 'k n'] | UInt16[Array, 'k n']], jax.Array]


def w4a16_matmul(
  x: Float[Array, '*b m k'],
  w: Float[Array, '*b k n'] | UInt8[Array, '*b kp n'],
  scale: jax.typing.ArrayLike | None = None,
  *,
  bits: int | None = None,
  group: int | None = None,
  zero_point: jax.typing.ArrayLike | None = None,
  signed: bool = True,
  decode: Decode | None = None,
  out_dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, '*b m n']:
  """Multiplies float activations by weights decoded to float32.

    w_hat[k, n] = (decode(w)[k, n] - zero[g, n]) scale[g, n],  k in group g
    y[m, n]     = sum_k x[m, k] w_hat[k, n]

  with float32 products and sums. Asking a product of 16-bit floats for a
  16-bit result is both slower and less exact, so the float32 result is cast.

  Args:
    x: floating activations, shape (*lead, ..., K).
    w: floating weight (*lead, K, N), already decoded up to the scale, or
      uint8 codes (*lead, Kp, N) packed along K by `pack`, with `bits`.
    scale: None is 1; shape broadcasting to (*lead, G, N), G = ceil(K/group);
      a last axis that divides N holds one entry per block of columns.
    bits: width of a code, 1 to 8 or 16; None when w is floating.
    group: codes along K that share a scale; None is all of K. The last group
      may be shorter.
    zero_point: subtracted from the decoded codes; shaped as `scale`.
    signed: integer codes are two's complement, else plain from 0.
    decode: maps unpacked codes (uint8, or uint16 of 16 bits) to float values
      elementwise; None reads them as integers.
    out_dtype: dtype of y; None is that of x.
    precision: of the product, as in `jax.lax.dot_general`.
    implementation: None for the preferred one, or its name.

  Returns:
    y of shape (*lead, ..., N).
  """
  x, w = jnp.asarray(x), jnp.asarray(w)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x must be floating, found {x.dtype} of {x.shape}')
  if w.ndim < 2 or not x.ndim:
    raise ValueError(
      f'w4a16_matmul takes (..., K) by (..., K, N), found {x.shape} by '
      f'{w.shape}'
    )
  lead, k, n = w.shape[:-2], x.shape[-1], w.shape[-1]
  _require_storage(w, bits, k, decode)
  x2, rows = shapes.fold_rows('x', x, lead, k)
  group, groups = shapes.group_count(k, group)

  def run(*operands):
    return _OP(
      implementation,
      *operands,
      bits=bits,
      group=group,
      signed=signed,
      decode=decode,
      precision=precision,
    )

  y = (jax.vmap(run) if lead else run)(
    x2,
    w.reshape(*x2.shape[:-2], *w.shape[-2:]),
    shapes.as_scale(shapes.per_column('scale', scale, lead, groups, n)),
    shapes.as_scale(
      shapes.per_column('zero_point', zero_point, lead, groups, n)
    ),
  )
  return y.reshape(*rows, n).astype(x.dtype if out_dtype is None else out_dtype)


def _require_storage(w, bits, k, decode):
  if bits is None:
    if not jnp.issubdtype(w.dtype, jnp.floating):
      raise TypeError(
        f'w must be floating, or uint8 with bits=..., found {w.dtype}'
      )
    if decode is not None:
      raise ValueError('decode reads codes: give bits=... too')
    if w.shape[-2] != k:
      raise ValueError(f'w has shape {w.shape}, expected K={k} rows')
    return
  shapes.require_dtype(f'w of {bits=}', w, jnp.uint8)
  if w.shape[-2] != packing.packed_rows(k, bits):
    raise ValueError(
      f'w has {w.shape[-2]} packed rows, expected '
      f'{packing.packed_rows(k, bits)} for K={k} codes of {bits} bits'
    )
