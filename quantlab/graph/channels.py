"""Following the channels of one tensor through a program.

A label says which channel each element of a value belongs to: an integer
array that broadcasts to the value, -1 where there is none. If the tensor's
channel c is divided by s[c], a value labelled with c is divided by s[c] too:
how labels pass through operations is said by `forward` and, through what only
rearranges elements, by `backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from quantlab.graph.flat import Atom, Op

Label = np.ndarray
Labels = list[Any]  # of Label or None, one an operand or result


class BrokenError(Exception):
  """An operation that a per-channel scale does not pass.

  Attributes:
    residual: it is added to another value.
  """

  def __init__(self, residual: bool = False):
    super().__init__()
    self.residual = residual


class Values(Protocol):
  """What a rule may ask of a value (see `regions.Region`)."""

  def shape(self, atom: Atom) -> tuple[int, ...]: ...

  def fixed(self, atom: Atom) -> bool:
    """Whether a value is known from parameters and constants."""

  def zero(self, atom: Atom) -> bool:
    """Whether a value is zero everywhere."""

  def averages(self, atom: Atom, axis: int) -> bool:
    """Whether a value is a softmax along an axis."""


class Scene(Values, Protocol):
  """What a rule may also tell (see `flow.Flow`)."""

  def join(self, op: Op, position: int, label: Label) -> None:
    """A parameter must be divided alike (a bias)."""

  def absorb(self, op: Op, position: int, label: Label) -> None:
    """A weight must be multiplied instead: a consumer."""

  def mark(
    self, tag: str, label: Label, groups: Any = None, shifts: bool = False
  ) -> None:
    """What the channels pass.

    Args:
      tag: 'linear' (the same for all channels), 'gain' (a parameter for each),
        'times' (another value for each), 'sign' (ReLU and the like), 'dot' (a
        product of two activations), 'split' (a weight that keeps groups of
        channels apart).
      label: the channels.
      groups: for 'dot' and 'split', the channels of each group.
      shifts: whether a constant added to a channel comes through unchanged.
    """

  def offset(self, op: Op, position: int, value: float) -> None:
    """A constant is added to the labelled parameter (a gain of 1 + g)."""


def same(a: Label, b: Label) -> bool:
  """Whether two labels of one value agree."""
  try:
    a, b = np.broadcast_arrays(a, b)
  except ValueError:
    return False
  return bool(np.array_equal(a, b))


def narrow(label: Label) -> Label:
  """The same label with every axis along which it is constant of size 1."""
  for axis, n in enumerate(label.shape):
    if n > 1:
      first = np.take(label, [0], axis)
      if (label == first).all():
        label = first
  return label


def carried(label: Label) -> tuple[int, ...]:
  """Axes along which the channel changes."""
  return tuple(i for i, n in enumerate(label.shape) if n > 1)


def reshape(label: Label, old: Sequence[int], new: Sequence[int]) -> Label:
  """The label of a value of shape `old` reshaped to `new`."""
  if 0 in old:
    raise BrokenError
  wide, to, i, j = [1] * len(old), [1] * len(new), 0, 0
  while i < len(old) or j < len(new):
    a, b, p, q = i, j, 1, 1
    if i < len(old):
      p, i = old[i], i + 1
    if j < len(new):
      q, j = new[j], j + 1
    while p != q:
      if p < q:
        p, i = p * old[i], i + 1
      else:
        q, j = q * new[j], j + 1
    if any(n > 1 for n in label.shape[a:i]):
      wide[a:i], to[b:j] = old[a:i], new[b:j]
  return narrow(np.broadcast_to(label, wide).reshape(to))


def expand(label: Label, ndim: int) -> Label:
  """A label with leading axes of size 1."""
  return label.reshape((1,) * (ndim - label.ndim) + label.shape)


def only(labels: Labels) -> tuple[int, Label]:
  """The one labelled operand."""
  found = [(i, x) for i, x in enumerate(labels) if x is not None]
  if len(found) != 1:
    raise BrokenError
  return found[0]
