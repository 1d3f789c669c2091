"""`sensitivity`: what each option of each site does to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from quantlab import runtime
from quantlab.quality import metric as metrics
from quantlab.search import curvature, objectives, relevance, taylor
from quantlab.search.measure import Measure
from quantlab.search.program import Inputs, Program
from quantlab.search.space import Cost, space
from quantlab.search.table import Table

METRICS = (
  *objectives.DIRECT,
  'weight_error',
  'fisher',
  'hessian',
  'trace',
  'eigenvalue',
  'lrp',
)
Entries = list[tuple[float, float]]


def sensitivity(
  apply: Callable,
  params: Any,
  choices: Mapping[str, Any],
  batches: Iterable[Any],
  metric: str | Sequence[str] = 'kl',
  *,
  task: metrics.Metric = metrics.unlabelled,
  of: str | None = None,
  base: str | None = None,
  ties: Iterable[Sequence[str]] = (),
  costs: Mapping[str, Cost] | None = None,
  interactions: bool = False,
  key: jax.Array | None = None,
  probes: int = 64,
  iterations: int = 50,
  tolerance: float = 1e-3,
) -> Any:
  """A table of sites and formats, with standard errors.

    table = ql.sensitivity(
      apply, params, {'/kernel$': [ql.int2(), ql.int4(), ql.int8()]}, batches)
    found = ql.allocate(table, 50_000)              # bytes
    model = ql.ptq(apply, params, found, batches, ql.gptq())

  Measured by running the quantized model with one row at an option, the others
  as in `base`; compiled once for all of them:

    kl            KL(float || quantized) of the outputs, nats
    loss          change of the task's loss
    output_mse    noise over signal of the outputs
    sqnr          the same in -dB
    similarity    squared change of the cosine of pairs of embeddings

  From the float model and the errors d of quantization (see `search.taylor`,
  `curvature`, `relevance`):

    weight_error  ||d||^2 of the weights
    fisher        1/2 E[(g' d)^2]
    hessian       E[g' d + 1/2 d' H d]
    trace         tr(H) / n ||d||^2, Hutchinson (HAWQ-v2)
    eigenvalue    lambda_max ||d||^2, power iteration (HAWQ); weights only
    lrp           -relevance times bits (LRP-QViT)

  Args:
    apply: pure function `apply(params, *inputs)` that returns one array.
    params: float parameters.
    choices: `{pattern: [rules]}`, see `search.space`.
    batches: re-iterable, `(*inputs, *targets)` as `task` has them; read as a
      stream.
    metric: one of the above, or several: then a table of each, by name.
    task: what the outputs are; `quality.classification` and others have
      labels and with them a loss.
    of: the objective whose derivatives are taken; the loss by default, where
      the task has none 'similarity' or 'kl'.
    base: the option of every other row; float by default.
    ties: groups of sites that take one option.
    costs: further costs, `plan -> {site: cost}`.
    interactions: measure d_i' H_ij d_j of every two options too (one
      Hessian-vector product an option and batch).
    key: of random probes; `jax.random.key(0)` by default.
    probes: Hutchinson's, for each batch.
    iterations: of the power method at most.
    tolerance: relative change of the eigenvalue at which it ends.

  Returns:
    A `search.Table`, or `{metric: Table}` where several are asked for.

  Raises:
    ValueError: an unknown metric, or one that the task has not; nothing to
      choose, options in conflict; no batches, or not finite ones.
  """
  names = (metric,) if isinstance(metric, str) else tuple(metric)
  for name in names:
    if name not in METRICS:
      raise ValueError(f'unknown metric {name!r}; known: {list(METRICS)}')
    if name in objectives.DIRECT:
      objectives.check(task, name)
  of = objectives.check(task, of or objectives.default(task))
  if of not in objectives.SMOOTH:
    raise ValueError(
      f'of={of!r} has no derivative at 0; use one of {objectives.SMOOTH}'
    )
  inputs = Inputs(batches, task.targets)
  first = next(iter(inputs), None)
  if first is None:
    raise ValueError('there is no batch to measure on; give at least one')
  found = space(apply, params, choices, *first, ties=ties, costs=costs)
  program = Program(apply, params, found, inputs)
  key = jax.random.key(0) if key is None else key
  run = _Run(program, batches, task, of, base, key)
  entries, facts = run.all(names, probes, iterations, tolerance)
  inner = None
  if interactions:
    inner, spread = taylor.interactions(run.expansion, batches, runtime.track)
    facts['interactions'] = {'of': of, 'stderr': _root_mean_square(spread)}
  tables = {
    n: run.table(n, entries[n], facts | {'base': base or 'float'}, inner)
    for n in names
  }
  return tables[metric] if isinstance(metric, str) else tables


def _root_mean_square(x: np.ndarray) -> float | None:
  value = float(np.sqrt(np.mean(np.square(x))))
  return value if np.isfinite(value) else None


class _Run:
  """One call of `sensitivity`."""

  def __init__(self, program, batches, task, of, base, key):
    self.program, self.batches, self.task = program, batches, task
    self.of, self.base, self.key = of, base, key
    self.expansion = taylor.Expansion(program, task, of)

  def all(self, names, probes, iterations, tolerance):
    """Entries by metric, and facts of all of them."""
    found: dict[str, Entries] = {}
    facts: dict[str, Any] = {'of': self.of}
    direct = [n for n in names if n in objectives.DIRECT]
    if direct:
      found |= self._measured(direct)
    if {'fisher', 'hessian'} & set(names):
      found |= taylor.fisher_and_hessian(
        self.expansion, self.batches, runtime.track
      )
    if 'weight_error' in names:
      norms = curvature.weight_norms(self.expansion, self.batches)
      found['weight_error'] = [(float(x), 0.0) for x in norms]
    if 'trace' in names:
      found['trace'], more = curvature.trace(
        self.expansion, self.batches, self.key, probes, runtime.track
      )
      facts |= more
    if 'eigenvalue' in names:
      found['eigenvalue'], more = curvature.eigenvalue(
        self.expansion,
        self.batches,
        self.key,
        iterations,
        tolerance,
        runtime.track,
      )
      facts |= more
    if 'lrp' in names:
      found['lrp'], more = relevance.relevance(
        self.program, self.batches, self.task, runtime.track
      )
      facts |= more
    return found, facts

  def _measured(self, names) -> dict[str, Entries]:
    base = self.program.float if self.base is None else self._base()
    measure = Measure(self.program, self.batches, self.task, names, base)
    choices = [
      self.program.alone(i, k, base)
      for i, k in curvature.program_flat(self.program)
    ]
    return measure(choices, runtime.track)

  def _base(self) -> dict[str, int]:
    rows = self.program.space.rows
    missing = [r.name for r in rows if self.base not in r.options]
    if missing:
      raise ValueError(
        f'base={self.base!r} is no option of {missing[0]!r}, which has '
        f'{list(rows[0].options)}'
      )
    return self.program.choice([r.options.index(self.base) for r in rows])

  def table(self, name, entries, facts, inner) -> Table:
    found = self.program.space
    ends = np.cumsum([len(r.options) for r in found.rows])[:-1]
    values, errors = np.array(entries, float).T
    return Table(
      rows=found.rows,
      values=tuple(np.split(values, ends)),
      stderr=tuple(np.split(errors, ends)),
      costs=found.costs,
      metric=name,
      unit=_unit(name, self.of),
      fixed=found.fixed,
      kept=found.kept,
      model=runtime.fingerprint(self.program.params),
      interactions=inner,
      facts=facts,
    )


def _unit(name: str, of: str) -> str:
  if name in objectives.DIRECT:
    return objectives.DIRECT[name]
  if name == 'weight_error':
    return 'squared weight'
  return 'relevance x bits' if name == 'lrp' else objectives.DIRECT[of]
