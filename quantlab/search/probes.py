"""v_l' (H v)_l of every operand l, without the gradient of a weight.

With a product y = P(x, w) and what flows back into it, g = dL/dy, the block of
a weight is w_l's gradient P'(x, g) along v, and its change along v

    v' (H v) = <P(x, v), g'> + <x', P^T(g, v)>,

' the derivative along v of everything. All four are there once the loss is
differentiated backward and then forward: P(x, v) and P^T(g, v) are the terms
that v itself adds to y' and to what flows back to x. So a probe costs four
products a layer where the product with H takes six, and none of the slow ones:
gradients of convolutions by their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.search.offsets import Offsets
from quantlab.search.program import Operand, Program
from quantlab.search.taylor import Expansion


class Probes:
  """v_l' (H v)_l of every operand, v random signs on all of them.

  The gradient of a batch is linearized once: each probe costs the tangents
  alone, and the activations of both passes are held meanwhile.
  """

  def __init__(self, expansion: Expansion):
    self._taps = Taps()
    self.offsets = Offsets(expansion, self._taps)
    self.program = expansion.program
    self.linearized = jax.jit(self._linearized)
    self.products = jax.jit(self._products)

  @property
  def _tapped(self) -> dict[str, Operand]:
    return _tapped(self.program, self._taps.repeated)

  def _linearized(self, params, inputs, targets):
    shapes = self.offsets.shapes(inputs)
    zero = {o: jnp.zeros(s) for o, s in shapes.items()}
    tapped, sites = self._tapped, self.program.space.plan.sites
    slots = {
      name: {
        k: jnp.zeros((*sites[name].loops, *x.shape), x.dtype)
        for k, x in self._taps.shapes[name].items()
      }
      for name in tapped
    }
    within = set(tapped.values())
    loss = self.offsets.loss(params, inputs, targets)

    def backward(offsets):
      rest = {o: x for o, x in offsets.items() if o not in within}
      return jax.grad(lambda rest, slots: loss(offsets | rest, slots), (0, 1))(
        rest, slots
      )

    return zero, jax.linearize(backward, zero)[1]

  def _products(self, prepared, key):
    zero, linear = prepared
    v, tapped = signs(key, zero), self._tapped
    rest, slots = linear(v)
    found = {o: self._sums(o, v[o] * x) for o, x in rest.items()}
    for name, slot in slots.items():
      home = tapped[name]
      mine = self._sums(home, slot['moved'] * slot['output'])
      if 'input' in slot:
        mine += self._sums(home, slot['input'] * slot['back'])
      found[home] = found.get(home, 0) + mine
    return {o: found[o] for o in zero}

  def _sums(self, operand: Operand, x: jax.Array) -> jax.Array:
    """Of each layer where rows tell them apart, else of all of it."""
    layers = len(x) if operand[0] in self.program.space.layers else 1
    return x.reshape(layers, -1).astype(jnp.float32).sum(1)


def signs(
  key: jax.Array, like: Mapping[Operand, jax.Array]
) -> dict[Operand, jax.Array]:
  """A random sign for every element."""
  return {
    o: jax.random.rademacher(jax.random.fold_in(key, j), x.shape, x.dtype)
    for j, (o, x) in enumerate(like.items())
  }


def _tapped(program: Program, repeated: set[str]) -> dict[str, Operand]:
  """The operand that is the weight of each product, where that is read out.

  Others take the gradient of their weight: those joined of several parameters,
  whose shares of the product would have to be told apart, and those of the
  turns of a loop that shares its weights, which have one state.
  """
  plan, layers = program.space.plan, program.space.layers
  roles = plan.weight_roles
  users: dict[Operand, list[str]] = {}
  left = set()
  for name, site in plan.quantized.items():
    homes = {roles[p] for p in site.paths if p in roles}
    if name in plan.effective:
      homes = {(name, 'weight')}
    if len(homes) > 1 or name in repeated:
      left |= homes
    for home in homes:
      users.setdefault(home, []).append(name)
      if home[0] in layers and site.loops != plan.sites[home[0]].loops:
        left.add(home)
  rows = {s for r in program.space.rows for s in r.sites}
  return {
    name: home
    for home, names in users.items()
    if home not in left and program.space.names(home[0])[0] in rows
    for name in names
  }


class Taps:
  """`handlers.Product`: reads out what a probe of the weight needs.

  Where the state of a site has slots under 'probe', what flows back to them is
  the input x of the product, what flows back into its output, and what a
  change of the weight alone adds to the output and to what flows back to x.
  Without, notes their shapes.
  """

  def __init__(self) -> None:
    self.shapes: dict[str, dict[str, Any]] = {}
    self.repeated: set[str] = set()

  def __call__(self, site, lhs, rhs, default, state):
    """See `handlers.Product`."""
    slots = state.get('probe')
    if slots is None:
      out = default(lhs, rhs)
      x = lhs if site.side == 'rhs' else rhs
      found = {'moved': out, 'output': out}
      if jnp.issubdtype(x.dtype, jnp.inexact):  # and no index of a lookup
        found |= {'input': x, 'back': x}
      self.shapes[site.id] = jax.eval_shape(lambda: found)
      if site.inside.count('scan') > len(site.loops):
        self.repeated.add(site.id)
      return out
    if site.side == 'rhs':
      return _read(default, lhs, rhs, slots)
    return _read(lambda x, w: default(w, x), rhs, lhs, slots)


def _read(product: Callable, x: Any, w: Any, slots: Mapping[str, Any]) -> Any:
  """The product; see `Taps`. Right to first order in a change of w.

  The change itself is zero where derivatives are taken: so a term with it is
  differentiated by it alone, and no product with zeros is left over.
  """

  def forward(x, w, slots):
    del slots
    fixed = lax.stop_gradient(w)
    moved = product(lax.stop_gradient(x), w - fixed)
    return product(x, fixed) + moved, (x, w, moved)

  def backward(kept, g):
    x, w, moved = kept
    fixed = lax.stop_gradient(w)
    read = {'moved': moved, 'output': g}
    if 'input' not in slots:
      return np.zeros(x.shape, jax.dtypes.float0), jnp.zeros_like(w), read

    def transposed(w, g):
      return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

    back = transposed(w - fixed, lax.stop_gradient(g))
    read |= {'input': x, 'back': back}
    return transposed(fixed, g) + back, jnp.zeros_like(w), read

  run = jax.custom_vjp(lambda x, w, slots: forward(x, w, slots)[0])
  run.defvjp(forward, backward)
  return run(x, w, slots)
