"""Quantizing the operands of a product: simulated, or as integer codes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import quantlab_kernels as kernels
from quantlab import core, formats
from quantlab.core import QParams, Quantizer, scales
from quantlab.ops.dims import ConvDims, Dims, DotDims, GatherDims


def _flat(x: jax.Array) -> jax.Array:
  """A tensor as one row: a per-tensor scale needs no roles of axes."""
  return x.reshape(1, -1)


def units(
  x: jax.Array, quantizer: Quantizer, dims: Dims, role: str
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """The operand as (loops..., rows, contraction), and the way back."""
  if quantizer.per == 'tensor':
    return _flat(x), lambda y: y.reshape(x.shape)
  if role == 'output':
    rows = x.reshape(-1, x.shape[-1])
    return rows, lambda y: y.reshape(x.shape)
  if role == 'rhs':  # of two activations: (batch..., K, N)
    matrix = dims.w_matrix(x).swapaxes(-1, -2)
    return matrix, lambda y: dims.w_restore(y.swapaxes(-1, -2), x.shape)
  if isinstance(dims, GatherDims):
    raise TypeError('an embedding lookup has no activation to quantize')
  return dims.x_matrix(x), lambda y: dims.x_restore(y, x.shape)


def on_units(
  x: jax.Array,
  quantizer: Quantizer,
  dims: Dims,
  role: str,
  f: Callable[..., jax.Array],
) -> jax.Array:
  """An operand with `f(matrix, axis=)` applied to it as scales see it.

  Args:
    x: the operand, in the axes of the traced product.
    quantizer: its quantizer.
    dims: roles of the product's axes.
    role: 'weight', 'input', 'lhs', 'rhs' or 'output'.
    f: of (loops..., K, N) with axis=-2 for a weight, else of
      (loops..., rows, contraction) with axis=-1.
  """
  if role == 'weight':
    return dims.w_restore(f(dims.w_matrix(x), axis=-2), x.shape)
  matrix, restore = units(x, quantizer, dims, role)
  return restore(f(matrix, axis=-1))


def fake_quantize_activation(
  x: jax.Array,
  quantizer: Quantizer,
  dims: Dims,
  role: str,
  qparams: QParams | None = None,
) -> jax.Array:
  """Simulates a quantized operand; shape and dtype are kept.

  Args:
    x: the operand, in the axes of the traced product.
    quantizer: its quantizer.
    dims: roles of the product's axes.
    role: 'input', 'lhs', 'rhs' or 'output'.
    qparams: calibrated parameters, for a static quantizer.
  """

  def f(matrix, axis):
    return core.fake_quantize(matrix, quantizer, qparams, axis=axis)

  return on_units(x, quantizer, dims, role, f)


class IntegerRows(NamedTuple):
  """An activation as integers: x = (codes - zero) * scale.

  Attributes:
    codes: int8, (batch..., M, K).
    scale: float32, broadcastable to (batch..., M, 1).
    zero: int32 of the scale's shape, or None.
  """

  codes: jax.Array
  scale: jax.Array
  zero: jax.Array | None


_made: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
  '_made', default=None
)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
  """Within it an input of several products (q, k, v) is quantized once.

  XLA would find the twins, but only after working through all of them.
  """
  token = _made.set({})
  try:
    yield
  finally:
    _made.reset(token)


def integer_rows(
  x: jax.Array,
  quantizer: Quantizer,
  dims: DotDims | ConvDims,
  qparams: QParams | None = None,
) -> IntegerRows:
  """Integer codes of the operand x as (batch..., M, K)."""
  made = _made.get()
  if qparams is not None or made is None:
    return to_integers(x, dims.x_matrix(x), quantizer, qparams)
  key = id(x), quantizer, dims.x_axes
  if key not in made:  # x is kept with it: its id is not used again
    made[key] = x, to_integers(x, dims.x_matrix(x), quantizer)
  return made[key][1]


def to_integers(
  x: jax.Array,
  matrix: jax.Array,
  quantizer: Quantizer,
  qparams: QParams | None = None,
) -> IntegerRows:
  """Integer codes of `matrix`, which is x as (batch..., M, K).

  Constants to derivatives: a product takes those of its simulation.
  """
  x, matrix, qparams = lax.stop_gradient((x, matrix, qparams))
  if qparams is None and _plain(quantizer):
    return IntegerRows(
      *kernels.quantize_activation(
        matrix,
        bits=quantizer.bits,
        symmetric=quantizer.symmetric,
        narrow=quantizer.narrow,
      )
    )
  if qparams is None:
    source = _flat(x) if quantizer.per == 'tensor' else matrix
    qparams = core.fit(source, quantizer, axis=-1)
  codes = core.encode(matrix, quantizer, qparams, axis=-1)
  zero = qparams.zero_point
  return IntegerRows(
    quantizer.format.to_int8(codes),
    qparams.scale,
    None if zero is None else zero.astype(jnp.int32),
  )


def _plain(q: Quantizer) -> bool:
  """Whether the kernels quantize as `core` does, bit for bit."""
  rule = scales.absmax() if q.symmetric else scales.minmax()
  signed = isinstance(q.format, formats.Integer) and q.format.signed
  return (
    (signed and q.format.has_zero and 2 <= q.bits <= 8)
    and (q.per == 'token' and q.scale == rule)
    and (q.scale_format == 'float32' and q.rounding == 'nearest')
  )


def abstract_range(
  quantizer: Quantizer, loops: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a static per-tensor quantizer's parameters, loops in front."""
  bound = jax.ShapeDtypeStruct((*loops, 1, 1), jnp.float32)
  made = jax.eval_shape(
    lambda lo, hi: core.fit_range(lo, hi, quantizer), bound, bound
  )
  return {k: v for k, v in made._asdict().items() if v is not None}
