"""The rules of `stream`: how a rotation passes one operation.

A rule knows which operands and results turn already and says which others must;
fixed operands become members of the group (`Touch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quantlab.graph.channels import Label, carried, expand
from quantlab.graph.flat import Atom

if TYPE_CHECKING:
  from quantlab.graph.stream import Search

# Where a gain comes in: region, operation, operand.
Gain = tuple[int, int, int]

# One result for each element: constant where the operands are.
ELEMENTWISE = (
  'add',
  'sub',
  'mul',
  'div',
  'max',
  'min',
  'sqrt',
  'rsqrt',
  'square',
  'integer_pow',
  'neg',
  'convert_element_type',
  'copy',
)


class MixedError(Exception):
  """A value that does not turn with the stream; says why."""


class Value(NamedTuple):
  """A value that turns.

  Attributes:
    label: which channel each element belongs to (see `channels`).
    gains: the gains it was multiplied by; it turns once they are one.
    product: the product of two streams.
  """

  label: Label
  gains: frozenset[Gain] = frozenset()
  product: bool = False


class Touch(NamedTuple):
  """A fixed operand that is turned with the stream, or a gain.

  Attributes:
    region: number of the region.
    op: the operation that takes it in.
    position: as which operand.
    atom: the value, of which `label` is.
    label: its channels.
    role: 'kernel', 'bias', 'consumer' or 'gain'.
    gains: what multiplied the stream that it meets.
    offset: a constant added to it before use (a gain of 1 + g).
  """

  region: int
  op: int
  position: int
  atom: Atom
  label: Label
  role: str
  gains: frozenset[Gain] = frozenset()
  offset: float = 0.0


class Step:
  """One operation, looked at once.

  Args:
    search: what is known.
    region: number of the region.
    index: of the operation.
  """

  def __init__(self, search: Search, region: int, index: int):
    self.search, self.k, self.index = search, region, index
    self.level = search.levels[region]
    self.op = self.level.flat.ops[index]
    self.ins = [search.get(region, a) for a in self.op.ins]
    self.outs = [search.get(region, v) for v in self.op.outs]

  def _known(self) -> Value:
    """What an operand is, or else the result."""
    known = [v for v in (*self.ins, *self.outs) if v is not None]
    best = next((v for v in self.ins if v is not None), known[0])
    rank = len(self.level.shape(self.op.outs[0]))
    return best._replace(label=expand(best.label, rank))

  def _constant(self, k: int, label: Label) -> bool:
    return self.search.constant(self.k, self.op.ins[k], label)

  def _operand(self, k: int, value: Value) -> None:
    if value.product and self.ins[k] is None:
      raise MixedError('something else is added to its square')
    self.search.demand(self.k, self.op.ins[k], value)

  def _result(self, value: Value, k: int = 0) -> None:
    self.search.set(self.k, self.op.outs[k], value)


class Contractions(Step):
  """Sums over axes and products with weights."""

  def _reduce(self) -> None:
    """Over the channels what is left does not turn; else it is a stream."""
    axes = tuple(self.op.eqn.params['axes'])
    [value] = self.ins
    if value is None:
      out = self.outs[0]
      assert out is not None
      self._operand(0, out._replace(label=np.expand_dims(out.label, axes)))
      return
    if not set(carried(value.label)) & set(axes):
      self._result(value._replace(label=value.label.squeeze(axes)))
      return
    if not set(carried(value.label)) <= set(axes):
      raise MixedError('its channels are normalized in groups')
    if value.gains:
      raise MixedError(self.search.after_gain(value.gains))
    self.search.norms = True
    self.search.mean |= not value.product

  def _dot(self) -> None:
    (contract, batch) = self.op.eqn.params['dimension_numbers']
    left, right = self.ins
    if left is not None and right is not None:
      self._inner(left, right, contract)
      return
    ranks = [len(self.level.shape(a)) for a in self.op.ins]
    free = [
      [a for a in range(n) if a not in (*contract[k], *batch[k])]
      for k, n in enumerate(ranks)
    ]
    starts = (len(batch[0]), len(batch[0]) + len(free[0]))
    for k in (0, 1):
      value = self.ins[k]
      if value is not None:
        self._through(k, value, contract, free[k], starts[k])
    out = self.outs[0]
    if out is not None and self.ins == [None, None]:
      self._written(out, free, starts, ranks)

  def _inner(self, a: Value, b: Value, contract) -> None:
    """The inner product of two streams stays as it is."""
    if a.gains or b.gains:
      raise MixedError(self.search.after_gain(a.gains | b.gains))
    places = dict(zip(*contract, strict=True))
    if (
      a.product
      or b.product
      or any(
        x not in places or a.label.shape[x] != b.label.shape[places[x]]
        for x in carried(a.label)
      )
    ):
      raise MixedError('it is contracted with itself')
    self.search.norms = True

  def _through(self, k, value, contract, free, start) -> None:
    """A weight takes the stream in, or rows of it are mixed."""
    axes = carried(value.label)
    if value.product:
      raise MixedError('its square is contracted')
    if set(axes) <= set(free):
      shape = [1] * len(self.level.shape(self.op.outs[0]))
      for i, axis in enumerate(free):
        shape[start + i] = value.label.shape[axis]
      self._result(value._replace(label=value.label.reshape(shape)))
      return
    if not set(axes) <= set(contract[k]):
      raise MixedError('its channels are split into batches or heads')
    other = self.op.ins[1 - k]
    if not self.level.fixed(other):
      raise MixedError('an activation contracts it, not a weight')
    shape = [1] * len(self.level.shape(other))
    places = dict(zip(contract[k], contract[1 - k], strict=True))
    order = [places[a] for a in axes]
    if order != sorted(order):
      raise MixedError('a weight takes its channels in another order')
    for axis in axes:
      shape[places[axis]] = value.label.shape[axis]
    label = value.label.reshape(shape)
    mine = value._replace(label=label)
    self.search.meet(self.k, self.index, 1 - k, mine, 'consumer')

  def _written(self, out: Value, free, starts, ranks) -> None:
    """The outputs of a weight, or a mixture of rows of a stream."""
    axes = carried(out.label)
    for k in (0, 1):
      here = {starts[k] + i: axis for i, axis in enumerate(free[k])}
      if not set(axes) <= set(here):
        continue
      shape = [1] * ranks[k]
      for place, axis in here.items():
        shape[axis] = out.label.shape[place]
      value = out._replace(label=out.label.reshape(shape))
      if self.search.demand(self.k, self.op.ins[k], value):
        return
      self.search.meet(self.k, self.index, k, value, 'kernel')
      return
    raise MixedError('it is made of heads, or by a product of activations')

  def _conv(self) -> None:
    p = self.op.eqn.params
    numbers = p['dimension_numbers']
    lhs, rhs = self.ins
    if (
      p['feature_group_count'] != 1
      or p['batch_group_count'] != 1
      or rhs is not None
      or not self.level.fixed(self.op.ins[1])
    ):
      raise MixedError('it passes a convolution in groups')
    shape = [1] * len(self.level.shape(self.op.ins[1]))
    if lhs is None:
      value, role = self.outs[0], 'kernel'
      assert value is not None
      axis, mine = numbers.rhs_spec[0], numbers.out_spec[1]
    else:
      value, role = lhs, 'consumer'
      axis, mine = numbers.rhs_spec[1], numbers.lhs_spec[1]
    if carried(value.label) != (mine,) or value.product:
      raise MixedError('a convolution moves along its channels')
    shape[axis] = value.label.shape[mine]
    label = value.label.reshape(shape)
    self.search.meet(self.k, self.index, 1, value._replace(label=label), role)
