"""Derivatives along the errors of quantization: Fisher, Hessian, interactions.

With x_t = x + sum_k t_k d_k for every operand (see `simulate.Shifts`) the loss
is a function of the weights t of all options of all sites. Its derivatives at
t = 0 are what second-order methods need, exactly, and for weights and
activations alike; the errors d are constants (straight through).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.quality import metric as metrics
from quantlab.search import objectives
from quantlab.search.program import Program, split
from quantlab.search.simulate import Shifts


class Expansion:
  """The loss of one batch as a function of the weights of all options.

  Weights are one array over all options of all rows, as `Table.flat` counts
  them; tied sites share theirs, layers of a row each have their own.

  Args:
    program: the program.
    task: says what the outputs are.
    of: the objective that is expanded, see `objectives.SMOOTH`.
  """

  def __init__(self, program: Program, task: metrics.Metric, of: str):
    self.program, self.task, self.of = program, task, of
    rows = program.space.rows
    self.starts = np.cumsum([0, *(len(r.options) for r in rows)])
    self.size = int(self.starts[-1])
    self.row_of = {s: i for i, r in enumerate(rows) for s in r.sites}
    self._per_example = objectives.per_example(task, of)
    self._mean = objectives.mean(task, of)
    self._shifted = program.simulated(Shifts(program.options))

  @property
  def searched(self) -> list[tuple[str, str]]:
    """Operands of the rows."""
    names = self.program.space.names
    return [o for o in self.program.operands if names(o[0])[0] in self.row_of]

  def _outputs(self, params, t, inputs, extra=None):
    """Outputs with weights t, (size,); `extra` adds leaves by operand."""

    def leaves(operand, loops):
      names = self.program.space.names(operand[0])
      if names[0] not in self.row_of:  # not searched: it stays in float
        return {}
      each = []
      for row in map(self.row_of.__getitem__, names):
        a, b = self.starts[row], self.starts[row + 1]
        each.append(jnp.append(t[a:b], 0.0))  # float has no error
      mine = jnp.stack(each) if loops else each[0]
      count = mine.shape[-1]
      given = {'strength': jnp.broadcast_to(mine, (*loops, count))}
      return given | (extra(operand, loops, count) if extra else {})

    state = self.program.state(leaves)
    return self._shifted(self.program.variables(params, state), *inputs)

  @functools.cached_property
  def counts(self) -> Callable:
    """`(params, inputs, targets) -> scalar`: what a batch's mean divides by."""

    def run(params, inputs, targets):
      outputs = self.program.apply(params, *inputs)
      return self._per_example(outputs, outputs, *targets)[1].sum()

    return jax.jit(run)

  def along(self) -> Callable:
    """`(params, direction, inputs, targets) -> (first, second, counts)`.

    Derivatives of each example's loss along a direction of t: (b,) each,
    forward over forward.
    """

    def run(params, direction, inputs, targets):
      zero = jnp.zeros(self.size)
      reference = self._outputs(params, zero, inputs)

      def losses(t):
        outputs = self._outputs(params, t, inputs)
        return self._per_example(reference, outputs, *targets)[0]

      def slope(t):
        return jax.jvp(losses, (t,), (direction,))[1]

      first, second = jax.jvp(slope, (zero,), (direction,))
      counts = self._per_example(reference, reference, *targets)[1]
      return first, second, counts

    return jax.jit(run)

  def gradient(self) -> Callable:
    """`(params, inputs, targets) -> (direction -> H direction)`.

    H is the matrix of second derivatives d_i' H_ij d_j of the batch's mean
    loss. The gradient is linearized once, reverse before forward: one product
    with a direction (size,) gives a whole row.
    """

    def run(params, inputs, targets):
      def loss(t):
        outputs = self._outputs(params, t, inputs)
        return self._mean(lax.stop_gradient(outputs), outputs, targets)

      return jax.linearize(jax.grad(loss), jnp.zeros(self.size))[1]

    return jax.jit(run)

  def norms(self) -> Callable:
    """`(params, inputs) -> {(site, role): (*loops, options + 1)}`.

    Squared norms of the errors of every operand, of activations summed over
    the batch.
    """

    def run(params, inputs):
      zero = jnp.zeros(self.size)

      def total(slots):
        def extra(operand, loops, count):
          del loops, count
          return {'alpha': slots[operand]}

        return self._outputs(params, zero, inputs, extra).sum()

      slots = {}
      for operand in self.searched:
        count = len(self.program.space.options[operand[0]]) + 1
        loops = self.program.operands[operand]
        slots[operand] = jnp.zeros((*loops, count))
      return jax.grad(total)(slots)

    return jax.jit(run)


def fisher_and_hessian(
  expansion: Expansion, batches: Iterable[Any], track: Callable
) -> dict[str, list[tuple[float, float]]]:
  """Both forms of the second order along each option's error alone.

  'fisher' is 1/2 E[(g_n' d)^2] with the gradient g_n of each example (the
  empirical Fisher matrix, arXiv 2306.07629), 'hessian' the Taylor expansion
  E[g' d + 1/2 d' H d]. Values and standard errors over examples, by option.
  """
  along, size = expansion.along(), expansion.size
  kept: list[list[Any]] = [[] for _ in range(size)]
  for i, batch in enumerate(track(batches, 'second order')):
    inputs, targets = split(batch, expansion.task.targets, i)
    found = [
      along(expansion.program.params, e, inputs, targets) for e in jnp.eye(size)
    ]
    for mine, new in zip(kept, jax.device_get(found), strict=True):
      mine.append(new)
  out: dict[str, list[tuple[float, float]]] = {'fisher': [], 'hessian': []}
  for mine in kept:
    first, second, counts = (np.concatenate(c) for c in zip(*mine, strict=True))
    # Of a sum over tokens the gradient is that of the sum.
    squares = 0.5 * np.square(first) / np.maximum(counts, 1)
    out['fisher'].append(objectives.conclude('fisher', squares, counts))
    taylor = first + 0.5 * second
    out['hessian'].append(objectives.conclude('hessian', taylor, counts))
  return out


def interactions(
  expansion: Expansion, batches: Iterable[Any], track: Callable
) -> tuple[np.ndarray, np.ndarray]:
  """d_i' H_ij d_j of every two options, with standard errors over batches.

  Within one row it is the row's own second order, which no two options share:
  those blocks are zero.
  """
  linearized, size = expansion.gradient(), expansion.size
  product = jax.jit(lambda linear, direction: linear(direction))
  found: list[np.ndarray] = []
  counts: Callable = expansion.counts
  weights: list[float] = []
  for i, batch in enumerate(track(batches, 'interactions')):
    inputs, targets = split(batch, expansion.task.targets, i)
    weights.append(float(counts(expansion.program.params, inputs, targets)))
    linear = linearized(expansion.program.params, inputs, targets)
    each = [product(linear, e) for e in jnp.eye(size)]
    found.append(np.asarray(jnp.stack(each), float))
  h = np.stack(found)
  h = (h + np.swapaxes(h, 1, 2)) / 2
  mean, spread = objectives.over_batches(h, np.array(weights))
  for a, b in zip(expansion.starts, expansion.starts[1:], strict=False):
    mean[a:b, a:b] = 0
  return mean, spread
