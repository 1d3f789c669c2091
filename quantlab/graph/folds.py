"""Per-channel affine maps after a product: where a BatchNorm can be folded.

In inference mode a BatchNorm is `y * a + b` with `a`, `b` known from the
parameters, one value per output channel. It can then be folded: the effective
weight is `w * a`, and `b` is added to the product (arXiv 1806.08342,
section 3.2.2). What is found here is the chain of equations that make up the
map; folding skips them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from quantlab.graph import _jaxpr

_OPS = ('add', 'sub', 'mul', 'div')


@dataclasses.dataclass(frozen=True)
class Fold:
  """A chain of elementwise equations after a product.

  Attributes:
    product: index of the product's equation in its jaxpr.
    chain: indices of the folded equations, in order.
    left: for each, whether the chained value is its left operand.
    axis: channel axis of the product's result.
    leaves: parameters (indices) that the map is computed from.
  """

  product: int
  chain: tuple[int, ...]
  left: tuple[bool, ...]
  axis: int
  leaves: tuple[int, ...]


def find(jaxpr: Any, values: Mapping[Any, Any], start: int, axis: int) -> (
  Fold | None
):
  """The chain after equation `start`, if it scales channels.

  Args:
    jaxpr: the equations around the product.
    values: what the analysis knows of each variable.
    start: index of the product.
    axis: channel axis of its result.
  """
  users = _users(jaxpr)
  made = {v: e for e in jaxpr.eqns for v in e.outvars}
  var, chain, end = jaxpr.eqns[start].outvars[0], [], 0
  sides: list[bool] = []
  leaves: set[int] = set()
  while len(users.get(var, ())) == 1 and users[var][0] is not None:
    i = users[var][0]
    eqn = jaxpr.eqns[i]
    if eqn.primitive.name not in _OPS:
      break
    left, right = eqn.invars
    other = right if left is var else left
    swapped = left is not var
    if swapped and eqn.primitive.name == 'div':
      break
    known = isinstance(other, _jaxpr.Literal) or not values[other].inputs
    if not known or not _per_channel(other, made, axis):
      break
    if eqn.outvars[0].aval.dtype != var.aval.dtype:
      break
    chain.append(i)
    sides.append(not swapped)
    if not isinstance(other, _jaxpr.Literal):
      leaves |= values[other].deps
    scales = eqn.primitive.name in ('mul', 'div')
    if scales and not isinstance(other, _jaxpr.Literal):
      end = len(chain)
    elif end:  # shifts after the last scale belong to the map
      end = len(chain) if eqn.primitive.name in ('add', 'sub') else end
    var = eqn.outvars[0]
  if not end:
    return None
  return Fold(
    start,
    tuple(chain[:end]),
    tuple(sides[:end]),
    axis,
    tuple(sorted(leaves)),
  )


def _users(jaxpr) -> dict[Any, list[int | None]]:
  users: dict[Any, list[int | None]] = {}
  for i, eqn in enumerate(jaxpr.eqns):
    for var in eqn.invars:
      if not isinstance(var, _jaxpr.Literal):
        users.setdefault(var, []).append(i)
  for var in jaxpr.outvars:
    if not isinstance(var, _jaxpr.Literal):
      users.setdefault(var, []).append(None)
  return users


def _per_channel(atom, made, axis) -> bool:
  """Whether a value varies along the channel axis only."""
  if isinstance(atom, _jaxpr.Literal) or not atom.aval.shape:
    return True
  shape = atom.aval.shape
  if all(n == 1 for i, n in enumerate(shape) if i != axis):
    return True
  eqn = made.get(atom)
  if eqn is None or eqn.primitive.name != 'broadcast_in_dim':
    return False
  where = eqn.params['broadcast_dimensions']
  source = eqn.invars[0].aval.shape
  return all(n == 1 or where[i] == axis for i, n in enumerate(source))


def step(eqn: Any, left_is_chain: bool, other: Any, axis: int, ab: Any) -> Any:
  """Updates (a, b) of `y * a + b` by one equation of the chain.

  a and b have the product's rank, of length one but on the channel axis.
  """
  a, b = ab
  p = jnp.asarray(other)
  if p.ndim:
    p = p[tuple(slice(None if i == axis else 1) for i in range(p.ndim))]
  p = p.astype(a.dtype)
  name = eqn.primitive.name
  if name == 'mul':
    return a * p, b * p
  if name == 'div':
    return a / p, b / p
  if name == 'add':
    return a, b + p
  return (a, b - p) if left_is_chain else (-a, p - b)


def identity(out: Sequence[int], axis: int, dtype: Any) -> Any:
  """The map `y * 1 + 0` of a product of shape `out`."""
  shape = [n if i == axis else 1 for i, n in enumerate(out)]
  return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)
