"""Pairs: where a scale per channel can be moved from one weight to the next.

A pair is read off the dataflow: the channels of a parameter (a norm's gain, a
weight's outputs) are followed until every use of them ends in a weight that
contracts them. Dividing the producers by s and multiplying the consumers by s
leaves the function as it was (arXiv 1906.04721, 2211.10438).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from quantlab.graph import flat as flat_lib
from quantlab.graph import tracing
from quantlab.graph.channels import carried
from quantlab.graph.finder import Finder, Found
from quantlab.graph.regions import regions


class Bias(NamedTuple):
  """The bias added to a consumer's product.

  Attributes:
    path: its path.
    outputs: which output of the product each of its elements belongs to.
    kernel: which output each element of the consumer belongs to.
  """

  path: str
  outputs: np.ndarray
  kernel: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """A parameter that takes part in a pair.

  Attributes:
    path: its path.
    index: which channel each of its elements belongs to: broadcasts to the
      parameter, -1 where it stays as it is. Over the pair's loops, channel c
      of layer l counts l * channels + c.
    role: 'kernel', 'gain' or 'bias'.
    site: the product it is the weight of.
    offset: a constant the program adds to it before use (a gain of 1 + g).
    bias: of a consumer, the bias added to its product, if it has one.
  """

  path: str
  index: np.ndarray
  role: str
  site: str | None = None
  offset: float = 0.0
  bias: Bias | None = None

  @property
  def axes(self) -> tuple[int, ...]:
    """Axes of the parameter along which the channel changes."""
    return carried(self.index)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """Channels between producers and consumers.

  Attributes:
    kind: 'norm' (a norm's gain and all it feeds), 'linear', 'conv', 'v_out'
      (values to the output projection, across attention) or 'up_down' (the
      linear branch of a gated MLP).
    channels: how many channels there are (in one layer).
    loops: lengths of the layer loops; a scale has the shape
      (*loops, channels).
    source: the site that makes the channels, or the path of the norm's gain.
    producers: what is divided by the scale.
    consumers: what is multiplied by it.
    allows: 'scale' (positive, per channel), 'shift' (a constant per channel
      moved into the consumers' biases), 'rotate' (an orthogonal matrix, one
      for each head).
    heads: how many equal runs of channels must not be mixed.
    residual: the channels also enter a sum, so that nothing can be folded.
    shifted: path of the bias that takes a shift, where one is allowed.
  """

  kind: str
  channels: int
  loops: tuple[int, ...]
  source: str
  producers: tuple[Member, ...]
  consumers: tuple[Member, ...]
  allows: frozenset[str]
  heads: int = 1
  residual: bool = False
  shifted: str | None = None

  @property
  def sites(self) -> tuple[str, ...]:
    """Ids of the products that take the channels in."""
    return tuple(m.site for m in self.consumers if m.site)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of a scale."""
    return (*self.loops, self.channels)

  def __repr__(self) -> str:
    names = ', '.join(m.path for m in self.consumers)
    more = ', residual' if self.residual else ''
    return (
      f'Pair({self.kind}, {self.source} -> {names}, {self.shape}, '
      f'{"/".join(sorted(self.allows)) or "not foldable"}{more})'
    )


def pairs(
  apply: Callable, params: Any, *args: Any, **kwargs: Any
) -> tuple[Pair, ...]:
  """All pairs of `apply(params, *args, **kwargs)`, in program order."""
  traced, _, _ = tracing.Tracer(apply)(params, args, kwargs)
  return of_traced(traced)


def of_traced(traced: tracing.Traced) -> tuple[Pair, ...]:
  """All pairs of a traced function."""
  flat = flat_lib.flatten(traced.program, traced.constant_leaf)
  levels = list(regions(flat))
  result: list[Pair] = []
  for region in levels:
    finder = Finder(traced.analysis, region, levels)
    here: dict[Any, tuple[int, Pair]] = {}
    for found in finder.run():
      pair = _pair(found, traced.paths)
      # A BatchNorm's gain, found first, speaks for the kernel before it.
      key = frozenset(
        (m.path, m.index.shape, (m.index >= 0).tobytes())
        for m in pair.consumers
      )
      here.setdefault(key, (found.order, pair))
    result += [p for _, p in sorted(here.values(), key=lambda item: item[0])]
  return tuple(result)


def _pair(found: Found, paths: tuple[str, ...]) -> Pair:
  members = [
    Member(
      path=paths[m.number],
      index=m.index,
      role=m.role,
      site=m.site,
      offset=m.offset,
      bias=m.bias and Bias(paths[m.bias[0]], *m.bias[1:]),
    )
    for m in found.members
  ]
  consumers = tuple(
    m for m, raw in zip(members, found.members, strict=True) if raw.consumer
  )
  producers = tuple(m for m in members if m not in consumers)
  heads, allows = _heads(found), set()
  if not found.residual:
    allows.add('scale')
    if found.shift is not None and all(m.bias for m in consumers):
      allows.add('shift')
    if heads and _rotates(found, members, heads):
      allows.add('rotate')
  return Pair(
    kind=_kind(found),
    channels=found.channels,
    loops=found.loops,
    source=found.source or producers[0].path,
    producers=producers,
    consumers=consumers,
    allows=frozenset(allows),
    heads=heads or 1,
    residual=found.residual,
    shifted=paths[found.shift] if found.shift is not None else None,
  )


def _kind(found: Found) -> str:
  tags = {tag for tag, _ in found.marks}
  if found.kind == 'norm':
    return 'norm'
  if found.kind == 'conv' or found.into_conv:
    return 'conv'
  if 'dot' in tags:
    return 'v_out'
  return 'up_down' if 'times' in tags else 'linear'


def _heads(found: Found) -> int:
  """How many runs of channels are kept apart; 0 if they are no runs."""
  heads = 1
  for tag, groups in found.marks:
    if tag in ('dot', 'split'):
      first = np.full(found.channels, -1)
      for row in range(len(groups) - 1, -1, -1):
        inside = groups[row][groups[row] >= 0]
        first[inside] = row
      rank = np.unique(first, return_inverse=True)[1].reshape(-1)
      count = int(rank.max()) + 1
      if found.channels % count or not np.array_equal(
        rank, np.arange(found.channels) // (found.channels // count)
      ):
        return 0
      heads = max(heads, count)
  return heads


def _rotates(found: Found, members: list[Member], heads: int) -> bool:
  """Whether channels pass unmixed and unscaled, in whole runs."""
  if any(tag in ('gain', 'times', 'sign') for tag, _ in found.marks):
    return False
  if not all(m.plain for m in found.members):
    return False
  if any(m.role == 'gain' or m.offset for m in members):
    return False
  run = found.channels // heads
  if run == 1:
    return False
  for member in members:
    index = member.index.reshape(-1)
    if index.size % run:
      return False
    rows = index.reshape(-1, run)
    whole = rows[:, :1] + np.arange(run)
    left = (rows < 0).all(1)
    if not ((rows == whole).all(1) & (rows[:, 0] % run == 0) | left).all():
      return False
  return True


def shared_inputs(
  apply: Callable, params: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[str, ...], ...]:
  """Groups of two and more sites whose activation is the same value."""
  traced, _, _ = tracing.Tracer(apply)(params, args, kwargs)
  return shared_of_traced(traced)


def shared_of_traced(traced: tracing.Traced) -> tuple[tuple[str, ...], ...]:
  """The groups of a traced function, each in program order."""
  flat = flat_lib.flatten(traced.program, traced.constant_leaf)
  groups: dict[Any, list[str]] = {}
  for k, region in enumerate(regions(flat)):
    for op in region.flat.ops:
      site = traced.analysis.at.get(op.address or ())
      if site is None or site.side is None or site.kind == 'gather':
        continue
      atom = region.stripped(op.ins[0 if site.side == 'rhs' else 1])
      groups.setdefault((k, atom), []).append(site.id)
  return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)
