"""Which axes of a parameter an intermediate value consists of.

A value that is a parameter whose axes were only permuted, split, merged,
sliced or joined is a `View` of it: quantizing the parameter along the right
axes is then the same as quantizing the value, and a quantized parameter can be
carried to its product by changing metadata. Any other value computed from
parameters is an effective weight T(w) (design, section 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
  """A factor of one parameter axis; `stride` counts the minor elements."""

  axis: int
  size: int
  stride: int


Dims = tuple[tuple[Piece, ...], ...]


@dataclasses.dataclass(frozen=True)
class View:
  """A layout-only function of parameter leaves.

  Attributes:
    leaves: the parameter, or several joined along axis `joined`.
    dims: per axis of the value, the parameter-axis pieces it consists of,
      major first; one tuple per leaf.
    loops: parameter axes that enclosing scans have sliced away, outermost
      first.
    joined: axis of the value along which the leaves are concatenated.
  """

  leaves: tuple[int, ...]
  dims: tuple[Dims, ...]
  loops: tuple[int, ...] = ()
  joined: int | None = None

  @classmethod
  def whole(cls, leaf: int, shape: Sequence[int]) -> View:
    return cls(
      (leaf,), (tuple((Piece(i, n, 1),) for i, n in enumerate(shape)),)
    )

  def permute(self, order: Sequence[int]) -> View:
    dims = tuple(tuple(d[i] for i in order) for d in self.dims)
    joined = None if self.joined is None else list(order).index(self.joined)
    return dataclasses.replace(self, dims=dims, joined=joined)

  def reshape(self, shape: Sequence[int]) -> View | None:
    """The same elements in row-major order, or None if pieces are cut."""
    if self.joined is not None:
      return None
    pieces = [p for d in self.dims[0] for p in d if p.size != 1]
    dims = []
    for n in shape:
      taken, left = [], n
      while left > 1:
        if not pieces:
          return None
        piece = pieces.pop(0)
        if left % piece.size == 0:
          taken.append(piece)
          left //= piece.size
        elif piece.size % left == 0:  # cut a piece: major part here
          minor = piece.size // left
          taken.append(Piece(piece.axis, left, piece.stride * minor))
          pieces.insert(0, Piece(piece.axis, minor, piece.stride))
          left = 1
        else:
          return None
      dims.append(_merged(taken))
    return dataclasses.replace(self, dims=(tuple(dims),))

  def squeeze(self, axes: Sequence[int]) -> View | None:
    if self.joined is not None:
      return None
    kept = [i for i in range(len(self.dims[0])) if i not in axes]
    return self.permute(kept)

  def insert(self, axes: Sequence[int]) -> View | None:
    """New axes of length one at positions `axes` of the result."""
    if self.joined is not None:
      return None
    dims = list(self.dims[0])
    for axis in sorted(axes):
      dims.insert(axis, ())
    return dataclasses.replace(self, dims=(tuple(dims),))

  def cut(self, axis: int, size: int) -> View | None:
    """A contiguous part of one axis that is a whole parameter axis."""
    if self.joined is not None:
      return None
    pieces = self.dims[0][axis]
    if len(pieces) != 1 or pieces[0].stride != 1:
      return None
    dims = list(self.dims[0])
    dims[axis] = (pieces[0]._replace(size=size),)
    return dataclasses.replace(self, dims=(tuple(dims),))

  def scan(self) -> View | None:
    """The view that a scan's body sees: the leading axis sliced away."""
    if self.joined is not None or not self.dims[0]:
      return None
    pieces = self.dims[0][0]
    if len(pieces) != 1:
      return None
    return dataclasses.replace(
      self, dims=(self.dims[0][1:],), loops=(*self.loops, pieces[0].axis)
    )

  def axes(self, which: Sequence[int], part: int = 0) -> tuple[int, ...]:
    """Parameter axes that make up the value's axes `which`, in order."""
    pieces = [p for i in which for p in self.dims[part][i]]
    return tuple(sorted({p.axis for p in pieces}))


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
  """Neighbouring pieces that together are one piece of their axis."""
  out: list[Piece] = []
  for p in pieces:
    last = out[-1] if out else None
    if last and last.axis == p.axis and last.stride == p.stride * p.size:
      out[-1] = Piece(p.axis, last.size * p.size, p.stride)
    else:
      out.append(p)
  return tuple(out)


def join(views: Sequence[View | None], axis: int) -> View | None:
  """Concatenation of whole views along one axis."""
  if any(v is None or v.joined is not None or v.loops for v in views):
    parts = [v for v in views if v is not None]
    if len(parts) != len(views) or any(v.joined is not None for v in parts):
      return None
  parts = [v for v in views if v is not None]
  if len({v.loops for v in parts}) != 1:
    return None
  return View(
    tuple(v.leaves[0] for v in parts),
    tuple(v.dims[0] for v in parts),
    parts[0].loops,
    axis,
  )


def order(view: View, dims: Sequence[int]) -> tuple[int, ...]:
  """The axes `dims` of a value, sorted as the parameter stores them."""

  def key(i):
    pieces = view.dims[0][i]
    return (pieces[0].axis, -pieces[0].stride) if pieces else (-1, 0)

  return tuple(sorted(dims, key=key))


# Layout-only operations ------------------------------------------------------

FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


def _cut(eqn, view):
  """Contiguous parts of axes."""
  strides = eqn.params.get('strides')
  if strides is not None and any(s != 1 for s in strides):
    return None
  old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  for axis, (a, b) in enumerate(zip(old, new, strict=True)):
    if a != b and view is not None:
      view = view.cut(axis, b)
  return view


def _broadcast(eqn, view):
  old, new = eqn.invars[0].aval.shape, eqn.params['shape']
  where = eqn.params['broadcast_dimensions']
  same = all(new[w] == n for w, n in zip(where, old, strict=True))
  added = [i for i in range(len(new)) if i not in where]
  if not same or any(new[i] != 1 for i in added):
    return None
  return view.insert(added)


def _convert(eqn, view):
  kinds = (str(eqn.invars[0].aval.dtype), str(eqn.params['new_dtype']))
  return view if all(k in FLOATS for k in kinds) else None


def _same(eqn, view):
  return view


_RULES: dict[str, Callable[[Any, View], View | None]] = {
  'transpose': lambda e, v: v.permute(e.params['permutation']),
  'reshape': lambda e, v: v.reshape(e.params['new_sizes']),
  'squeeze': lambda e, v: v.squeeze(e.params['dimensions']),
  'expand_dims': lambda e, v: v.insert(e.params['dimensions']),
  'broadcast_in_dim': _broadcast,
  'convert_element_type': _convert,
  'slice': _cut,
  'dynamic_slice': _cut,
  'copy': _same,
  'copy_p': _same,
  'stop_gradient': _same,
  'sharding_constraint': _same,
  'name': _same,
  'device_put': _same,
}


def follow(eqn: Any, views: Sequence[View | None]) -> list[View | None]:
  """Views of an equation's results: None where it is not layout-only."""
  name, count = eqn.primitive.name, len(eqn.outvars)
  if name == 'concatenate':
    return [join(views, eqn.params['dimension'])]
  if name == 'optimization_barrier':
    return list(views)
  first = views[0] if views else None
  if first is None:
    return [None] * count
  if name == 'split':
    axis = eqn.params['axis']
    return [first.cut(axis, n) for n in eqn.params['sizes']]
  rule = _RULES.get(name)
  if rule is None or (count > 1 and rule is not _same):
    return [None] * count
  return [rule(eqn, first)] if count == 1 else list(views)
