"""The map between an array as the model sees it and its canonical layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array


class LayoutError(ValueError):
  """An operation that cannot be done by changing metadata; says why."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """How logical axes map onto the canonical layout (loops..., K, N).

  K flattens the contraction axes `k_shape`, N the output axes `n_shape`. The
  expanded canonical shape is loops + k_shape + n_shape. Logical axes are
  counted from the end, so that vmap and scan may slice leading loop axes off
  without the layout knowing.

  Attributes:
    k_shape: sizes of the contraction axes, in canonical order.
    n_shape: sizes of the output axes; the first is -1, derived from the
      array, so that N may be sliced or concatenated along it.
    perm: logical trailing axis i is axis perm[i] (negative) of the expanded
      canonical shape; logical axes before the last len(perm) are loop axes,
      in order.
  """

  k_shape: tuple[int, ...]
  n_shape: tuple[int, ...]
  perm: tuple[int, ...]

  @classmethod
  def of(
    cls,
    shape: Sequence[int],
    k_axes: Sequence[int],
    loop_axes: Sequence[int] = (),
  ) -> Layout:
    """Layout of a logical array.

    Args:
      shape: its shape.
      k_axes: contraction axes, in the order in which K flattens them.
      loop_axes: axes that hold separate tensors (layers, experts, heads).
    """
    ndim = len(shape)
    k = [a % ndim for a in k_axes]
    loops = [a % ndim for a in loop_axes]
    if len({*k, *loops}) != len(k) + len(loops):
      raise ValueError(
        f'axes are named twice: {tuple(k_axes)=}, {tuple(loop_axes)=}'
      )
    n = [a for a in range(ndim) if a not in k and a not in loops]
    canonical = [*sorted(loops), *k, *n]
    perm = [canonical.index(a) - ndim for a in range(ndim)]
    n_shape = tuple(shape[a] for a in n)
    return cls.make(
      tuple(shape[a] for a in k), (-1, *n_shape[1:])[: len(n)], perm, len(loops)
    )

  @classmethod
  def make(
    cls,
    k_shape: tuple[int, ...],
    n_shape: tuple[int, ...],
    full: Sequence[int],
    loops: int,
  ) -> Layout:
    """Layout from the map of all axes, leading loop axes in order dropped."""
    ndim, lead = len(full), 0
    while lead < loops and full[lead] == lead - ndim:
      lead += 1
    return cls(tuple(k_shape), tuple(n_shape), tuple(full[lead:]))

  @property
  def k(self) -> int:
    """The flattened contraction length."""
    return math.prod(self.k_shape)

  def full(self, loops: int) -> tuple[int, ...]:
    """`perm` for all axes of an array with this many loop axes."""
    ndim = loops + len(self.k_shape) + len(self.n_shape)
    lead = ndim - len(self.perm)
    return (*range(-ndim, lead - ndim), *self.perm)

  def expanded(self, loops: Sequence[int], n: int) -> tuple[int, ...]:
    """Loops + k_shape + n_shape, with the first output size filled in."""
    if not self.n_shape:
      return (*loops, *self.k_shape)
    rest = self.n_shape[1:]
    return (*loops, *self.k_shape, n // math.prod(rest), *rest)

  def shape(self, loops: Sequence[int], n: int) -> tuple[int, ...]:
    """The logical shape."""
    expanded = self.expanded(loops, n)
    return tuple(expanded[a] for a in self.full(len(loops)))

  def to_canonical(self, x: Array) -> Array:
    """Logical array -> (loops..., K, N)."""
    loops = x.ndim - len(self.k_shape) - len(self.n_shape)
    if loops < 0 or x.ndim < len(self.perm):
      raise ValueError(f'{self} does not fit an array of {x.shape=}')
    full = self.full(loops)
    order = sorted(range(x.ndim), key=lambda i: full[i])
    x = jnp.transpose(x, order)
    found = x.shape[loops : loops + len(self.k_shape)]
    if found != self.k_shape:
      raise ValueError(
        f'the contraction axes of {x.shape=} are {found}, {self} has '
        f'{self.k_shape}'
      )
    n = math.prod(x.shape[loops + len(self.k_shape) :])
    return x.reshape(*x.shape[:loops], self.k, n)

  def to_logical(self, y: Array) -> Array:
    """(loops..., K, N) -> logical array; undoes `to_canonical`."""
    loops = y.shape[:-2]
    y = y.reshape(self.expanded(loops, y.shape[-1]))
    return jnp.transpose(y, [a % y.ndim for a in self.full(len(loops))])
