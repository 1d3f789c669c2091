"""The axes of a contraction, and its operands as plain matrices.

Every product that quantlab quantizes is, up to a permutation of axes, a
(batched) matrix product `(b..., M, K) x (b..., K, N)`. These records say which
axis of an operand plays which part. `K` is flattened in the order in which the
weight is stored, so that integer codes of both operands meet correctly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


def _inverse(order: Sequence[int]) -> list[int]:
  out = [0] * len(order)
  for new, old in enumerate(order):
    out[old] = new
  return out


def _matrix(x: jax.Array, batch: Axes, rows: Axes, cols: Axes) -> jax.Array:
  """Transposes and flattens to (batch..., rows, cols)."""
  y = jnp.transpose(x, (*batch, *rows, *cols))
  lead = y.shape[: len(batch)]
  n_rows = math.prod(x.shape[i] for i in rows)
  return y.reshape(*lead, n_rows, math.prod(x.shape[i] for i in cols))


def _unmatrix(
  y: jax.Array, shape: Sequence[int], batch: Axes, rows: Axes, cols: Axes
) -> jax.Array:
  """Inverse of `_matrix` for an operand of shape `shape`."""
  order = (*batch, *rows, *cols)
  full = y.reshape([shape[i] for i in order])
  return jnp.transpose(full, _inverse(order))


@dataclasses.dataclass(frozen=True)
class DotDims:
  """Axes of `dot_general`: batch, free and contracted, of both operands.

  `x` is the activation and `w` the weight; for a product of two activations
  `x` is the left and `w` the right operand. `weight_first` tells that `w` was
  the left operand of the traced product.
  """

  x_batch: Axes
  x_free: Axes
  x_contract: Axes
  w_batch: Axes
  w_free: Axes
  w_contract: Axes
  weight_first: bool = False

  @property
  def x_axes(self) -> tuple[Axes, ...]:
    """What `x_matrix` depends on."""
    return self.x_batch, self.x_free, self.x_contract

  def x_matrix(self, x: jax.Array) -> jax.Array:
    """X as (batch..., M, K)."""
    return _matrix(x, self.x_batch, self.x_free, self.x_contract)

  def x_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, self.x_batch, self.x_free, self.x_contract)

  def w_matrix(self, w: jax.Array) -> jax.Array:
    """W as (batch..., K, N)."""
    return _matrix(w, self.w_batch, self.w_contract, self.w_free)

  def w_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, self.w_batch, self.w_contract, self.w_free)

  def out_restore(
    self, y: jax.Array, x_shape: Sequence[int], w_shape: Sequence[int]
  ) -> jax.Array:
    """(batch..., M, N) as the result of the traced product."""
    lead = [x_shape[i] for i in self.x_batch]
    m = [x_shape[i] for i in self.x_free]
    n = [w_shape[i] for i in self.w_free]
    full = y.reshape(*lead, *m, *n)
    # dot_general orders free axes as they stand in each operand; `w_free` may
    # be in storage order.
    b = list(range(len(lead)))
    m_axes = [len(b) + i for i in range(len(m))]
    n_axes = [len(b) + len(m) + i for i in range(len(n))]
    n_axes = [n_axes[self.w_free.index(i)] for i in sorted(self.w_free)]
    pair = (n_axes, m_axes) if self.weight_first else (m_axes, n_axes)
    return jnp.transpose(full, (*b, *pair[0], *pair[1]))

  def out_rows(self, out: jax.Array) -> jax.Array:
    """The result as (batch..., rows, N), N in storage order."""
    b, n = len(self.x_batch), len(self.w_free)
    first = b if self.weight_first else out.ndim - n
    order = sorted(self.w_free)
    free = tuple(first + order.index(i) for i in self.w_free)
    batch = tuple(range(b))
    rest = tuple(i for i in range(b, out.ndim) if i not in free)
    return _matrix(out, batch, rest, free)

  def out_vector(self, v: jax.Array, shape: Sequence[int]) -> jax.Array:
    """(batch..., N) as it broadcasts against the result, of `shape`."""
    b, n = len(self.x_batch), len(self.w_free)
    first = b if self.weight_first else len(shape) - n
    free = shape[first : first + n]  # in the order of the operand's axes
    order = sorted(self.w_free)
    sizes = [free[order.index(i)] for i in self.w_free]
    v = v.reshape(*v.shape[:-1], *sizes)
    v = jnp.transpose(
      v, (*range(b), *(b + self.w_free.index(i) for i in order))
    )
    lead = v.shape[:b]
    rows = (1,) * (len(shape) - b - n)
    middle = (*free, *rows) if self.weight_first else (*rows, *free)
    return v.reshape(*lead, *middle)


@dataclasses.dataclass(frozen=True)
class ConvDims:
  """Axes of `conv_general_dilated`; K runs over (spatial..., input channel).

  Attributes:
    lhs_spec: (batch, channel, spatial...) axes of the activation.
    rhs_spec: (output, input, spatial...) axes of the kernel.
    out_spec: (batch, channel, spatial...) axes of the result.
    groups: feature_group_count (depthwise: the number of channels).
    window: strides, padding, lhs and rhs dilation.
  """

  lhs_spec: Axes
  rhs_spec: Axes
  out_spec: Axes
  groups: int
  window: tuple[Any, ...]

  @property
  def x_axes(self) -> tuple[Axes, ...]:
    """What `x_matrix` depends on."""
    return (self.lhs_spec,)

  @property
  def w_batch(self) -> Axes:
    return ()

  @property
  def w_free(self) -> Axes:
    return (self.rhs_spec[0],)

  @property
  def w_contract(self) -> Axes:
    return (*self.rhs_spec[2:], self.rhs_spec[1])

  def w_matrix(self, w: jax.Array) -> jax.Array:
    """Kernel as (K, N) with K = spatial x input channels of one group."""
    return _matrix(w, (), self.w_contract, self.w_free)

  def w_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, (), self.w_contract, self.w_free)

  def out_rows(self, out: jax.Array) -> jax.Array:
    """The result as (rows, N)."""
    return _matrix(
      out, (), (self.out_spec[0], *self.out_spec[2:]), (self.out_spec[1],)
    )

  def x_matrix(self, x: jax.Array) -> jax.Array:
    """X as (images, everything else): an image is a convolution's token.

    A scale per pixel could not be taken out of the sum over a window.
    """
    rest = (*self.lhs_spec[2:], self.lhs_spec[1])
    return _matrix(x, (), (self.lhs_spec[0],), rest)

  def x_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    rest = (*self.lhs_spec[2:], self.lhs_spec[1])
    return _unmatrix(y, shape, (), (self.lhs_spec[0],), rest)


@dataclasses.dataclass(frozen=True)
class GatherDims:
  """An embedding lookup: rows of a table, stored as (K = features, N = rows).

  Attributes:
    row: axis of the table that is indexed.
    features: the other axes, in storage order.
    offset: axes of the result that hold the features.
    mode: 'clip', 'fill' or 'promise_in_bounds', for rows out of range.
  """

  row: int
  features: Axes
  offset: Axes
  mode: str

  @property
  def w_batch(self) -> Axes:
    return ()

  @property
  def w_free(self) -> Axes:
    return (self.row,)

  @property
  def w_contract(self) -> Axes:
    return self.features

  def w_matrix(self, w: jax.Array) -> jax.Array:
    return _matrix(w, (), self.features, (self.row,))

  def w_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, (), self.features, (self.row,))


@dataclasses.dataclass(frozen=True)
class RaggedDims:
  """`ragged_dot_general` of grouped rows with a stack of weights.

  Attributes:
    w_batch: the group (expert) axis of the weights.
    w_free: output axes.
    w_contract: contracted axes.
    x_contract: contracted axes of the activation.
  """

  w_batch: Axes
  w_free: Axes
  w_contract: Axes
  x_contract: Axes
  x_free: Axes

  def w_matrix(self, w: jax.Array) -> jax.Array:
    return _matrix(w, self.w_batch, self.w_contract, self.w_free)

  def w_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, self.w_batch, self.w_contract, self.w_free)

  def x_matrix(self, x: jax.Array) -> jax.Array:
    return _matrix(x, (), self.x_free, self.x_contract)

  def x_restore(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
    return _unmatrix(y, shape, (), self.x_free, self.x_contract)


Dims = DotDims | ConvDims | GatherDims | RaggedDims
