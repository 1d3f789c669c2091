"""Residual streams: the parameters that one rotation of the channels changes.

A stream is a sum that weights write into (and tables, positions, biases) and
that is read through norms, whose results go to weights alone. With the norms'
gains folded into those weights, t' = t R for an orthogonal R with R 1 = 1
leaves the function as it was: writers are multiplied by R, readers by its
inverse (QuaRot, arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from quantlab.graph import flat as flat_lib
from quantlab.graph import tracing
from quantlab.graph.backward import OUTSIDE
from quantlab.graph.channels import BrokenError, Label, narrow
from quantlab.graph.pairs import Member, Pair
from quantlab.graph.regions import Origin, Region, merge, regions
from quantlab.graph.stream import Search
from quantlab.graph.turning import Gain, MixedError, Touch


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
  """A norm's gain and the weights that take it in.

  Attributes:
    gain: path of the gain.
    pair: where to move it (scale by gain + offset), or None.
    offset: a constant that the program adds to the gain.
    why: why it cannot be moved, or None. Does not matter where it is one.
  """

  gain: str
  pair: Pair | None
  offset: float = 0.0
  why: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """A residual stream, or what could have been one.

  Attributes:
    source: the site that was followed.
    channels: how many channels it has.
    pair: all parameters to rotate, of kind 'residual'; None if it cannot be.
    folds: gains that must be one before.
    keeps: whether the rotation must keep the vector of ones (LayerNorm).
    sites: ids of the products that read it.
    written: ids of the products that write it.
    why: why it cannot be rotated, or None.
  """

  source: str
  channels: int
  pair: Pair | None = None
  folds: tuple[Fold, ...] = ()
  keeps: bool = False
  sites: tuple[str, ...] = ()
  written: tuple[str, ...] = ()
  why: str | None = None


def streams(
  apply: Callable, params: Any, *args: Any, **kwargs: Any
) -> tuple[Stream, ...]:
  """All streams of `apply(params, *args, **kwargs)`, in program order."""
  traced, _, _ = tracing.Tracer(apply)(params, args, kwargs)
  return of_traced(traced)


def of_traced(traced: tracing.Traced) -> tuple[Stream, ...]:
  """All streams of a traced function, then those refused, by reason."""
  flat = flat_lib.flatten(traced.program, traced.constant_leaf)
  levels = list(regions(flat))
  numbers = {id(level): k for k, level in enumerate(levels)}
  bodies = {
    (numbers[id(level.parent)], level.at): k
    for k, level in enumerate(levels)
    if level.parent is not None
  }
  found: list[Stream] = []
  refused: list[tuple[Search, Stream]] = []
  taken: set[tuple[int, int]] = set()
  done: set[tuple[int, int]] = set()
  for k, index, var, label, site in _starts(traced, levels):
    if (k, index) in done or label.size < 2:
      continue
    search, why = Search(levels, bodies, traced.paths), None
    try:
      search.run(k, var, label)
    except MixedError as error:
      why = str(error)
    if not (search.sums or search.norms):
      continue
    done |= {
      place
      for place, touches in search.touches.items()
      if any(t.role == 'kernel' for t in touches)
    }
    try:
      if why is None:
        found.append(_Group(traced, levels, search).stream(site))
    except MixedError as error:
      why = str(error)
    if why is None:
      taken |= set(search.values)
    elif search.sums:
      refused.append((search, Stream(site, label.size, why=why)))
  # What fails where another stream passes says nothing; one reason is enough.
  for search, stream in refused:
    known = {s.why for s in found}
    if stream.why not in known and not taken & set(search.values):
      found.append(stream)
  return tuple(found)


def _starts(traced, levels) -> Iterator[tuple[int, int, int, Label, str]]:
  """The outputs of weights: (region, operation, variable, label, site)."""
  for k, level in enumerate(levels):
    for index, op in enumerate(level.flat.ops):
      site = traced.analysis.at.get(op.address or ())
      if site is None or site.side is None:
        continue
      shape = [1] * len(level.shape(op.outs[0]))
      for axis in _outputs(op, 1 if site.side == 'rhs' else 0, shape):
        shape[axis] = level.shape(op.outs[0])[axis]
      label = np.arange(int(np.prod(shape))).reshape(shape)
      yield k, index, op.outs[0], label, site.id


def _outputs(op, side: int, out) -> tuple[int, ...]:
  """Axes of a product's result that are the weight's own."""
  p = op.eqn.params
  if op.name == 'gather':
    return tuple(p['dimension_numbers'].offset_dims)
  if op.name == 'conv_general_dilated':
    return (p['dimension_numbers'].out_spec[1],)
  if op.name != 'dot_general':
    return ()
  contract, batch = p['dimension_numbers']
  rank = len(op.eqn.invars[side].aval.shape)
  count = rank - len(contract[side]) - len(batch[side])
  start = len(out) - count if side else len(batch[0])
  return tuple(range(start, start + count))


@dataclasses.dataclass
class _Part:
  """A parameter as a member of the group, with all its uses."""

  origin: Origin
  index: Label
  touches: list[Touch]

  @property
  def role(self) -> str:
    roles = {t.role for t in self.touches}
    return next(r for r in ('gain', 'consumer', 'kernel', 'bias') if r in roles)


class _Group:
  """The parameters behind what a search touched."""

  def __init__(self, traced, levels: list[Region], search: Search):
    self.traced, self.levels, self.search = traced, levels, search
    self.n = search.channels
    self.parts = self._parts()

  def stream(self, source: str) -> Stream:
    readers = [p for p in self.parts if p.role == 'consumer']
    producers = [p for p in self.parts if p.role in ('kernel', 'bias')]
    reads, writes = self._sites('consumer'), self._sites('kernel')
    if not (readers and writes):
      raise MixedError(
        'no weight reads it' if writes else 'no weight writes it'
      )
    pair = Pair(
      kind='residual',
      channels=self.n,
      loops=(),
      source=source,
      producers=tuple(self._member(p, p.role) for p in producers),
      consumers=tuple(self._member(p, 'kernel') for p in readers),
      allows=frozenset({'rotate'}),
    )
    folds = tuple(self._folds())
    return Stream(source, self.n, pair, folds, self.search.mean, reads, writes)

  def _sites(self, role: str) -> tuple[str, ...]:
    """Ids of the products that meet the stream in a role."""
    at = self.traced.analysis.at
    places = sorted(
      {t[:2] for p in self.parts for t in p.touches if t.role == role}
    )
    ops = [self.levels[k].flat.ops[i] for k, i in places]
    return tuple(at[op.address].id for op in ops if op.address in at)

  # Members --------------------------------------------------------------------

  def _parts(self) -> list[_Part]:
    """One for each parameter; refuses what has other uses."""
    found: dict[int, _Part] = {}
    for (k, root), (label, touches) in self._roots().items():
      level = self.levels[k]
      label = _filled(label)
      known = {(t.op, t.position) for t in touches}
      for use in level.terminals(root):
        if use not in known and level.touches(root, use, label):
          raise MixedError(
            f'{self.search.name(touches[0])} is also used elsewhere'
          )
      try:
        origins = level.origins(root, label, self.n)
      except BrokenError:
        raise MixedError(
          f'{self.search.name(touches[0])} is also used elsewhere'
        ) from None
      for origin in origins:
        if origin.number in found:
          raise MixedError(
            f'{self.traced.paths[origin.number]!r} is used in several loops'
          )
        roles = {t.role for t in touches}
        if 'gain' in roles and len(roles) > 1:
          raise MixedError(
            f'{self.traced.paths[origin.number]!r} is a gain and more'
          )
        index = self._index(origin)
        found[origin.number] = _Part(origin, index, touches)
    return list(found.values())

  def _roots(self):
    """Label and touches of every root, by (region, variable)."""
    found: dict[tuple[int, int], tuple[Label, list[Touch]]] = {}
    for touch in (t for ts in self.search.touches.values() for t in ts):
      level = self.levels[touch.region]
      if not level.plain(touch.atom):
        raise MixedError(f'{self.search.name(touch)} is no parameter as it is')
      try:
        for root, label in level.pull(touch.atom, touch.label).items():
          old, uses = found.get((touch.region, root), (None, []))
          joined = merge(old, label)
          found[touch.region, root] = (joined, [*uses, touch])
      except BrokenError:
        raise MixedError(
          f'{self.search.name(touch)} is no parameter as it is, or used in two '
          'ways'
        ) from None
    return found

  def _index(self, origin: Origin) -> Label:
    """Which channel each element belongs to; the same in every layer."""
    label = origin.label
    index = narrow(np.where(label < 0, -1, label % self.n))
    if index.size % self.n == 0:
      rows = index.reshape(-1, self.n)
      whole = (rows == np.arange(self.n)).all(1) | (rows < 0).all(1)
      if whole.all():
        return index
    raise MixedError(
      f'{self.traced.paths[origin.number]!r} holds its channels in another '
      'order'
    )

  def _member(
    self, part: _Part, role: str, index: Label | None = None
  ) -> Member:
    at = self.traced.analysis.at
    first = part.touches[0]
    op = self.levels[first.region].flat.ops[first.op]
    site = at.get(op.address or ())
    return Member(
      path=self.traced.paths[part.origin.number],
      index=part.index if index is None else index,
      role=role,
      site=site.id if site and role == 'kernel' else None,
      offset=first.offset,
    )

  # Gains ----------------------------------------------------------------------

  def _folds(self) -> Iterator[Fold]:
    for part in self.parts:
      if part.role == 'gain':
        yield self._fold(part)

  def _fold(self, gain: _Part) -> Fold:
    path = self.traced.paths[gain.origin.number]
    keys: set[Gain] = {t[:3] for t in gain.touches}
    members: list[tuple[_Part, Member]] = [
      (gain, self._member(gain, 'gain', gain.origin.label))
    ]
    offset, why = members[0][1].offset, None
    if len({t.offset for t in gain.touches}) > 1:
      why = f'{path!r} is used with different constants added'
    for part in self.parts:
      met = [t for t in part.touches if t.role != 'gain' and t.gains & keys]
      if not met:
        continue
      name = self.traced.paths[part.origin.number]
      role = 'kernel' if part.role == 'consumer' else part.role
      if len(met) < len(part.touches):
        why = (
          f'{name!r}, which would take the gain {path!r} in, is used without '
          'it too (a tied embedding?)'
        )
      if part.origin.loops != gain.origin.loops:
        why = (
          f'{name!r}, which would take the gain {path!r} in, is not in the '
          'same loops'
        )
      members.append((part, self._member(part, role, part.origin.label)))
    if why is not None:
      return Fold(path, None, offset, why)
    pair = Pair(
      kind='norm',
      channels=self.n,
      loops=gain.origin.loops,
      source=path,
      producers=tuple(m for p, m in members if p.role != 'consumer'),
      consumers=tuple(m for p, m in members if p.role == 'consumer'),
      allows=frozenset({'scale'}),
    )
    return Fold(path, pair, offset)


def _filled(label: Label) -> Label:
  """Whole rows instead of those that one call reads (of a position table)."""
  for axis, n in enumerate(label.shape):
    top = label.max(axis, keepdims=True)
    if n > 1 and ((label == top) | (label == OUTSIDE)).all():
      label = top
  return label
