"""Which elements share a scale: splitting an array into its units."""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if typing.TYPE_CHECKING:
  from quantlab.core.quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class Units:
  """The two trailing axes of an array, cut into rectangles with one scale each.

  One of the two axes is the contraction (K), the other the output (N, or the
  rows M of an activation). A rectangle spans `size[0]` by `size[1]` elements
  of axes -2 and -1; the array splits into `count[0]` by `count[1]` of them,
  the last ones padded with zeros. Parameters (scale, zero point) have shape
  (loops..., count[0], count[1]).

  Where one axis has a single rectangle and the other one rectangle an element
  (or both have one), parameters broadcast as they are and nothing is split.

  Attributes:
    shape: the two trailing sizes.
    axis: contraction axis, -2 or -1.
    size: rectangle.
    count: rectangles along each axis.
  """

  shape: tuple[int, int]
  axis: int
  size: tuple[int, int]
  count: tuple[int, int]

  @classmethod
  def of(cls, shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> Units:
    """Units of an array of this shape; refuses what does not divide."""
    if axis not in (-2, -1):
      raise ValueError(f'the contraction axis is -2 or -1, found {axis=}')
    if len(shape) < 2:
      raise ValueError(
        f'expected (loops..., K, N) or (loops..., M, K), found {shape=}; '
        'give a vector a second axis first'
      )
    k, n = shape[axis], shape[-3 - axis]
    if k == 0:
      raise ValueError(f'nothing to quantize along {axis=} of {shape=}')
    quantizer.check(k, n, f'an array of {shape=}')
    sk, sn = quantizer.unit(k, n)
    pair = (k, n), (sk, sn), (-(-k // sk), -(-n // max(sn, 1)))
    if axis == -1:
      pair = tuple((b, a) for a, b in pair)  # type: ignore[assignment]
    return cls(pair[0], axis, pair[1], pair[2])

  @functools.cached_property
  def cut(self) -> tuple[bool, bool]:
    """Whether each axis has to be split in two.

    Not so where it has one rectangle, or one for each element: axes of length
    one would cost the compiler its vector loops (twentyfold, in a search).
    """
    first, second = (
      s > 1 and c > 1 for s, c in zip(self.size, self.count, strict=True)
    )
    return first, second

  @functools.cached_property
  def whole(self) -> bool:
    """Whether parameters broadcast against the array without splitting."""
    return not any(self.cut)

  @functools.cached_property
  def reduce(self) -> tuple[int, ...]:
    """Axes of the split array that one unit spans."""
    second = (-1,) if self.cut[1] or self.count[1] == 1 else ()
    first = (-2 - self.cut[1],) if self.cut[0] or self.count[0] == 1 else ()
    return first + second

  @property
  def padding(self) -> tuple[int, int]:
    """Zeros behind the last rectangle of each axis."""
    (a, b), (c, d) = self.size, self.count
    return a * c - self.shape[0], b * d - self.shape[1]

  def split(self, x: Float[Array, '*b p q']) -> Array:
    """(loops..., P, Q) -> (loops..., [count0,] size0, [count1,] size1)."""
    if self.whole:
      return x
    if any(self.padding):
      pads = [(0, 0)] * (x.ndim - 2) + [(0, p) for p in self.padding]
      x = jnp.pad(x, pads)
    return x.reshape(*x.shape[:-2], *self._dims())

  def merge(self, x: Array) -> Float[Array, '*b p q']:
    """Undoes `split`."""
    if self.whole:
      return x
    rows, cols = (s * c for s, c in zip(self.size, self.count, strict=True))
    x = x.reshape(*x.shape[: -len(self._dims())], rows, cols)
    if any(self.padding):
      x = x[..., : self.shape[0], : self.shape[1]]
    return x

  def expand(self, p: Array) -> Array:
    """Makes parameters (loops..., count0, count1) broadcast against a split."""
    return p if self.whole else p[self._index(None)]

  def squeeze(self, stat: Array) -> Array:
    """Undoes `expand` for a reduction that kept its dimensions."""
    return stat if self.whole else stat[self._index(0)]

  def mask(self) -> np.ndarray | None:
    """False at padded places of a split array; None without padding."""
    if not any(self.padding):
      return None
    rows, cols = (
      np.arange(s * c) < n
      for s, c, n in zip(self.size, self.count, self.shape, strict=True)
    )
    return (rows[:, None] & cols).reshape(self._dims())

  def _dims(self) -> list[int]:
    """The trailing sizes of a split array."""
    dims: list[int] = []
    for s, c, cut in zip(self.size, self.count, self.cut, strict=True):
      dims += [c, s] if cut else [s * c]
    return dims

  def _index(self, inner: int | None) -> tuple:
    """Index with `inner` at the places where rectangles extend."""
    index: list = [...]
    for cut in self.cut:
      index += [slice(None), inner] if cut else [slice(None)]
    return tuple(index)
