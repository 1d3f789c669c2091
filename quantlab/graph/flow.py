"""Where the channels of one parameter go, and who can take a scale off them.

A flow starts at a parameter whose elements are divided by a scale per channel
and follows the channels forward. Biases on the way are divided too; a weight
that contracts the channels is multiplied instead, and the scale is gone. A
channel that meets anything else (a residual sum, a nonlinearity, the output)
is dead: it cannot be scaled.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from quantlab.graph.channels import BrokenError, Label
from quantlab.graph.flat import Atom, Op
from quantlab.graph.forward import RULES
from quantlab.graph.regions import Origin, Region, merge


class Touch(NamedTuple):
  """A fixed operand that takes part in the fold.

  Attributes:
    op: the operation.
    position: which operand.
    label: of the operand.
    bias: the operation that added the last bias before it, if nothing but
      rearrangements lies between (a shift comes through too); else None.
    plain: whether the operand is a parameter, rearranged at most.
  """

  op: int
  position: int
  label: Label
  bias: int | None
  plain: bool


class Mark(NamedTuple):
  """Something that channels passed; see `channels.Scene.mark`."""

  tag: str
  channels: frozenset[int]
  groups: Any


class Part(NamedTuple):
  """A parameter that a fold changes.

  Attributes:
    origin: the parameter and which channel its elements belong to.
    role: 'seed', 'bias' or 'consumer'.
    uses: where it is used (none for a seed).
    plain: see `Touch`; a seed's is for the one who planted it to know.
    offset: what the program adds to it before use (a gain of 1 + g).
  """

  origin: Origin
  role: str
  uses: tuple[Touch, ...]
  plain: bool
  offset: float


def channels_of(label: Label) -> frozenset[int]:
  return frozenset(np.unique(label[label >= 0]).tolist())


class Flow:
  """Follows labels through one region; the `Scene` of the rules.

  Args:
    region: where.
    labels: the labelled roots.
    channels: how many channels there are.
  """

  def __init__(
    self, region: Region, labels: Mapping[int, Label], channels: int
  ):
    self.region = region
    self.channels = channels
    self.seeds = {v: np.maximum(x, -1) for v, x in labels.items()}
    self.labels = dict(self.seeds)
    self.joined: list[Touch] = []
    self.absorbed: list[Touch] = []
    self.marks: list[Mark] = []
    self.offsets: dict[int, float] = {}
    self.residual: set[int] = set()
    self.dead: set[int] = set()
    self.first: int | None = None
    # Which operation added the last bias, while only rearranged since.
    self.stage: dict[int, int | None] = {}
    self._run()

  # The walk -------------------------------------------------------------------

  def _run(self):
    todo: list[int] = []
    seen: set[int] = set()

    def schedule(var):
      for use in self.region.users.get(var, ()):
        if use is None:
          self._kill(self.labels[var])
        elif use[0] not in seen:
          seen.add(use[0])
          heapq.heappush(todo, use[0])

    for var in self.seeds:
      schedule(var)
    while todo:
      index = heapq.heappop(todo)
      op = self.region.flat.ops[index]
      self.op, self.index = op, index
      for var, label in zip(op.outs, self._step(op), strict=True):
        if label is not None:
          self.labels[var] = label
          schedule(var)

  def _step(self, op: Op):
    labels = [
      self.labels.get(a) if isinstance(a, int) else None for a in op.ins
    ]
    labels = [self._alive(x, self.dead) for x in labels]
    if sum(x is not None for x in labels) > 1:
      # One half of a fused weight may meet the other (a gate and its product).
      labels = [self._alive(x, self.residual) for x in labels]
    if all(x is None for x in labels):
      return [None] * len(op.outs)
    mine = [a for a, x in zip(op.ins, labels, strict=True) if x is not None]
    if self.first is None and not all(map(self.region.fixed, op.outs)):
      self.first = self.index
    stages = {self.stage.get(a) for a in mine}
    self.now = stages.pop() if len(stages) == 1 else None
    try:
      if op.name not in RULES:
        raise BrokenError
      outs = RULES[op.name](self, op, labels)
    except BrokenError as error:
      for label in labels:
        if label is not None:
          self._kill(label, error.residual)
      outs = [None] * len(op.outs)
    for var in op.outs:
      self.stage[var] = self.now
    return outs

  def _alive(self, label: Label | None, gone: set[int]) -> Label | None:
    """A label without dead channels, None if nothing is left of it."""
    if label is None:
      return None
    if gone:
      label = np.where(np.isin(label, list(gone)), -1, label)
    return label if (label >= 0).any() else None

  def _kill(self, label: Label, residual: bool = False):
    found = channels_of(label)
    if residual:
      self.residual |= found
    else:
      self.dead |= found

  # What the rules ask and tell ------------------------------------------------

  def shape(self, atom: Atom) -> tuple[int, ...]:
    return self.region.shape(atom)

  def fixed(self, atom: Atom) -> bool:
    return self.region.fixed(atom)

  def zero(self, atom: Atom) -> bool:
    return self.region.zero(atom)

  def join(self, op: Op, position: int, label: Label) -> None:
    self.joined.append(self._touch(op, position, label))
    streams = op.name == 'add' and not self.fixed(op.ins[1 - position])
    self.now = self.index if streams else None

  def absorb(self, op: Op, position: int, label: Label) -> None:
    self.absorbed.append(self._touch(op, position, label))

  def _touch(self, op: Op, position: int, label: Label) -> Touch:
    plain = self.region.plain(op.ins[position])
    return Touch(self.index, position, label, self.now, plain)

  def averages(self, atom: Atom, axis: int) -> bool:
    return self.region.averages(atom, axis)

  def mark(
    self, tag: str, label: Label, groups: Any = None, shifts: bool = False
  ) -> None:
    self.now = self.now if shifts else None
    self.marks.append(Mark(tag, channels_of(label), groups))

  def offset(self, op: Op, position: int, value: float) -> None:
    var = op.ins[position]
    root = var
    while root not in self.seeds:
      made = self.region.made.get(root)
      source = self.region.flat.ops[made] if made is not None else None
      if source is None or source.name not in (
        'reshape',
        'broadcast_in_dim',
        'convert_element_type',
        'squeeze',
      ):
        raise BrokenError
      root = source.ins[0]
    if op.name != 'add' or self.region.terminals(root) != self.region.terminals(
      op.outs[0]
    ):
      raise BrokenError
    self.offsets[root] = value

  # The parameters behind ------------------------------------------------------

  def parts(self) -> list[Part]:
    """All parameters that take part; kills what cannot be folded."""
    found, groups = [], self._roots()
    for root, (label, role, uses) in groups.items():
      known = {(t.op, t.position) for t in uses}
      if role != 'seed' and any(
        self.region.touches(root, use, label)
        for use in self.region.terminals(root)
        if use not in known
      ):
        self._kill(label)
        continue
      try:
        origins = self.region.origins(root, label, self.channels)
      except BrokenError:
        self._kill(label)
        continue
      offset = self.offsets.get(root, 0.0)
      plain = all(t.plain for t in uses)
      found += [Part(o, role, tuple(uses), plain, offset) for o in origins]
    if len({p.origin.loops for p in found}) > 1:
      self.dead |= set(range(self.channels))
    return found

  def _roots(self):
    """Label, role and uses of every root."""
    groups: dict[int, tuple[Label, str, list[Touch]]] = {
      root: (label, 'seed', []) for root, label in self.seeds.items()
    }
    touches = [(t, 'bias') for t in self.joined]
    touches += [(t, 'consumer') for t in self.absorbed]
    for touch, role in touches:
      atom = self.region.flat.ops[touch.op].ins[touch.position]
      try:
        for root, label in self.region.pull(atom, touch.label).items():
          old, known, uses = groups.get(root, (label, role, []))
          if known != role:
            self._kill(old)
            raise BrokenError
          groups[root] = (merge(old, label), role, [*uses, touch])
      except BrokenError:
        self._kill(touch.label)
    return groups
