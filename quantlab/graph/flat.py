"""A flat view of a traced program: one list of operations, calls inlined.

Transparent calls (jit, remat, custom rules) are opened up where asked, so that
a value keeps one name from where it is made to where it is used; scan, while,
cond and shard_map stay single operations. Blocks and pairs are read off this
list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from quantlab.graph import _jaxpr
from quantlab.graph.sites import Address, Analysis

# A variable, or a literal of the program.
Atom = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """One operation of a flat program.

  Attributes:
    name: name of the primitive.
    ins: its operands: variables (integers) and literals.
    outs: the variables it makes.
    eqn: the traced equation (None for an operation made here).
    address: where the equation stands in the program, as `Site.address`;
      None for an operation made here.
    outer: the calls around it that were inlined, outermost first.
    fn: what an operation made here computes, of its operands' values.
    key: what tells `fn` from others of that name.
  """

  name: str
  ins: tuple[Atom, ...]
  outs: tuple[int, ...]
  eqn: Any = None
  address: Address | None = None
  outer: tuple[Any, ...] = ()
  fn: Callable[[Sequence[Any]], list[Any]] | None = None
  key: Any = None

  def run(self, values: Sequence[Any]) -> list[Any]:
    """Evaluates the operation, in the contexts of the calls around it."""
    if self.fn is not None:
      return self.fn(values)
    with contextlib.ExitStack() as stack:
      for call in self.outer:
        stack.enter_context(_jaxpr.eqn_context(call))
      return _jaxpr.bind(self.eqn, values)

  @property
  def variables(self) -> tuple[int, ...]:
    return tuple(a for a in self.ins if isinstance(a, int))


class Leaf(NamedTuple):
  """A parameter, or the slice of a stacked one that belongs to a layer."""

  number: int
  layer: tuple[int, ...] = ()


class Fact(NamedTuple):
  """What a value depends on: parameters, inputs, results of sites."""

  params: bool = False
  inputs: bool = False
  stream: bool = False


@dataclasses.dataclass
class Flat:
  """A flat program.

  Attributes:
    ops: in program order.
    avals: shape and dtype of each variable.
    leaves: variables that are parameters.
    consts: variables that are other closed-over arrays.
    inputs: variables of the program's inputs, in order.
    outs: what the program returns.
    constant_leaf: which parameter a closed-over array is, if any.
    inline: whether a call (equation, address) is opened up.
  """

  ops: list[Op]
  avals: list[Any]
  leaves: dict[int, Leaf]
  consts: dict[int, Any]
  inputs: list[int]
  outs: list[Atom]
  constant_leaf: Callable[[Any], int | None]
  inline: Callable[[Any, Address], bool]

  def var(self, shape: Sequence[int], dtype: Any, weak: bool = False) -> int:
    self.avals.append(jax.ShapeDtypeStruct(tuple(shape), dtype, weak_type=weak))
    return len(self.avals) - 1

  def like(self, atom: Any) -> int:
    """A new variable of a jaxpr variable's shape and dtype."""
    aval = atom.aval
    return self.var(aval.shape, aval.dtype, getattr(aval, 'weak_type', False))

  def emit(self, name: str, ins: Sequence[Atom], outs: Sequence[int], **more):
    self.ops.append(Op(name, tuple(ins), tuple(outs), **more))

  def leaf(self, leaf: Leaf, aval: Any) -> int:
    """The variable of a parameter; one for each."""
    for var, known in self.leaves.items():
      if known == leaf:
        return var
    var = self.var(aval.shape, aval.dtype, getattr(aval, 'weak_type', False))
    self.leaves[var] = leaf
    return var

  def shape(self, atom: Atom) -> tuple[int, ...]:
    if isinstance(atom, int):
      return tuple(self.avals[atom].shape)
    return tuple(atom.aval.shape)

  def walk(
    self,
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Atom],
    address: Address,
    outer: tuple[Any, ...] = (),
  ) -> list[Atom]:
    """Appends a jaxpr's equations; `args` are the atoms of its inputs."""
    env: dict[Any, Atom] = dict(zip(jaxpr.invars, args, strict=True))
    for inner, const in zip(jaxpr.constvars, consts, strict=True):
      env[inner] = self._constant(inner, const)

    def read(atom):
      return atom if isinstance(atom, _jaxpr.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
      ins, here = [read(a) for a in eqn.invars], (*address, i)
      if eqn.primitive.name in _jaxpr.CALLS and self.inline(eqn, here):
        outs = self._call(eqn, ins, here, outer)
      else:
        outs = [self.like(v) for v in eqn.outvars]
        self.emit(
          eqn.primitive.name, ins, outs, eqn=eqn, address=here, outer=outer
        )
        if eqn.primitive.name == 'scan':  # what goes round as it came
          for k, source in unchanged(self, self.ops[-1]).items():
            outs[k] = ins[source]
      env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]

  def _constant(self, var, const) -> int:
    index = self.constant_leaf(const)
    if index is not None:
      return self.leaf(Leaf(index), var.aval)
    for known, value in self.consts.items():
      if value is const:
        return known
    new = self.like(var)
    self.consts[new] = const
    return new

  def _call(self, eqn, ins, address, outer):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    fixed = eqn.primitive.name in ('jit', 'pjit') and _jaxpr.has_shardings(eqn)
    if fixed:
      ins = self._constrain(eqn, 'in_shardings', ins, jaxpr.invars)
    outs = self.walk(jaxpr, consts, ins, (*address, 0), (*outer, eqn))
    if fixed:
      outs = self._constrain(eqn, 'out_shardings', outs, jaxpr.outvars)
    return outs

  def _constrain(self, eqn, which, ins, like):
    """One operation for each value, so that none depends on the others."""
    outs = [self.like(v) for v in like]
    for k, (atom, out) in enumerate(zip(ins, outs, strict=True)):
      fn = functools.partial(_constrained, eqn, which, k)
      self.emit('constrain', [atom], [out], fn=fn, key=(id(eqn), which, k))
    return outs


def _constrained(eqn, which, k, values):
  given: list[Any] = [None] * len(eqn.params[which])
  given[k] = values[0]
  return [_jaxpr.constrain(eqn, which, given)[k]]


def flatten(
  program: _jaxpr.Program,
  constant_leaf: Callable[[Any], int | None],
  inline: Callable[[Any, Address], bool] = lambda eqn, address: True,
) -> Flat:
  """The flat view of a traced program."""
  flat = Flat([], [], {}, {}, [], [], constant_leaf, inline)
  args = []
  for i, v in enumerate(program.jaxpr.invars):
    if i < program.num_params:
      args.append(flat.leaf(Leaf(i), v.aval))
    else:
      args.append(flat.like(v))
      flat.inputs.append(args[-1])
  flat.outs = flat.walk(program.jaxpr, program.consts, args, ())
  return flat


def body(flat: Flat, op: Op) -> Flat:
  """The flat body of a scan; its inputs are constants, carries and slices."""
  [(jaxpr, consts)] = _jaxpr.inner_jaxprs(op.eqn)
  inner = Flat([], [], {}, {}, [], [], flat.constant_leaf, flat.inline)
  inner.inputs = [inner.like(v) for v in jaxpr.invars]
  inner.outs = inner.walk(jaxpr, consts, inner.inputs, (*(op.address or ()), 0))
  return inner


def site_ids(analysis: Analysis) -> Callable[[Op], tuple[str, ...]]:
  """Which sites an operation holds: itself, or inside its body."""
  inside: dict[Address, list[str]] = {}
  for site in analysis.sites:
    for n in range(1, len(site.address) + 1):
      inside.setdefault(site.address[:n], []).append(site.id)
  return lambda op: tuple(inside.get(op.address, ())) if op.address else ()


def facts(
  flat: Flat,
  sites_of: Callable[[Op], Sequence[str]],
  given: Mapping[int, Fact] | None = None,
) -> dict[int, Fact]:
  """What every variable depends on; `given` is known of the inputs."""
  known = {var: Fact(params=True) for var in flat.leaves}
  known.update((var, Fact()) for var in flat.consts)
  known.update((var, Fact(inputs=True)) for var in flat.inputs)
  known.update(given or {})
  for op in flat.ops:
    fact = _join([known[v] for v in op.variables])
    fact = fact._replace(stream=fact.stream or bool(sites_of(op)))
    if op.name == 'enter':  # a carry of an unrolled scan
      fact = fact._replace(inputs=True, stream=op.key == 'stream')
    known.update((var, fact) for var in op.outs)
  return known


def scan_facts(
  flat: Flat,
  op: Op,
  known: Mapping[int, Fact],
  sites_of: Callable[[Op], Sequence[str]],
) -> list[Fact]:
  """Facts of a scan's carries, over all rounds, and stacked results."""

  def of(facts, atom):
    return facts[atom] if isinstance(atom, int) else Fact()

  inner = body(flat, op)
  n_const, n_carry = _jaxpr.scan_counts(op.eqn)
  given = [of(known, a) for a in op.ins]
  while True:
    inside = facts(inner, sites_of, dict(zip(inner.inputs, given, strict=True)))
    outs = [of(inside, a) for a in inner.outs]
    carry = given[n_const : n_const + n_carry]
    joined = [_join(f) for f in zip(carry, outs[:n_carry], strict=True)]
    if joined == carry:
      return [*joined, *outs[n_carry:]]
    given[n_const : n_const + n_carry] = joined


def _join(parts: Iterable[Fact]) -> Fact:
  parts = list(parts)
  return Fact(
    any(p.params for p in parts),
    any(p.inputs for p in parts),
    any(p.stream for p in parts),
  )


def unchanged(flat: Flat, op: Op) -> dict[int, int]:
  """Carries of a scan that its body hands on as they came: output -> input."""
  n_const, n_carry = _jaxpr.scan_counts(op.eqn)
  inner = body(flat, op)
  return {
    k: n_const + k
    for k in range(n_carry)
    if inner.outs[k] == inner.inputs[n_const + k]
  }


def producers(flat: Flat) -> dict[int, int]:
  return {var: i for i, op in enumerate(flat.ops) for var in op.outs}
