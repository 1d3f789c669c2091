"""A piece of a flat program, closed over nothing but its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab.graph import _jaxpr
from quantlab.graph.flat import Atom, Fact, Flat, producers

# An inputs-only value this much larger than what it is made of (a causal mask
# of a padding mask, a one-hot of ids) is made again instead of handed over.
_EXPANDS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
  """Operations [low, high) of a program, from one stream to the next.

  Attributes:
    flat: the program.
    known: facts of its variables.
    low: first operation.
    high: one past the last operation.
    first: variables that come in.
    last: what goes out.
  """

  flat: Flat
  known: dict[int, Fact]
  low: int
  high: int
  first: Sequence[int]
  last: Sequence[Atom]

  def aval(self, atom: Atom) -> jax.ShapeDtypeStruct:
    if isinstance(atom, int):
      return self.flat.avals[atom]
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)

  @functools.cached_property
  def made(self) -> dict[int, int]:
    return producers(self.flat)

  def collect(self) -> tuple[list[int], list[int], list[int]]:
    """(operations, parameter variables, context variables) it needs.

    Besides its own operations, those before it that depend on no site: what
    comes from parameters or constants is computed again, what comes from the
    inputs alone is context.
    """
    flat, ops, leaves, context = self.flat, set(), set(), set()
    effects = [
      i
      for i in range(self.low, self.high)
      if flat.ops[i].eqn is not None and _jaxpr.has_effects(flat.ops[i].eqn)
    ]
    ops.update(effects)
    todo = [a for a in self.last if isinstance(a, int)]
    todo += [v for i in effects for v in flat.ops[i].variables]
    seen = {*self.first, *flat.consts}
    while todo:
      var = todo.pop()
      if var in seen:
        continue
      seen.add(var)
      if var in flat.leaves:
        leaves.add(var)
      elif var not in self.made or self.is_context(var):
        context.add(var)
      else:
        ops.add(self.made[var])
        todo += flat.ops[self.made[var]].variables
    ordered = sorted(leaves, key=lambda v: (flat.leaves[v], v))
    return sorted(ops), ordered, sorted(context)

  def is_context(self, var: int) -> bool:
    fact = self.known[var]
    if fact.stream or fact.params or not fact.inputs:
      return False
    parts = set(self.flat.ops[self.made[var]].variables)
    small = sum(size(self.flat, v) for v in parts)
    return not parts or size(self.flat, var) < _EXPANDS * small

  def evaluate(
    self, ops: Sequence[int], variables: Sequence[int], values: Sequence[Any]
  ) -> list[Any]:
    """What goes out, of the values of parameters, stream and context."""
    env = dict(zip(variables, values, strict=True))
    return _evaluate(self.flat, ops, env, self.last)

  def key(self, ops: Sequence[int], variables: Sequence[int]) -> Any:
    """Equal for pieces that make the same program of the same equations."""
    order: dict[int, int] = {}

    def token(atom):
      if not isinstance(atom, int):
        return (str(atom.aval), repr(atom.val))
      if atom in self.flat.consts:
        return ('const', id(self.flat.consts[atom]))
      return order.setdefault(atom, len(order))

    names = [token(v) for v in variables]
    steps = []
    for i in ops:
      op = self.flat.ops[i]
      what = (op.name, id(op.eqn), op.key, tuple(map(id, op.outer)))
      steps.append((what, (*map(token, op.ins), *map(token, op.outs))))
    shapes = [str(self.flat.avals[v]) for v in variables]
    return (
      tuple(names),
      tuple(shapes),
      tuple(steps),
      tuple(map(token, self.last)),
    )


def _evaluate(flat, ops, env, outs) -> list[Any]:
  def read(atom):
    if not isinstance(atom, int):
      return jnp.asarray(atom.val, atom.aval.dtype)
    return env[atom] if atom in env else flat.consts[atom]

  for i in ops:
    op = flat.ops[i]
    values = [read(a) if isinstance(a, int) else a.val for a in op.ins]
    env.update(zip(op.outs, op.run(values), strict=True))
  return [read(a) for a in outs]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
  """Values of a program that depend on its inputs alone, as a function."""

  flat: Flat
  variables: tuple[int, ...]

  def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    given = [x for x in jax.tree.leaves((args, kwargs)) if _jaxpr.is_array(x)]
    found = [_jaxpr.abstract(x) for x in given]
    wanted = [self.flat.avals[v] for v in self.flat.inputs]
    if [(x.shape, x.dtype) for x in found] != [
      (x.shape, x.dtype) for x in wanted
    ]:
      raise ValueError(
        f'the blocks were cut for the inputs {_shapes(wanted)} and are given '
        f'{_shapes(found)}; cut the function again for these shapes'
      )
    return self._run(given)

  @functools.cached_property
  def _run(self):
    made = producers(self.flat)
    ops: set[int] = set()
    todo = list(self.variables)
    while todo:
      index = made.get(todo.pop())
      if index is not None and index not in ops:
        ops.add(index)
        todo += self.flat.ops[index].variables
    order = sorted(ops)

    @jax.jit
    def run(values):
      env = dict(zip(self.flat.inputs, values, strict=True))
      return tuple(_evaluate(self.flat, order, env, self.variables))

    return run


def _shapes(avals) -> str:
  return ', '.join(f'{x.dtype}{list(x.shape)}' for x in avals) or 'none'


def size(flat: Flat, var: int) -> int:
  """Bytes of a value."""
  aval = flat.avals[var]
  return aval.size * aval.dtype.itemsize
