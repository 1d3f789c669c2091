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

import jax
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


class Finder:
  """Finds the maps after the products of one jaxpr.

  Attributes:
    jaxpr: the equations.
    values: what the analysis knows of each variable.
  """

  def __init__(self, jaxpr: Any, values: Mapping[Any, Any]):
    self.jaxpr = jaxpr
    self.values = values
    self.users: dict[Any, list[int]] = {}
    self.made: dict[Any, Any] = {}
    for i, eqn in enumerate(jaxpr.eqns):
      for var in eqn.invars:
        if not isinstance(var, _jaxpr.Literal):
          self.users.setdefault(var, []).append(i)
      for var in eqn.outvars:
        self.made[var] = eqn
    self.returned = {
      v for v in jaxpr.outvars if not isinstance(v, _jaxpr.Literal)
    }

  def find(self, start: int, axis: int) -> Fold | None:
    """The chain after equation `start`, if it scales channels.

    Args:
      start: index of the product.
      axis: channel axis of its result.
    """
    var, end = self.jaxpr.eqns[start].outvars[0], 0
    chain: list[int] = []
    sides: list[bool] = []
    leaves: set[int] = set()
    while (i := self.only_use(var)) is not None:
      eqn = self.jaxpr.eqns[i]
      other = self.operand(eqn, var, axis)
      if other is None:
        break
      chain.append(i)
      sides.append(eqn.invars[0] is var)
      literal = isinstance(other, _jaxpr.Literal)
      if eqn.primitive.name in ('mul', 'div'):
        end = end if literal else len(chain)
      elif end:  # shifts after the last scale belong to the map
        end = len(chain)
      if not literal:
        leaves |= self.values[other].deps
      var = eqn.outvars[0]
    if not end:
      return None
    kept = tuple(sorted(leaves))
    return Fold(start, tuple(chain[:end]), tuple(sides[:end]), axis, kept)

  def only_use(self, var: Any) -> int | None:
    """Index of the one equation that reads a variable, if there is one."""
    users = self.users.get(var, ())
    return users[0] if len(users) == 1 and var not in self.returned else None

  def operand(self, eqn: Any, var: Any, axis: int) -> Any:
    """The other operand, if the equation is a per-channel map of `var`."""
    name = eqn.primitive.name
    if name not in _OPS or eqn.outvars[0].aval.dtype != var.aval.dtype:
      return None
    left, right = eqn.invars
    other = right if left is var else left
    if name == 'div' and left is not var:
      return None
    if isinstance(other, _jaxpr.Literal):
      return other
    value = self.values[other]
    if value.inputs or value.varies:
      return None
    return other if _per_channel(other, self.made, axis) else None


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
  """The map `y * 1 + 0` of a product of shape `out`, in float32 at least."""
  shape = [n if i == axis else 1 for i, n in enumerate(out)]
  dtype = jnp.promote_types(dtype, jnp.float32)
  return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)


def into_weight(weight: jax.Array, scale: jax.Array, channel: int) -> jax.Array:
  """The weight that gives `product * scale`, in the weight's dtype.

  Args:
    weight: one layer's operand.
    scale: of the product's rank, see `step`.
    channel: output axis of the weight.
  """
  shape = [1] * weight.ndim
  shape[channel] = -1
  return (weight * scale.reshape(shape)).astype(weight.dtype)
