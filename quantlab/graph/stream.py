"""Which values turn with a residual stream, when its channels are rotated.

Every value of a program is one of three: a stream t, which becomes t R; the
product of two streams, whose sum over the channels stays as it is, R being
orthogonal; or a value that R leaves alone, such as a norm's mean (R keeps the
vector of ones) and what a weight makes of a stream. Starting at one weight's
output the kinds of all values are inferred, forward and backward: a stream is
added to streams only, whoever writes them is turned too. What R does not pass
(a nonlinearity, heads, the function's output) ends the search with a reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from quantlab.graph import _jaxpr
from quantlab.graph.channels import BrokenError, Label, carried, same
from quantlab.graph.flat import Atom, Op
from quantlab.graph.regions import Region
from quantlab.graph.turning import (
  ELEMENTWISE,
  Gain,
  MixedError,
  Touch,
  Value,
)
from quantlab.graph.turns import Turn

# A region by its number, and an operation or variable in it.
Place = tuple[int, int]


class Search:
  """Infers everything that turns with the output of one weight.

  Args:
    levels: all regions of the program.
    bodies: the region of each scan, by (region, operation).
    paths: names of the parameters.
  """

  def __init__(
    self,
    levels: Sequence[Region],
    bodies: Mapping[Place, int],
    paths: Sequence[str],
  ):
    self.levels, self.bodies, self.paths = levels, bodies, paths
    self.parents = {body: place for place, body in bodies.items()}
    self.values: dict[Place, Value] = {}
    self.touches: dict[Place, list[Touch]] = {}
    self.gains: dict[Gain, Touch] = {}
    self.sums = False  # two streams were added
    self.norms = False  # a sum over the channels was taken
    self.mean = False  # of the channels themselves
    self.channels = 0
    self._todo: list[Place] = []

  def run(self, region: int, var: int, label: Label) -> None:
    """Follows the value `var`; raises `MixedError`."""
    self.channels = label.size
    self.set(region, var, Value(label))
    while self._todo:
      place = heapq.heappop(self._todo)
      self.touches[place] = []
      Turn(self, *place).run()

  # What is known --------------------------------------------------------------

  def get(self, region: int, atom: Atom) -> Value | None:
    if not isinstance(atom, int):
      return None
    return self.values.get((region, atom))

  def demand(self, region: int, atom: Atom, value: Value) -> bool:
    """Says that a value turns; whether it is one that the flow makes."""
    if self.levels[region].fixed(atom):
      return False
    self.set(region, atom, value)
    return True

  def set(self, region: int, var: int, value: Value) -> None:
    """Notes that a value turns, and whom that concerns."""
    level = self.levels[region]
    self._check(level.shape(var), value.label)
    old = self.values.get((region, var))
    if old is not None:
      if old.gains != value.gains:
        raise MixedError(self.after_gain(old.gains | value.gains))
      if old.product != value.product or not same(old.label, value.label):
        raise MixedError('its channels meet in two different orders')
      return
    self.values[region, var] = value
    if var in level.made:
      self._schedule(region, level.made[var])
    for use in level.users.get(var, ()):
      if use is not None:
        self._schedule(region, use[0])
    for k, atom in enumerate(level.flat.outs):
      if atom == var:
        self._leaves(region, k, value)
    if var in level.flat.inputs:
      self._enters(region, level.flat.inputs.index(var), value)

  def _schedule(self, region, op):
    if (region, op) not in self._todo:
      heapq.heappush(self._todo, (region, op))

  def _check(self, shape, label):
    """All channels, in order, mixed with nothing."""
    wide = len(label.shape) == len(shape) and all(
      n in (1, size) for n, size in zip(label.shape, shape, strict=True)
    )
    if not wide or not np.array_equal(
      label.reshape(-1), np.arange(self.channels)
    ):
      raise MixedError(
        'only some of its channels are used, or in another order'
      )

  # Through scans --------------------------------------------------------------

  def _leaves(self, region, k, value):
    """A result of the program, or of a scan's body."""
    if region not in self.parents:
      raise MixedError('the function returns it')
    outer, at = self.parents[region]
    n_const, n_carry = _jaxpr.scan_counts(self.levels[outer].flat.ops[at].eqn)
    if k >= n_carry:
      raise MixedError('a scan stacks it')
    self._carry(outer, at, region, n_const, k, value)

  def _enters(self, region, k, value):
    """An input of the program, or of a scan's body."""
    level = self.levels[region]
    if region not in self.parents:
      raise MixedError('it starts at an input of the function')
    outer, at = self.parents[region]
    n_const, _ = _jaxpr.scan_counts(level.scan.eqn)
    kind = level.kind(k)
    if kind == 'slice':
      raise MixedError('a scan reads slices of it')
    if kind == 'const':
      self.demand(outer, level.outside(k), value)
    else:
      self._carry(outer, at, region, n_const, k - n_const, value)

  def scan(self, region: int, at: int) -> None:
    """A scan that takes the stream in or gives it out."""
    op, inner = self.levels[region].flat.ops[at], self.bodies[region, at]
    n_const, n_carry = _jaxpr.scan_counts(op.eqn)
    for k, atom in enumerate(op.ins):
      value = self.get(region, atom)
      if value is None:
        continue
      if k >= n_const + n_carry:
        raise MixedError('a scan reads slices of it')
      if k >= n_const:
        self._carry(region, at, inner, n_const, k - n_const, value)
      else:
        self.set(inner, self.levels[inner].flat.inputs[k], value)
    for k, var in enumerate(op.outs):
      value = self.get(region, var)
      if value is not None:
        if k >= n_carry:
          raise MixedError('a scan stacks it')
        self._carry(region, at, inner, n_const, k, value)

  def _carry(self, outer, at, inner, n_const, k, value):
    """The four names of what goes round."""
    op, body = self.levels[outer].flat.ops[at], self.levels[inner].flat
    first = op.ins[n_const + k]
    if not self.demand(outer, first, value):
      self.meet(outer, at, n_const + k, value, 'bias')
    self.set(inner, body.inputs[n_const + k], value)
    if not self.demand(inner, body.outs[k], value):
      raise MixedError('a scan replaces it by a constant')
    if self.levels[outer].users.get(op.outs[k]):
      self.set(outer, op.outs[k], value)

  # Fixed operands -------------------------------------------------------------

  def meet(
    self, region: int, op: int, position: int, value: Value, role: str
  ) -> None:
    """A fixed operand that turns too, unless it is zero."""
    level = self.levels[region]
    atom = level.flat.ops[op].ins[position]
    if level.zero(atom):
      return
    self._check(level.shape(atom), value.label)
    touch = Touch(region, op, position, atom, value.label, role, value.gains)
    found = self.touches.setdefault((region, op), [])
    if touch[:3] not in [t[:3] for t in found]:
      found.append(touch)

  def constant(self, region: int, atom: Atom, label: Label) -> bool:
    """Whether a value is the same for all channels."""
    level, axes = self.levels[region], carried(label)
    todo = [(atom, axes)]
    while todo:
      atom, axes = todo.pop()
      shape = level.shape(atom)
      if all(a >= len(shape) or shape[a] == 1 for a in axes):
        continue
      op = self._maker(level, atom)
      if op is None or self.get(region, atom) is not None:
        return False
      if op.name == 'broadcast_in_dim':
        where = tuple(op.eqn.params['broadcast_dimensions'])
        axes = tuple(where.index(a) for a in axes if a in where)
        if axes:
          todo.append((op.ins[0], axes))
      elif op.name in ELEMENTWISE:
        rank = len(shape)
        todo += [(a, axes) for a in op.ins if len(level.shape(a)) == rank]
      else:
        return False
    return True

  def name(self, touch: Touch) -> str:
    """The parameter that a fixed operand comes from, for messages."""
    level = self.levels[touch.region]
    try:
      roots = level.pull(touch.atom, touch.label)
      found = [o for r, x in roots.items() for o in level.origins(r, x, 1)]
    except BrokenError:
      return 'what is computed from parameters or constants'
    return ', '.join(repr(self.paths[o.number]) for o in found)

  def after_gain(self, gains: frozenset[Gain]) -> str:
    """Why what a norm makes must go to weights only."""
    names = ', '.join(sorted({self.name(self.gains[g]) for g in gains}))
    return (
      f'what a norm makes with the gain {names} does not go to weights alone: '
      'it is the stream itself (post-norm), or normalized again'
    )

  @staticmethod
  def _maker(level: Region, atom: Atom) -> Op | None:
    if not isinstance(atom, int) or atom not in level.made:
      return None
    return level.flat.ops[level.made[atom]]
