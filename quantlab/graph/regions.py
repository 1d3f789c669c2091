"""The levels of a program in which values flow straight: itself, scan bodies.

A region knows which of its values are fixed (known from parameters and
constants), who uses what, and how a label is pulled back to the parameters it
comes from, out through the scans around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from quantlab.graph import _jaxpr
from quantlab.graph import flat as flat_lib
from quantlab.graph.backward import ARITHMETIC, BACK, OUTSIDE
from quantlab.graph.channels import BrokenError, Label
from quantlab.graph.flat import Atom, Flat

_LAYOUT = (
  'transpose',
  'reshape',
  'squeeze',
  'expand_dims',
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'copy_p',
  'stop_gradient',
  'sharding_constraint',
)

# An operand of an operation; None: the value is returned.
Use = tuple[int, int] | None


class Origin(NamedTuple):
  """A parameter and the label of its elements.

  Attributes:
    number: which parameter.
    label: broadcasts to it; over `loops`, channel c of layer l is l * n + c.
    loops: lengths of the scans it is stacked over, outermost first.
  """

  number: int
  label: Label
  loops: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Region:
  """A flat program or the flat body of a scan inside it.

  Attributes:
    flat: its operations.
    parent: the region around the scan.
    at: which operation of the parent the scan is.
  """

  flat: Flat
  parent: Region | None = None
  at: int = -1

  def __post_init__(self):
    self.made = flat_lib.producers(self.flat)
    self.users: dict[int, list[Use]] = {}
    for i, op in enumerate(self.flat.ops):
      for k, atom in enumerate(op.ins):
        if isinstance(atom, int):
          self.users.setdefault(atom, []).append((i, k))
    for atom in self.flat.outs:
      if isinstance(atom, int):
        self.users.setdefault(atom, []).append(None)
    self._fixed = {*self.flat.leaves, *self.flat.consts}
    if self.parent is not None:
      self._fixed.update(
        var
        for k, var in enumerate(self.flat.inputs)
        if self.kind(k) != 'carry' and self.parent.fixed(self.outside(k))
      )
    for op in self.flat.ops:
      if all(map(self.fixed, op.ins)):
        self._fixed.update(op.outs)

  def kind(self, k: int) -> str:
    """What the k-th input of a scan's body is."""
    n_const, n_carry = _jaxpr.scan_counts(self.scan.eqn)
    if k < n_const:
      return 'const'
    return 'carry' if k < n_const + n_carry else 'slice'

  @property
  def scan(self) -> flat_lib.Op:
    assert self.parent is not None
    return self.parent.flat.ops[self.at]

  def outside(self, k: int) -> Atom:
    return self.scan.ins[k]

  def shape(self, atom: Atom) -> tuple[int, ...]:
    return self.flat.shape(atom)

  def fixed(self, atom: Atom) -> bool:
    return not isinstance(atom, int) or atom in self._fixed

  def zero(self, atom: Atom) -> bool:
    while isinstance(atom, int):
      op = self.flat.ops[self.made[atom]] if atom in self.made else None
      if op is None or op.name not in (
        'broadcast_in_dim',
        'convert_element_type',
        'copy',
        'reshape',
      ):
        return False
      atom = op.ins[0]
    return bool(np.all(np.asarray(atom.val) == 0))

  def roots(self) -> list[int]:
    """Variables that are parameters, or their slices in a scan's body."""
    found = list(self.flat.leaves)
    if self.parent is not None:
      found += [v for v in self.flat.inputs if v in self._fixed]
    return found

  def stripped(self, atom: Atom) -> Atom:
    """The value that another is a rearrangement or a cast of."""
    while isinstance(atom, int) and atom in self.made:
      op = self.flat.ops[self.made[atom]]
      if op.name not in _LAYOUT:
        break
      atom = op.ins[0]
    return atom

  def averages(self, atom: Atom, axis: int) -> bool:
    """Whether a value is e / sum(e) along an axis, like a softmax."""
    quotient = self.maker(atom)
    if quotient is None or quotient.name != 'div':
      return False
    above, below = map(self.uncast, quotient.ins)
    rank, rest = len(self.shape(above)), self.maker(below)
    kept = tuple(a for a in range(rank) if a != axis)
    if (
      rest is None
      or rest.name != 'broadcast_in_dim'
      or tuple(rest.eqn.params['broadcast_dimensions']) != kept
    ):
      return False
    total = self.maker(rest.ins[0])
    return (
      total is not None
      and total.name == 'reduce_sum'
      and tuple(total.eqn.params['axes']) == (axis,)
      and self.uncast(total.ins[0]) == above
    )

  def uncast(self, atom: Atom) -> Atom:
    while isinstance(atom, int) and atom in self.made:
      op = self.flat.ops[self.made[atom]]
      if op.name not in ('convert_element_type', 'copy'):
        break
      atom = op.ins[0]
    return atom

  def maker(self, atom: Atom) -> flat_lib.Op | None:
    """The operation that makes a value, casts aside."""
    atom = self.uncast(atom)
    if not isinstance(atom, int) or atom not in self.made:
      return None
    return self.flat.ops[self.made[atom]]

  def terminals(self, var: int) -> list[Use]:
    """Where a fixed value is used, rearrangements of it followed."""
    found, todo = [], [var]
    while todo:
      for use in self.users.get(todo.pop(), ()):
        op = self.flat.ops[use[0]] if use else None
        if op is not None and op.name in BACK and op.outs[0] in self._fixed:
          todo += op.outs
        else:
          found.append(use)
    return found

  def plain(self, atom: Atom) -> bool:
    """Whether a value is parameters rearranged, no arithmetic done."""
    todo, roots = [atom], set(self.roots())
    while todo:
      var = todo.pop()
      if var in roots:
        continue
      if not isinstance(var, int) or var not in self.made:
        return False
      op = self.flat.ops[self.made[var]]
      if op.name not in BACK or op.name in ARITHMETIC:
        return False
      todo += op.ins
    return True

  def touches(self, root: int, use: Use, label: Label) -> bool:
    """Whether a use of a root reads any of its labelled elements."""
    if use is None:
      return True
    atom = self.flat.ops[use[0]].ins[use[1]]
    try:
      here = np.zeros([1] * len(self.shape(atom)), int)
      read = self.pull(atom, here)[root]
    except BrokenError:
      return True
    return bool(((read != OUTSIDE) & (label >= 0)).any())

  def pull(self, atom: Atom, label: Label) -> dict[int, Label]:
    """The labels of the region's roots that a fixed value is made of."""
    found: dict[int, Label] = {}
    todo = [(atom, label)]
    roots = set(self.roots())
    while todo:
      atom, label = todo.pop()
      if not isinstance(atom, int) or atom in self.flat.consts:
        if (label >= 0).any():
          raise BrokenError
      elif atom in roots:
        found[atom] = merge(found.get(atom), label)
      else:
        op = self.flat.ops[self.made[atom]]
        if op.name not in BACK:
          raise BrokenError
        out = op.outs.index(atom)
        todo += [
          (op.ins[k], part) for k, part in BACK[op.name](self, op, out, label)
        ]
    return found

  def origins(self, root: int, label: Label, channels: int) -> list[Origin]:
    """The parameters behind a root, out through the scans around.

    Args:
      root: a root of this region.
      label: of the root.
      channels: how many channels there are in one layer.
    """
    if root in self.flat.leaves:
      return [Origin(self.flat.leaves[root].number, label, ())]
    assert self.parent is not None
    k = self.flat.inputs.index(root)
    length = self.scan.eqn.params['length']
    loops: tuple[int, ...] = ()
    if self.kind(k) == 'slice':
      shift = np.arange(length).reshape(length, *[1] * label.ndim) * channels
      label = np.where(label[None] < 0, label[None], label[None] + shift)
      channels, loops = channels * length, (length,)
    found = []
    for outer, part in self.parent.pull(self.outside(k), label).items():
      uses = self.parent.terminals(outer)
      if any(u != (self.at, k) for u in uses):
        raise BrokenError
      found += self.parent.origins(outer, part, channels)
    return [o._replace(loops=(*o.loops, *loops)) for o in found]


def merge(a: Label | None, b: Label) -> Label:
  """One label of two uses of a value; broken where they disagree."""
  if a is None:
    return b
  a, b = np.broadcast_arrays(a, b)
  if ((a != b) & (a != OUTSIDE) & (b != OUTSIDE)).any():
    raise BrokenError
  return np.where(a == OUTSIDE, b, a)


def regions(flat: Flat) -> Iterator[Region]:
  """The program and, recursively, the bodies of its scans."""
  todo = [Region(flat)]
  while todo:
    region = todo.pop()
    yield region
    todo += [
      Region(flat_lib.body(region.flat, op), region, i)
      for i, op in enumerate(region.flat.ops)
      if op.name == 'scan'
    ]
