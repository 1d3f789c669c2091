"""Finds, in one region, the channels that can be folded (see `pairs`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from quantlab.graph.channels import BrokenError, Label, narrow
from quantlab.graph.flow import Flow, Part, channels_of
from quantlab.graph.forward import RULES
from quantlab.graph.regions import Origin, Region
from quantlab.graph.sites import Analysis, Site

# What a BatchNorm does before its gain.
_AFFINE = (
  'add',
  'sub',
  'mul',
  'div',
  'convert_element_type',
  'reshape',
  'transpose',
)
_SLICES = (
  'slice',
  'split',
  'unstack',
  'squeeze',
  'reshape',
  'convert_element_type',
)


@dataclasses.dataclass(frozen=True, eq=False)
class FoundMember:
  """A parameter of a pair, by number; see `pairs.Member`."""

  number: int
  index: Label
  role: str
  consumer: bool
  site: str | None
  offset: float
  bias: tuple[int, Label, Label] | None
  plain: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """A pair by parameter numbers; see `pairs.Pair`.

  Attributes:
    order: where in the region it starts.
    kind: 'norm', or the kind of the site that makes the channels.
    source: that site.
    channels: how many channels, in one layer.
    loops: lengths of the layer loops.
    members: its parameters.
    marks: (tag, groups) of what the channels pass.
    residual: they also enter a sum.
    shift: the bias that takes a shift.
    into_conv: a consumer is a convolution.
  """

  order: int
  kind: str
  source: str | None
  channels: int
  loops: tuple[int, ...]
  members: tuple[FoundMember, ...]
  marks: tuple[tuple[str, Any], ...]
  residual: bool
  shift: int | None
  into_conv: bool


@dataclasses.dataclass(frozen=True)
class _Start:
  roots: Mapping[int, Label]
  channels: int
  role: str
  site: str | None
  plain: bool = True


class Finder:
  """Follows every gain and every weight's outputs through a region.

  Args:
    analysis: the sites of the program.
    region: where to look.
    levels: all regions; a parameter used in several cannot be folded.
  """

  def __init__(
    self, analysis: Analysis, region: Region, levels: Sequence[Region]
  ):
    self.analysis, self.region = analysis, region
    holders = [
      leaf.number
      for level in levels
      for var, leaf in level.flat.leaves.items()
      if level.users.get(var)
    ]
    self.spread = {n for n in holders if holders.count(n) > 1}

  def run(self) -> Iterator[Found]:
    for start in self.starts():
      yield from self.follow(start)

  def site(self, index: int) -> Site | None:
    return self.analysis.at.get(self.region.flat.ops[index].address or ())

  # Where to start -------------------------------------------------------------

  def starts(self) -> Iterator[_Start]:
    """Gains first, then the outputs of weights."""
    weights: list[_Start] = []
    kernels: set[int] = set()
    for i, op in enumerate(self.region.flat.ops):
      site = self.site(i)
      if site is None or site.side is None:
        continue
      position = 1 if site.side == 'rhs' else 0
      try:
        label = self.outputs(i, position)
        roots = self.region.pull(op.ins[position], label)
      except BrokenError:
        continue
      kernels |= set(roots)
      if site.kind != 'gather':
        plain = self.region.plain(op.ins[position])
        start = _Start(roots, label.size, 'kernel', site.id, plain)
        weights.append(start)
    for root in self.region.roots():
      for var in self.vectors(root) if root not in kernels else ():
        shape = self.region.shape(var)
        size = max(shape)
        try:
          roots = self.region.pull(var, np.arange(size).reshape(shape))
        except BrokenError:
          continue
        yield _Start(roots, size, 'gain', None)
    yield from weights

  def vectors(self, root: int) -> list[int]:
    """A root if it is a vector, else the vectors sliced out of it."""
    found, todo = [], [root]
    while todo:
      var = todo.pop()
      if sum(n > 1 for n in self.region.shape(var)) == 1:
        found.append(var)
        continue
      for use in self.region.users.get(var, ()):
        op = self.region.flat.ops[use[0]] if use else None
        if op is not None and op.name in _SLICES:
          todo += op.outs
    return found

  def outputs(self, index: int, position: int) -> Label:
    """Numbers the outputs of a weight operand: its axes not contracted."""
    op = self.region.flat.ops[index]
    atom = op.ins[position]
    if not self.region.fixed(atom):
      raise BrokenError
    shape = self.region.shape(atom)
    gone = _contracted(op, position)
    kept = [1 if a in gone else n for a, n in enumerate(shape)]
    return np.arange(int(np.prod(kept))).reshape(kept)

  # Where it goes --------------------------------------------------------------

  def follow(self, start: _Start) -> Iterator[Found]:
    flow = Flow(self.region, start.roots, start.channels)
    if not flow.absorbed or flow.first is None:
      return
    parts = flow.parts()
    kind, source = self.source(flow)
    for part in parts:
      if part.origin.number in self.spread:
        label = part.origin.label
        flow.dead |= {c % start.channels for c in channels_of(label)}
    for members in _components(parts, flow.dead | flow.residual, flow):
      yield self.found(start, flow, parts, members, kind, source, False)
    if kind != 'norm':
      return
    for members in _components(parts, flow.dead, flow):
      if members & flow.residual:
        yield self.found(start, flow, parts, members, kind, source, True)

  def found(self, start, flow, parts, members, kind, source, residual):
    keep = np.full(start.channels, -1)
    keep[sorted(members)] = np.arange(len(members))
    made: list[FoundMember] = []
    bias_ops: set[int | None] = set()
    into_conv = False
    for part in parts:
      index = _restricted(part.origin.label, keep, len(members))
      if (index < 0).all():
        continue
      site = self.site(part.uses[0].op) if part.role == 'consumer' else None
      if site is not None:
        bias_ops |= {t.bias for t in part.uses}
        into_conv |= site.kind == 'conv'
      made.append(self.member(start, part, index, site))
    marks = [
      (
        m.tag,
        None
        if m.groups is None
        else _restricted(m.groups, keep, len(members), False),
      )
      for m in flow.marks
      if m.channels & members
    ]
    return Found(
      order=flow.first,
      kind=kind,
      source=source,
      channels=len(members),
      loops=parts[0].origin.loops,
      members=tuple(made),
      marks=tuple(marks),
      residual=residual,
      shift=_shift(parts, bias_ops, members, start.channels),
      into_conv=into_conv,
    )

  def member(self, start, part: Part, index, site) -> FoundMember:
    role, name, bias = 'bias', None, None
    if part.role == 'seed':
      role, name = start.role, start.site
    elif site is not None:
      role, name = 'kernel', site.id
      if len(part.uses) == 1:
        bias = self.bias(part, *part.uses[0][:2])
    return FoundMember(
      part.origin.number,
      index,
      role,
      part.role == 'consumer',
      name,
      part.offset,
      bias,
      part.plain and (part.role != 'seed' or start.plain),
    )

  def source(self, flow: Flow) -> tuple[str, str | None]:
    """('norm', None), or kind and id of the site that makes the channels."""
    assert flow.first is not None
    op, index = self.region.flat.ops[flow.first], flow.first
    while (site := self.site(index)) is None or site.side is None:
      moving = [a for a in op.ins if not self.region.fixed(a)]
      if op.name not in _AFFINE or len(moving) != 1:
        return 'norm', None
      if moving[0] not in self.region.made:
        return 'norm', None
      index = self.region.made[moving[0]]
      op = self.region.flat.ops[index]
    return site.kind, site.id

  def bias(self, part: Part, index: int, position: int):
    """The bias added to a product, with its outputs and the kernel's."""
    region = self.region
    label = self.outputs(index, position)
    count = label.size
    try:
      op = region.flat.ops[index]
      labels: list[Any] = [None, None]
      labels[position] = label
      kernel = self.alone(op.ins[position], label, count)
      [label] = RULES[op.name](_Silent(region), op, labels)
      while True:
        uses = region.users.get(op.outs[0], [])
        if len(uses) != 1 or uses[0] is None:
          return None
        index, side = uses[0]
        op = region.flat.ops[index]
        if op.name == 'add' and region.fixed(op.ins[1 - side]):
          bias = self.alone(op.ins[1 - side], label, count)
          if kernel.number != part.origin.number or bias.loops != kernel.loops:
            return None
          return bias.number, bias.label, kernel.label
        if op.name not in ('reshape', 'transpose', 'convert_element_type'):
          return None
        [label] = RULES[op.name](_Silent(region), op, [label])
    except BrokenError:
      return None

  def alone(self, atom, label: Label, count: int) -> Origin:
    """The one parameter that a value is, if it has no other use."""
    if not self.region.plain(atom):
      raise BrokenError
    roots = self.region.pull(atom, label)
    for root, mine in roots.items():
      if len(roots) == 1 and len(self.region.terminals(root)) == 1:
        found = self.region.origins(root, mine, count)
        if len(found) == 1 and found[0].number not in self.spread:
          return found[0]
    raise BrokenError


class _Silent:
  """A scene for rules that only rearrange."""

  def __init__(self, region: Region):
    self.shape, self.fixed = region.shape, region.fixed
    self.zero, self.averages = region.zero, region.averages

  def mark(self, tag, label, groups=None, shifts=False):
    pass


def _contracted(op, position) -> tuple[int, ...]:
  """Axes of an operand that a product sums over."""
  p = op.eqn.params
  if op.name == 'dot_general':
    return tuple(p['dimension_numbers'][0][position])
  if op.name == 'conv_general_dilated':
    out = p['dimension_numbers'].rhs_spec[0]
    return tuple(a for a in p['dimension_numbers'].rhs_spec if a != out)
  if op.name == 'ragged_dot_general':
    numbers = p['ragged_dot_dimension_numbers']
    contract = numbers.dot_dimension_numbers[0][position]
    return (*contract, *numbers.rhs_group_dimensions)
  return ()


def _restricted(label, keep, count, thin=True) -> Label:
  """A label of some of the channels, numbered anew."""
  layer, channel = np.divmod(np.maximum(label, 0), len(keep))
  new = np.where(label < 0, -1, keep[channel])
  out = np.where(new < 0, -1, layer * count + new)
  return narrow(out) if thin else out


def _components(
  parts: Sequence[Part], gone: set[int], flow: Flow
) -> list[frozenset[int]]:
  """Sets of live channels that share a consumer."""
  sets: list[set[int]] = []
  for part in parts:
    if part.role != 'consumer':
      continue
    mine = {c % flow.channels for c in channels_of(part.origin.label)} - gone
    if mine:
      touching = [s for s in sets if s & mine]
      sets = [s for s in sets if not s & mine]
      sets.append(mine.union(*touching))
  return [frozenset(s) for s in sets]


def _shift(parts, bias_ops, members, channels) -> int | None:
  """The bias that all channels pass last before every consumer."""
  if len(bias_ops) != 1 or None in bias_ops:
    return None
  [op] = bias_ops
  for part in parts:
    if part.role == 'bias' and any(t.op == op for t in part.uses):
      mine = {c % channels for c in channels_of(part.origin.label)}
      if members <= mine and len(part.uses) == 1 and part.plain:
        return part.origin.number
  return None
