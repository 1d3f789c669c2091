"""Interactions measured in the outputs: what the errors of two rows do jointly.

With z the outputs and u_i what option i alone changes in them,

    q_ij = E[u_i' S u_j],   S = d2(objective)/dz2 at the outputs of the base.

Where errors are small, u_i is J d_i and this is the Gauss-Newton part of
d_i' H_ij d_j; of an objective that is least at the base (KL, similarity) it is
all of it. Where they are not, the network's response is still the measured
one, and only the curvature in the outputs is taken as constant. Added to
entries that were measured alone, it says what their sum leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.quality import metric as metrics
from quantlab.search import objectives
from quantlab.search.measure import Choice, Measure
from quantlab.search.program import split


def interactions(
  measure: Measure,
  choices: Sequence[Choice],
  rows: Sequence[int],
  names: Sequence[str],
  batches: Iterable[Any],
  track: Callable,
  memory: int = 2**30,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """q_ij of every two choices, with standard errors over parts of the data.

  Args:
    measure: runs the choices, beside its base.
    choices: each option of each row alone.
    rows: the row of each choice; within a row q is zero.
    names: objectives, see `objectives.SMOOTH`.
    batches: `(*inputs, *targets)`, as a stream.
    track: `(batches, label) -> batches`.
    memory: bytes of outputs of all choices held at once; larger batches are
      taken in parts.

  Returns:
    (choices, choices) and the standard error, by objective. A choice whose
    outputs are not finite has no interactions.
  """
  params, task = measure.program.params, measure.task
  plain, base, *states = (
    measure.program.bits(c)
    for c in (measure.program.float, measure.base, *choices)
  )
  grams = {n: jax.jit(_gram(task, n)) for n in names}
  found: dict[str, list[Any]] = {n: [] for n in names}
  for i, batch in enumerate(track(batches, 'interactions')):
    for part in _parts(
      measure, base, split(batch, task.targets, i), memory // len(states)
    ):
      inputs, targets = part
      reference = measure.forward(params, plain, inputs)
      start = measure.forward(params, base, inputs)
      outputs = [measure.forward(params, s, inputs) for s in states]
      change = jnp.stack(outputs) - start
      for n, gram in grams.items():
        part_sums = gram(change, start, reference, targets)
        found[n].append(jax.device_get(part_sums))
  other = np.not_equal.outer(rows, rows)
  return {n: _conclude(parts, other) for n, parts in found.items()}


def _parts(measure, base, batch, memory: int) -> Iterator[Any]:
  """Parts of a batch of nearly one size whose outputs fit into the memory."""
  inputs, targets = batch
  shape = jax.eval_shape(measure.forward, measure.program.params, base, inputs)
  examples = shape.shape[0]
  count = min(math.ceil(shape.size * 4 / memory), examples)
  size = math.ceil(examples / count)
  for start in range(0, examples, size):
    cut = slice(start, start + size)

    def part(x, cut=cut):  # what is not of the examples is for all of them
      return x[cut] if np.shape(x)[:1] == (examples,) else x

    yield jax.tree.map(part, (inputs, targets))


def _gram(task: metrics.Metric, name: str) -> Callable:
  """Sums of q_ij and what they are divided by.

  `(changes (k, b, ...), start, reference, targets) -> (sums (k, k), count)`,
  changes from the outputs of the start, reference the float model's.
  """
  f = objectives.per_example(task, name)

  def run(change, start, reference, targets):
    def slope(z):
      return jax.grad(lambda z: f(reference, z, *targets)[0].sum())(z)

    def bent(u):
      return jax.jvp(slope, (start,), (u,))[1]

    failed = ~jnp.isfinite(change).reshape(len(change), -1).all(1)
    at = (slice(None), *[None] * start.ndim)
    change = jnp.where(failed[at], 0, change)
    curved = lax.map(bent, change).reshape(len(change), -1)
    sums = change.reshape(len(change), -1) @ curved.T
    return sums, f(reference, start, *targets)[1].sum()

  return run


def _conclude(
  parts: Sequence[Any], other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  sums = np.array([s for s, _ in parts], float)
  counts = np.array([n for _, n in parts], float)[:, None, None]
  sums = (sums + np.swapaxes(sums, 1, 2)) / 2 * other
  mean = sums.sum(0) / counts.sum()
  n = len(parts)
  # Of a ratio of sums, as `estimate.ratio` has it.
  off = np.square(sums - mean * counts).sum(0) * n / max(n - 1, 1)
  spread = np.sqrt(off) / counts.sum() if n > 1 else mean * np.nan
  return mean, spread
