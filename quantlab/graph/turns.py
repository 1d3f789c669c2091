"""The rules of `stream`, operation by operation (see `turning`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

from quantlab.graph.backward import ARITHMETIC, BACK
from quantlab.graph.channels import BrokenError, Label, carried
from quantlab.graph.forward import RULES
from quantlab.graph.turning import (
  Contractions,
  Gain,
  MixedError,
  Touch,
  Value,
)

_SUMS = ('add', 'sub', 'add_any')
_LAYOUT = (
  'copy',
  'copy_p',
  'stop_gradient',
  'optimization_barrier',
  'sharding_constraint',
  'constrain',
  'reduce_precision',
  'neg',
  'convert_element_type',
  'transpose',
  'reshape',
  'squeeze',
  'expand_dims',
  'broadcast_in_dim',
  'slice',
  'split',
  'dynamic_slice',
  'gather',
  'rev',
  'pad',
  'unstack',
)


class Turn(Contractions):
  """How a rotation passes one operation."""

  def run(self) -> None:
    name = self.op.name
    if name == 'scan':
      self.search.scan(self.k, self.index)
    elif name in _SUMS:
      self._sum()
    elif name in ('mul', 'div'):
      self._scale()
    elif name in ('square', 'integer_pow'):
      self._square()
    elif name == 'reduce_sum':
      self._reduce()
    elif name == 'dot_general':
      self._dot()
    elif name == 'conv_general_dilated':
      self._conv()
    elif name in ('concatenate', 'select_n'):
      self._one_of()
    elif name in _LAYOUT:
      self._layout()
    else:
      raise MixedError(f"it passes '{name}'")

  # Sums -----------------------------------------------------------------------

  def _sum(self) -> None:
    """Streams, biases, and what is the same for all channels (a mean)."""
    value = self._known()
    others = []
    for k, atom in enumerate(self.op.ins):
      if self.ins[k] is None and self._constant(k, value.label):
        if not self.level.zero(atom):
          if value.gains or value.product:
            raise MixedError('a value for all channels is added after a gain')
          self.search.mean = True
      elif self.level.fixed(atom):
        if value.product:
          raise MixedError('a parameter is added to its square')
        self.search.meet(self.k, self.index, k, value, 'bias')
      else:
        others.append(k)
    if len(others) > 1:
      if value.gains:
        raise MixedError(self.search.after_gain(value.gains))
      self.search.sums = True
    for k in others:
      self._operand(k, value)
    self._result(value)

  def _one_of(self) -> None:
    """One value beside another, or one of two."""
    first = 1 if self.op.name == 'select_n' else 0
    if any(v is not None for v in self.ins[:first]):
      raise MixedError("it decides in a 'where'")
    value = next(v for v in (*self.ins, *self.outs) if v is not None)
    if not first and self.op.eqn.params['dimension'] in carried(value.label):
      raise MixedError('its channels are concatenated')
    for k in range(first, len(self.op.ins)):
      atom = self.op.ins[k]
      if not self.level.fixed(atom):
        self._operand(k, value)
      elif not self.level.zero(atom):
        if first:
          raise MixedError("a 'where' replaces parts of it by a constant")
        if value.gains:
          raise MixedError(self.search.after_gain(value.gains))
        self.search.meet(self.k, self.index, k, value, 'bias')
    self._result(value)

  # Products -------------------------------------------------------------------

  def _scale(self) -> None:
    """A factor for all channels, a gain, or the product of two streams."""
    left, right = self.ins
    if left is not None and right is not None:
      self._product(left, right)
      return
    value = self._known()
    known = [k for k in (0, 1) if self.ins[k] is not None]
    if not known:
      known = [k for k in (0, 1) if not self._constant(k, value.label)]
      if len(known) != 1 or self.level.fixed(self.op.ins[known[0]]):
        self._refuse_gain(known, value)
    k = known[0]
    if self.op.name == 'div' and k:
      raise MixedError('something is divided by it')
    gains = self._gains(1 - k, value.label)
    if gains and (value.product or value.gains):
      raise MixedError(self.search.after_gain(gains))
    if gains and self.op.name == 'div':
      raise MixedError('it is divided by a parameter')
    self._operand(k, value)
    self._result(value._replace(gains=value.gains | gains))

  def _refuse_gain(self, factors: Sequence[int], value: Value) -> NoReturn:
    """What is written has a factor for each channel: a norm's gain?"""
    for k in factors:
      with contextlib.suppress(MixedError):
        gains = self._gains(k, value.label)
        if gains:
          break
    else:
      raise MixedError('what is added to it has a factor for each channel')
    raise MixedError(self.search.after_gain(gains))

  def _product(self, a: Value, b: Value) -> None:
    if a.gains or b.gains:
      raise MixedError(self.search.after_gain(a.gains | b.gains))
    if self.op.name == 'div' or a.product or b.product:
      raise MixedError('a power of it is taken')
    self._result(Value(self._known().label, product=True))

  def _square(self) -> None:
    [value] = self.ins
    if value is None or self.op.eqn.params.get('y', 2) != 2:
      raise MixedError(f"it passes '{self.op.name}'")
    self._product(value, value)

  def _gains(self, k: int, label: Label) -> frozenset[Gain]:
    """The gains in a factor; a norm's scale is often multiplied by it first."""
    found: list[Touch] = []
    todo: list[Any] = [(self.index, k, label, None)]
    while todo:
      index, k, label, top = todo.pop()
      op = self.level.flat.ops[index]
      atom = op.ins[k]
      if self.search.constant(self.k, atom, label):
        continue
      made = self.level.made.get(atom) if isinstance(atom, int) else None
      if self.level.fixed(atom) and top is None:
        top = (index, k)
      inner = self.level.flat.ops[made] if made is not None else None
      if top is not None and (inner is None or inner.name in ('add', 'slice')):
        found.append(self._gain(top, atom, label))
        continue
      if inner is None or (
        inner.name == 'div'
        and not self.search.constant(self.k, inner.ins[1], label)
      ):
        raise MixedError('it has a factor for each channel that is no gain')
      for position, part in self._behind(inner, atom, label):
        todo.append((made, position, part, top))
    for touch in found:
      self.search.gains[touch[:3]] = touch
      self.search.touches[self.k, self.index].append(touch)
    return frozenset(t[:3] for t in found)

  def _behind(self, op, atom, label):
    """The operands that carry the channels of a factor."""
    if op.name in ('mul', 'div'):
      rank = label.ndim
      return [
        (k, label)
        for k, a in enumerate(op.ins)
        if len(self.level.shape(a)) == rank
      ]
    if op.name not in BACK or op.name in ARITHMETIC:
      raise MixedError('it has a factor for each channel that is no gain')
    try:
      return BACK[op.name](self.level, op, op.outs.index(atom), label)
    except BrokenError:
      raise MixedError('its channels are rearranged in a gain') from None

  def _gain(self, top, atom, label) -> Touch:
    """A gain, or 1 + a gain."""
    offset, made = 0.0, self.level.made.get(atom)
    if made is not None and self.level.flat.ops[made].name == 'add':
      op = self.level.flat.ops[made]
      plain = [k for k, a in enumerate(op.ins) if isinstance(a, int)]
      if len(plain) != 1:
        raise MixedError('its gain is a sum of parameters')
      offset, atom = float(op.ins[1 - plain[0]].val), op.ins[plain[0]]
    index, k = top
    return Touch(self.k, index, k, atom, label, 'gain', offset=offset)

  # Layout ---------------------------------------------------------------------

  def _layout(self) -> None:
    labels = [v and v.label for v in self.ins]
    value = next((v for v in self.ins if v is not None), None)
    if value is not None:
      try:
        found = RULES[self.op.name](_Scene(self.level), self.op, labels)
      except BrokenError:
        self._stuck()
      for k, label in enumerate(found):
        if label is not None:
          self._result(value._replace(label=label), k)
      return
    for k, out in enumerate(self.outs):
      if out is not None:
        self._back(k, out)

  def _back(self, k: int, out: Value) -> None:
    """Whose rearrangement a value is: a stream's, or a lookup in a table."""
    name, label = self.op.name, out.label
    axes = carried(label)
    if name == 'gather':
      parts = [(0, self._table(label))]
    elif name in ('slice', 'split', 'dynamic_slice'):
      shapes = [self.level.shape(a) for a in (self.op.ins[0], self.op.outs[k])]
      if any(shapes[0][a] != shapes[1][a] for a in axes):
        self._stuck()
      parts = [(0, label)]
    elif name in BACK:
      try:
        parts = BACK[name](self.level, self.op, k, label)
      except BrokenError:
        self._stuck()
    else:
      self._stuck()
    for position, part in parts:
      value = out._replace(label=part)
      if not self.search.demand(self.k, self.op.ins[position], value):
        role = 'kernel' if name == 'gather' else 'bias'
        self.search.meet(self.k, self.index, position, value, role)

  def _table(self, label: Label) -> Label:
    """The label of the operand of a gather."""
    p, shape = self.op.eqn.params, self.level.shape(self.op.ins[0])
    d = p['dimension_numbers']
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = [a for a in range(len(shape)) if a not in gone]
    places = dict(zip(d.offset_dims, kept, strict=True))
    new = [1] * len(shape)
    for axis in carried(label):
      if (
        axis not in places
        or p['slice_sizes'][places[axis]] != (shape[places[axis]])
      ):
        self._stuck()
      new[places[axis]] = label.shape[axis]
    return label.reshape(new)

  def _stuck(self) -> NoReturn:
    raise MixedError(f"'{self.op.name}' takes its channels apart")


class _Scene:
  """A scene for rules that only rearrange."""

  def __init__(self, level):
    self.shape, self.fixed = level.shape, level.fixed
    self.zero, self.averages = level.zero, level.averages

  def mark(self, tag, label, groups=None, shifts=False):
    pass
