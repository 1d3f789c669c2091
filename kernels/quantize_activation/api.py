"""The public activation quantizer: checks and dispatch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from quantlab_kernels import registry, shapes

_OP = registry.Op('quantize_activation')


def quantize_activation(
  x: Float[Array, '*b m k'],
  *,
  bits: int = 8,
  per: str = 'token',
  symmetric: bool = True,
  narrow: bool = False,
  scale: jax.typing.ArrayLike | None = None,
  zero_point: jax.typing.ArrayLike | None = None,
  implementation: str | None = None,
) -> tuple[
  Int8[Array, '*b m k'], Float[Array, '*b #m 1'], Int32[Array, '*b #m 1'] | None
]:
  """Quantizes activations to int8 codes.

    symmetric:  s = max|x| / (2^(bits-1) - 1),      q = clip(round(x / s))
    asymmetric: s = (max(x, 0) - min(x, 0)) / (qmax - qmin),
                z = qmin + round(-min(x, 0) / s),   q = clip(round(x / s) + z)

  in float32, with x / s as x (1 / s), ties to even, clipped to [qmin, qmax]:
  qmax = 2^(bits-1) - 1, and qmin = -2^(bits-1), or -qmax when `narrow`. Zero is
  represented exactly. A unit of zeros has scale 2^-126.

  Args:
    x: floating activations, shape (..., K), or (..., M, K).
    bits: width of a code, 2 to 8.
    per: 'token', one scale for each row, or 'tensor', one for the two last
      axes (leading axes are separate tensors; reshape to merge them).
    symmetric: without or with a zero point.
    narrow: leave out the lowest code.
    scale: a scale found beforehand, broadcasting to the shape returned
      (static quantization); None measures x.
    zero_point: its integer zero points; only with an asymmetric `scale`.
    implementation: None for the preferred one, or its name.

  Returns:
    (q, scale, zero_point): int8 codes of the shape of x; float32 scale of
    shape (..., M, 1), or (..., 1, 1) per tensor; int32 zero points likewise,
    None when symmetric. Codes cannot hold NaN or infinity, so a unit of x
    that does has a scale that is not finite, also when the scale was given:
    what is computed from it is then NaN, not a wrong number.
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
    raise TypeError(
      'quantize_activation takes a floating array of one axis or more, found '
      f'{x.dtype} of shape {x.shape}'
    )
  if not 2 <= bits <= 8:
    raise ValueError(f'int8 codes have 2 to 8 bits, found {bits=}')
  if per not in ('token', 'tensor'):
    raise ValueError(f"per must be 'token' or 'tensor', found {per=}")
  if zero_point is not None and (symmetric or scale is None):
    raise ValueError('zero_point needs symmetric=False and its scale')
  if scale is not None and not symmetric and zero_point is None:
    raise ValueError('an asymmetric scale needs its zero_point')
  one = 1 if per == 'token' else min(2, x.ndim)
  shape = (*x.shape[: x.ndim - one], *(1,) * one)
  return _OP(
    implementation,
    x,
    shapes.as_scale(_spread('scale', scale, shape)),
    shapes.as_zero('zero_point', _spread('zero_point', zero_point, shape)),
    bits=bits,
    axes=tuple(range(-one, 0)),
    symmetric=symmetric,
    narrow=narrow,
  )


def _spread(name, value, shape):
  if value is None:
    return None
  value = jnp.asarray(value)
  try:
    return jnp.broadcast_to(value, shape)
  except ValueError as error:
    raise ValueError(
      f'{name} has shape {value.shape}, expected one that broadcasts to {shape}'
    ) from error
