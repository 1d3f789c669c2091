"""Unrolling a scan over stacked layers, in the flat view."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantlab.graph import _jaxpr
from quantlab.graph.flat import (
  Atom,
  Fact,
  Flat,
  Leaf,
  Op,
  producers,
  scan_facts,
  unchanged,
)

# Elementwise operations that may be applied to a layer's slice instead.
_SLICED_FIRST = ('convert_element_type', 'copy', 'stop_gradient', 'neg')


class Unrolled(NamedTuple):
  """A program with one scan replaced by its layers, one after another.

  Attributes:
    flat: the new program.
    breaks: positions between the layers.
    longer: how many operations it has more.
    renamed: what the scan's results are called now.
  """

  flat: Flat
  breaks: list[int]
  longer: int
  renamed: dict[int, Atom]


def unroll(
  flat: Flat,
  index: int,
  known: dict[int, Fact],
  sites_of: Callable[[Op], Sequence[str]],
) -> Unrolled:
  """Unrolls the scan that is operation `index`; `flat` is not changed."""
  op = flat.ops[index]
  [(jaxpr, consts)] = _jaxpr.inner_jaxprs(op.eqn)
  n_const, n_carry = _jaxpr.scan_counts(op.eqn)
  new = dataclasses.replace(
    flat,
    ops=flat.ops[:index],
    avals=list(flat.avals),
    leaves=dict(flat.leaves),
    consts=dict(flat.consts),
  )
  made = producers(flat)
  carry = list(op.ins[n_const : n_const + n_carry])
  breaks: list[int] = []
  after = scan_facts(flat, op, known, sites_of)
  for k in set(range(n_carry)) - set(unchanged(flat, op)):
    before = known[carry[k]] if isinstance(carry[k], int) else Fact()
    kind = _entering(before, after[k])
    if kind is not None:
      var = new.like(jaxpr.invars[n_const + k])
      new.emit('enter', [carry[k]], [var], fn=_enter, key=kind)
      carry[k] = var
      if kind == 'stream' and not before.inputs:
        # The layers' sites must see it come from outside their block.
        breaks = [len(new.ops)]
  if breaks:
    breaks = [len(new.ops)]
  length = op.eqn.params['length']
  ys = {}
  for step in range(length):
    layer = length - 1 - step if op.eqn.params['reverse'] else step
    xs = [_slice(new, made, a, layer) for a in op.ins[n_const + n_carry :]]
    args = [*op.ins[:n_const], *carry, *xs]
    outs = new.walk(
      jaxpr, consts, args, (*(op.address or ()), 0), (*op.outer, op.eqn)
    )
    carry, ys[layer] = outs[:n_carry], outs[n_carry:]
    breaks.append(len(new.ops))
  breaks.pop()
  renamed: dict[int, Atom] = dict(zip(op.outs[:n_carry], carry, strict=True))
  for k, var in enumerate(op.outs[n_carry:]):
    new.emit('stack', [ys[i][k] for i in range(length)], [var], fn=_stack)
  longer = len(new.ops) - index - 1
  new.ops += [
    dataclasses.replace(o, ins=rename(o.ins, renamed))
    for o in flat.ops[index + 1 :]
  ]
  new.outs = list(rename(flat.outs, renamed))
  return Unrolled(new, breaks, longer, renamed)


def _entering(before: Fact, after: Fact) -> str | None:
  """How a carry enters the first layer: as the others will know it."""
  if after.stream and not before.stream:
    return 'stream'
  if not (after.stream or after.params or before.inputs):
    return 'context'  # a counter
  return None


def rename(atoms: Iterable[Atom], renamed: dict[int, Atom]) -> tuple[Atom, ...]:
  return tuple(renamed.get(a, a) if isinstance(a, int) else a for a in atoms)


def _slice(flat: Flat, made: dict[int, int], var: int, layer: int) -> int:
  """The part of a stacked value that belongs to one layer."""
  aval = flat.avals[var]
  if var in flat.leaves:
    leaf = flat.leaves[var]
    sliced = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
    return flat.leaf(Leaf(leaf.number, (*leaf.layer, layer)), sliced)
  out = flat.var(aval.shape[1:], aval.dtype, aval.weak_type)
  op = flat.ops[made[var]] if var in made else None
  if op is not None and op.name in _SLICED_FIRST:
    part = _slice(flat, made, op.ins[0], layer)
    flat.ops.append(dataclasses.replace(op, ins=(part,), outs=(out,)))
    return out
  fn = functools.partial(_take, layer)
  flat.emit('layer', [var], [out], fn=fn, key=layer)
  return out


def _take(layer, values):
  return [lax.index_in_dim(values[0], layer, keepdims=False)]


def _enter(values):
  return [jnp.asarray(v) for v in values]


def _stack(values):
  return [jnp.stack(values)]
