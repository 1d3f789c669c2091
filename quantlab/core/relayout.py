"""Operations on a logical array that only change its layout.

A logical axis is named by where it lives: ('loop', i), ('k', i) or ('n', i),
the i-th axis of that part of the expanded canonical shape. Every function
takes and returns an `Axes`, or raises `LayoutError` with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from quantlab.core.layout import Layout, LayoutError

Name = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Axes:
  """A layout spelled out for one array.

  Attributes:
    sizes: of the axes of each part, in canonical order.
    order: the logical axes by name.
  """

  sizes: dict[str, tuple[int, ...]]
  order: tuple[Name, ...]

  @classmethod
  def of(cls, layout: Layout, loops: Sequence[int], n: int) -> Axes:
    """Spells out the layout of an array with these loop axes and this N."""
    expanded = layout.expanded(loops, n)
    first, second = len(loops), len(loops) + len(layout.k_shape)
    sizes = {
      'loop': expanded[:first],
      'k': expanded[first:second],
      'n': expanded[second:],
    }
    names = [(part, i) for part in sizes for i in range(len(sizes[part]))]
    return cls(sizes, tuple(names[a] for a in layout.full(len(loops))))

  def layout(self) -> Layout:
    """Undoes `of`."""
    names = [(p, i) for p in self.sizes for i in range(len(self.sizes[p]))]
    full = [names.index(a) - len(names) for a in self.order]
    n = self.sizes['n']
    return Layout.make(
      self.sizes['k'], (-1, *n[1:])[: len(n)], full, len(self.sizes['loop'])
    )

  def size(self, axis: Name) -> int:
    """Length of an axis by its name."""
    return self.sizes[axis[0]][axis[1]]

  @property
  def shape(self) -> tuple[int, ...]:
    """The logical shape."""
    return tuple(map(self.size, self.order))


def transpose(axes: Axes, perm: Sequence[int]) -> Axes:
  """Reorders the logical axes."""
  ndim = len(axes.order)
  wanted = [p % ndim for p in perm]
  if sorted(wanted) != list(range(ndim)):
    raise ValueError(f'{tuple(perm)} does not permute the axes of {axes.shape}')
  return dataclasses.replace(axes, order=tuple(axes.order[p] for p in wanted))


def squeeze(axes: Axes, which: Sequence[int]) -> Axes:
  """Drops axes of length one, except loop axes."""
  drop = {axes.order[a] for a in which}
  for name in drop:
    if axes.size(name) != 1:
      raise ValueError(f'cannot squeeze {tuple(which)} of shape {axes.shape}')
    if name[0] == 'loop':
      raise LayoutError(
        f'axis {axes.order.index(name)} of {axes.shape} is a loop axis, which '
        'scales and codes carry too'
      )
  return _without(axes, drop)


def expand_dims(axes: Axes, which: Sequence[int]) -> Axes:
  """Inserts axes of length one; they become output axes."""
  ndim = len(axes.order) + len(which)
  places = sorted(a % ndim for a in which)
  order, count = list(axes.order), len(axes.sizes['n'])
  for i, place in enumerate(places):
    order.insert(place, ('n', count + i))
  n = axes.sizes['n'] + (1,) * len(places)
  return Axes({**axes.sizes, 'n': n}, tuple(order))


def reshape(axes: Axes, shape: Sequence[int]) -> Axes:
  """Splits and merges axes within the contraction or the output part."""
  shape, old = _resolved(axes, shape), axes.shape
  keep = [i for i, a in enumerate(axes.order) if a[0] == 'loop' or old[i] != 1]
  drop = {a for i, a in enumerate(axes.order) if i not in keep}
  axes = _without(axes, drop)
  ones: list[int] = []
  for group, sizes in _match(axes, shape, ones):
    axes = _regroup(axes, group, sizes, (old, tuple(shape)))
  return expand_dims(axes, ones) if ones else axes


def _resolved(axes: Axes, shape: Sequence[int]) -> list[int]:
  """The new shape with -1 filled in."""
  total, shape = math.prod(axes.shape), list(shape)
  if shape.count(-1) == 1:
    rest = math.prod(s for s in shape if s != -1)
    shape[shape.index(-1)] = total // max(rest, 1)
  if math.prod(shape) != total:
    raise ValueError(f'cannot reshape {axes.shape} to {tuple(shape)}')
  return shape


def _match(axes: Axes, shape: Sequence[int], ones: list[int]):
  """Pairs runs of old axes with runs of new ones of the same product.

  Returns:
    A list of (old names, new sizes), last stored first, so that splitting one
    does not rename those still to come. Places of new axes of length one go
    to `ones`.
  """
  groups, i, j = [], 0, 0
  old = [(a, axes.size(a)) for a in axes.order]
  while j < len(shape):
    if shape[j] == 1 and (i == len(old) or old[i][1] != 1):
      ones.append(j)
      j += 1
      continue
    names, sizes = [old[i][0]], [shape[j]]
    a, b = old[i][1], shape[j]
    i, j = i + 1, j + 1
    while a != b:
      if a < b:
        names.append(old[i][0])
        a, i = a * old[i][1], i + 1
      else:
        if shape[j] == 1:
          ones.append(j)
        else:
          sizes.append(shape[j])
        b, j = b * shape[j], j + 1
    groups.append((names, sizes))
  if i < len(old):
    raise LayoutError(
      f'reshaping {axes.shape} to {tuple(shape)} would drop a loop axis, which '
      'scales and codes carry too'
    )
  return sorted(groups, key=lambda group: group[0][0][1], reverse=True)


def _regroup(
  axes: Axes,
  group: list[Name],
  sizes: list[int],
  shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Axes:
  """Replaces adjacent axes of one part by axes of other sizes."""
  if len(group) == len(sizes) == 1:
    return axes
  part, at = first = group[0]
  if {p for p, _ in group} != {part} or part == 'loop':
    kinds = {'loop': 'loop', 'k': 'contraction', 'n': 'output'}
    found = ' and '.join(sorted({kinds[p] for p, _ in group}))
    raise LayoutError(
      f'reshaping {shapes[0]} to {shapes[1]} mixes {found} axes; only axes '
      'within the contraction or within the output merge or split'
    )
  if [i for _, i in group] != list(range(at, at + len(group))):
    raise LayoutError(
      f'reshaping {shapes[0]} to {shapes[1]} merges axes that are stored in '
      'another order; transpose first'
    )
  grown = len(sizes) - len(group)
  stored = axes.sizes[part]
  stored = (*stored[:at], *sizes, *stored[at + len(group) :])
  order: list[Name] = []
  for p, i in axes.order:
    if (p, i) == first:
      order += [(part, at + d) for d in range(len(sizes))]
    elif (p, i) not in group:
      order.append((p, i + grown * (p == part and i > at)))
  return Axes({**axes.sizes, part: stored}, tuple(order))


def _without(axes: Axes, drop: set[Name]) -> Axes:
  """Removes axes of length one and renumbers the rest."""
  sizes, moved = {}, {}
  for part, lengths in axes.sizes.items():
    kept = [i for i in range(len(lengths)) if (part, i) not in drop]
    moved.update({(part, i): (part, new) for new, i in enumerate(kept)})
    sizes[part] = tuple(lengths[i] for i in kept)
  return Axes(sizes, tuple(moved[a] for a in axes.order if a not in drop))
