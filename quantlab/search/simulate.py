"""How operands are simulated in a search: one compilation, every choice.

`Options` replaces an operand by what a chosen option makes of it. `Shifts`
leaves it as it is and adds directions with weights t:

    x_t = x + sum_k t_k d_k,   d_k constant

so that derivatives at t = 0 are those of the loss along the errors of
quantization: of the first order dL/dt_k = g' d_k, of the second
d2L/dt_i dt_j = d_i' H_ij d_j, of weights and activations alike.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from quantlab import core
from quantlab.core import QParams, Quantizer

# Quantizers that each operand may take, by (site, role); None is float.
Choices = Mapping[tuple[str, str], Sequence[Quantizer | None]]
_WIDTHS = re.compile(r'u?int\d+')


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
  """`handlers.Simulate`: the leaf 'bits' is the number of an option.

  Integer formats that differ in their width alone are one branch with a
  traced width; other formats are branches of their own.

  Attributes:
    choices: of each operand.
  """

  choices: Choices

  def __call__(self, site, role, x, quantizer, leaves, *, axis, shape):
    """See `handlers.Simulate`; without an option, x as it is."""
    del quantizer, shape
    index = leaves.get('bits')
    if index is None:
      return x
    family, branches = _families(self.choices[site, kind(role)])
    index = jnp.asarray(index)
    width = jnp.array([w for _, w in family], jnp.int32)[index]
    which = jnp.array([b for b, _ in family], jnp.int32)[index]

    def run(branch, x):
      q, traced = branch
      if q is None:
        return x
      given = _given(leaves, q, index)
      bits = width if traced else None
      return core.fake_quantize(x, q, given, axis=axis, bits=bits)

    if not index.ndim:
      calls = [functools.partial(run, b) for b in branches]
      return lax.switch(which, calls, x)
    out = x
    for i, branch in enumerate(branches):
      chosen = (which == i).reshape(*which.shape, *[1] * (x.ndim - which.ndim))
      out = jnp.where(chosen, run(branch, x), out)
    return out

  def each(self, site, role, x, leaves, axis) -> list[jax.Array]:
    """The operand under every option, in order."""
    found = []
    for k, q in enumerate(self.choices[site, kind(role)]):
      if q is None:
        found.append(x)
      else:
        given = _given(leaves, q, jnp.asarray(k))
        found.append(core.fake_quantize(x, q, given, axis=axis))
    return found


def kind(role: str) -> str:
  """'weight' of 'weight:1', the second parameter of a joined weight."""
  return role.partition(':')[0]


def _families(options):
  """(branch, width) of each option, and the branches.

  A branch is (quantizer or None, whether its width is traced).
  """
  family: list[tuple[int, int]] = []
  branches: list[tuple[Quantizer | None, bool]] = []
  for q in options:
    if q is None:
      key: tuple[Quantizer | None, bool] = (None, False)
    elif _WIDTHS.fullmatch(q.format.name):
      wide = 'int8' if q.format.signed else 'uint8'
      key = (dataclasses.replace(q, format=wide), True)
    else:
      key = (q, False)
    if key not in branches:
      branches.append(key)
    family.append((branches.index(key), q.bits if q else 0))
  return family, branches


def _given(leaves, quantizer: Quantizer, index: jax.Array) -> QParams | None:
  """Calibrated parameters of an option: the last axis counts options."""
  if not quantizer.static:
    return None

  def at(name):
    x = leaves[name]
    one = jnp.broadcast_to(
      index.reshape(*index.shape, *[1] * (x.ndim - index.ndim)),
      (*x.shape[:-1], 1),
    )
    return jnp.take_along_axis(x, one, -1)

  zero = None if quantizer.symmetric else at('zero_point')
  return QParams(at('scale'), zero)


@dataclasses.dataclass(frozen=True, eq=False)
class Shifts:
  """`handlers.Simulate`: the leaf 'strength' holds t, one weight a direction.

  The directions are the errors of all options. What flows back to the leaf
  'alpha', if there is one, are the squared norms of the directions.

  Attributes:
    options: gives the errors.
  """

  options: Options

  def __call__(self, site, role, x, quantizer, leaves, *, axis, shape):
    """See `handlers.Simulate`."""
    t = leaves.get('strength')
    if t is None:
      return x
    fixed = lax.stop_gradient(x)
    hats = self.options.each(site, role, fixed, leaves, axis)
    d = jnp.stack([h - fixed for h in hats], -1)
    d = lax.stop_gradient(d)
    loops = t.ndim - 1
    each = t.reshape(*t.shape[:-1], *[1] * (x.ndim - loops), t.shape[-1])
    shifted = x + (d * each.astype(x.dtype)).sum(-1)
    slot = leaves.get('alpha')
    return shifted if slot is None else _squares(shifted, slot, d)


@jax.custom_vjp
def _squares(x: jax.Array, slot: jax.Array, d: jax.Array) -> jax.Array:
  """x; what flows back to the slot is the squared norm of each direction."""
  del slot, d
  return x


def _squares_forward(x, slot, d):
  loops = slot.ndim - 1
  axes = tuple(range(loops, d.ndim - 1))
  return x, (jnp.sum(jnp.square(d.astype(jnp.float32)), axes), d)


def _squares_backward(kept, g):
  norms, d = kept
  return g, norms, jnp.zeros_like(d)


_squares.defvjp(_squares_forward, _squares_backward)


@dataclasses.dataclass(frozen=True)
class Relevance:
  """`handlers.Simulate`: relevance of a product's elements, read backwards.

  The leaf 'alpha' is a slot: what flows back to it is the sum of |R| over the
  elements, R = z dF/dz. The derivative is passed on as the epsilon rule has
  it (S. Bach et al., PLOS ONE 2015, equation 58): R_j = sum_k a_j w_jk R_k /
  (z_k + epsilon sign z_k), which is gradient times input but for the factor
  |z| / (|z| + epsilon) at every product.

  Attributes:
    epsilon: relative to the root mean square of the product.
  """

  epsilon: float = 1e-3

  def __call__(self, site, role, x, quantizer, leaves, *, axis, shape):
    """See `handlers.Simulate`."""
    slot = leaves.get('alpha')
    return x if slot is None else _relevance(x, slot, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _relevance(x: jax.Array, slot: jax.Array, epsilon: float) -> jax.Array:
  del slot, epsilon
  return x


def _relevance_forward(x, slot, epsilon):
  return x, (x, slot)


def _relevance_backward(epsilon, kept, g):
  z, slot = kept
  size = jnp.abs(z)
  floor = epsilon * jnp.sqrt(jnp.mean(jnp.square(z)))
  total = jnp.sum(jnp.abs(z * g).astype(jnp.float32))
  share = size / jnp.maximum(size + floor, jnp.finfo(z.dtype).tiny)
  return g * share, jnp.broadcast_to(total, slot.shape)


_relevance.defvjp(_relevance_forward, _relevance_backward)
