"""Direct metrics: the quantized model is run, one choice after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from quantlab.quality import metric as metrics
from quantlab.search import objectives
from quantlab.search.program import Program, split

Choice = Mapping[str, int]
# (value, standard error) of each choice, by objective.
Results = dict[str, list[tuple[float, float]]]


class Measure:
  """Objectives of any choice of one program; compiled once.

  Args:
    program: the program.
    batches: `(*inputs, *targets)`, read once for each call.
    task: says what the outputs are.
    names: objectives, see `objectives.DIRECT`.
    base: the choice whose own objectives are taken off; float by default,
      which has none.
  """

  def __init__(
    self,
    program: Program,
    batches: Iterable[Any],
    task: metrics.Metric,
    names: Sequence[str],
    base: Choice | None = None,
  ):
    self.program, self.batches, self.task = program, batches, task
    self.names = tuple(names)
    self.base = program.float if base is None else base
    parts = {n: objectives.per_example(task, n) for n in names}
    simulated = program.simulated()

    def forward(params, state, inputs):
      return simulated(program.variables(params, state), *inputs)

    def contrast(params, state, inputs, targets, reference):
      outputs = forward(params, state, inputs)
      return {n: f(reference, outputs, *targets) for n, f in parts.items()}

    self.forward: Callable = jax.jit(forward)
    self.contrast: Callable = jax.jit(contrast)
    self.sound: Callable = jax.jit(objectives.sound(task))

  def __call__(
    self, choices: Sequence[Choice], track: Callable = lambda it, label: it
  ) -> Results:
    """Values and standard errors of each choice.

    Of each example's objective against the float model, less the base's.

    One compiled call after another: on a CPU as fast as one `lax.map` within
    a tenth (`configs/bench/search.py`), and `vmap` over choices computes all
    branches; the device never waits for the host, which reads results a batch
    behind.

    Raises:
      ValueError: there is no batch; the float model's outputs or loss of one
        are not finite.
    """
    sums: list[dict[str, list]] = [{n: [] for n in self.names} for _ in choices]
    bits, params = self.program.bits, self.program.params
    plain, states = bits(self.program.float), [bits(c) for c in choices]
    moved = self.base != self.program.float
    for i, batch in enumerate(track(self.batches, 'measure')):
      inputs, targets = split(batch, self.task.targets, i)
      reference = self.forward(params, plain, inputs)
      sound = self.sound(reference, *targets)
      stats = jax.device_get(
        [
          self.contrast(params, s, inputs, targets, reference)
          for s in ([bits(self.base)] if moved else []) + states
        ]
      )
      objectives.refuse_unsound(i, sound)
      start = stats.pop(0) if moved else dict.fromkeys(self.names, (0, 0))
      for kept, stat in zip(sums, stats, strict=True):
        for n, (total, count) in stat.items():
          kept[n].append((total - start[n][0], count))
    return {n: [_conclude(n, kept[n]) for kept in sums] for n in self.names}


def _conclude(name: str, pairs: Sequence[Any]) -> tuple[float, float]:
  if not pairs:
    raise ValueError('there is no batch to measure on; give at least one')
  sums = np.concatenate([a for a, _ in pairs])
  counts = np.concatenate([b for _, b in pairs])
  return objectives.conclude(name, sums, counts)
