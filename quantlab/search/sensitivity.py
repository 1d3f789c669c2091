"""`sensitivity`: what each option of each site does to a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import runtime
from quantlab.calibration import batches as batches_lib
from quantlab.core import rng
from quantlab.core.tree import named_leaves
from quantlab.ptq.transform import Encoder
from quantlab.quality import metric as metrics
from quantlab.search import (
  curvature,
  encoded,
  objectives,
  relevance,
  responses,
  taylor,
)
from quantlab.search.measure import Measure
from quantlab.search.program import Inputs, Program
from quantlab.search.space import Cost, space
from quantlab.search.table import Table, is_whole, uniform

METRICS = (
  *objectives.DIRECT,
  'weight_error',
  'fisher',
  'hessian',
  'trace',
  'eigenvalue',
  *relevance.METRICS,
)
# Metrics that know what two rows do jointly.
INTERACTING = (*objectives.SMOOTH, 'hessian')
Entries = list[tuple[float, float]]
Joint = tuple[np.ndarray, np.ndarray]


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
  encode: Encoder | None = None,
  calibration: Iterable[Any] | None = None,
  ties: Iterable[Sequence[str]] = (),
  costs: Mapping[str, Cost] | None = None,
  layers: bool = False,
  interactions: bool | Sequence[str] = False,
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
  as in `base`, less the same of `base`; compiled once for all of them:

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
    lrp           relevance times the noise of its bits (of LRP-QViT)
    lrp_bits      relevance times the bits taken away (LRP-QViT's objective)

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
    base: the option of every other row, float by default: errors add up only
      while they are small, and a table made around the option that the budget
      allows says what moves away from it do. Direct metrics alone.
    encode: weights are what this member of a chain makes of them, such as
      `ql.gptq()` on the float model's inputs (see `search.Encoded`), and not
      rounded to nearest; direct metrics alone.
    calibration: re-iterable batches without targets, for static ranges and
      for `encode`; those of `batches` by default.
    ties: groups of sites that take one option.
    costs: further costs, `plan -> {site: cost}`.
    layers: a row for each layer of a scanned site, see `search.space`.
    interactions: measure what every two options do jointly too; True for all
      metrics that can, or the names of some. 'hessian' takes d_i' H_ij d_j
      (one Hessian-vector product an option and batch, see `search.taylor`),
      direct metrics the responses of the outputs (one more run an option and
      batch, see `search.responses`).
    key: of random probes; `jax.random.key(0)` by default.
    probes: Hutchinson's, for each batch.
    iterations: of the power method at most.
    tolerance: relative change of the eigenvalue at which it ends.

  Returns:
    A `search.Table`, or `{metric: Table}` where several are asked for.

  Raises:
    ValueError: an unknown metric, or one that the task has not;
      interactions of one that has none; nothing to choose, options in
      conflict; no batches; outputs that are no single array; parameters,
      outputs or losses of the float model that are not finite.
    TypeError: batches that can be read only once, or are one batch; `encode`
      is no encoder, `key` no key.
  """
  if not isinstance(metric, str | Sequence):
    raise TypeError(f'metric= takes a name or several, got {metric!r}')
  names = (metric,) if isinstance(metric, str) else tuple(metric)
  if not names:
    raise ValueError(f'metric= names at least one of {list(METRICS)}')
  for name in names:
    if name not in METRICS:
      raise ValueError(f'unknown metric {name!r}; known: {list(METRICS)}')
    if name in objectives.DIRECT:
      objectives.check(task, name)
  derived = [n for n in names if n not in objectives.DIRECT]
  if encode is not None:
    encoded.check(encode)
    if derived:
      raise ValueError(
        f'{derived} expand the errors of rounding; with encode= ask for what '
        f'is run: {list(objectives.DIRECT)}'
      )
  if base is not None and {'sqnr', *derived} & set(names):
    raise ValueError(
      f'{[n for n in names if n in {"sqnr", *derived}]} start at the float '
      'model; with base= ask for others of '
      f'{[n for n in objectives.DIRECT if n != "sqnr"]}'
    )
  joint = _interacting(names, interactions)
  of = objectives.check(task, of or objectives.default(task))
  if of not in objectives.SMOOTH:
    raise ValueError(
      f'of={of!r} has no derivative at 0; use one of {objectives.SMOOTH}'
    )
  for what, count in (('probes', probes), ('iterations', iterations)):
    if not (is_whole(count) and count > 0):
      raise ValueError(f'{what} is a positive whole number, got {count!r}')
  real = isinstance(tolerance, int | float | np.number)
  if not (real and 0 < tolerance < 1):
    raise ValueError(f'tolerance is between 0 and 1, got {tolerance!r}')
  rng.check_key(key)
  batches_lib.first(batches)
  if calibration is not None:
    batches_lib.first(calibration)
  if 'fisher' in names and of != 'loss':
    raise ValueError(
      f"'fisher' is made of gradients, and that of {of!r} is zero at the float "
      'model: it needs a task with a loss, and its labels'
    )
  inputs = Inputs(batches, task.targets)
  first = next(iter(inputs))
  _check_outputs(apply, params, first, task, names, of)
  found = space(
    *(apply, params, choices, *first), ties=ties, costs=costs, layers=layers
  )
  found.plan.check_finite(dict(named_leaves(params)))
  start = None if base is None else uniform(found.rows, base)
  given = inputs if calibration is None else calibration
  key = jax.random.key(0) if key is None else key
  program = Program(apply, params, found, given)
  if encode is not None:
    program = encoded.Encoded(program, encode, given, key)
  run = _Run(program, batches, task, names, of, start, key)
  entries, facts = run.all(probes, iterations, tolerance)
  facts['base'] = base or 'float'
  inner = run.interactions(joint)
  tables = {n: run.table(n, entries[n], facts, inner.get(n)) for n in names}
  return tables[metric] if isinstance(metric, str) else tables


def _interacting(
  names: Sequence[str], interactions: bool | Sequence[str]
) -> tuple[str, ...]:
  """Metrics whose interactions are measured."""
  able = tuple(n for n in names if n in INTERACTING)
  if isinstance(interactions, bool):
    return able if interactions else ()
  if isinstance(interactions, str):
    interactions = (interactions,)
  for name in interactions:
    if name not in able:
      raise ValueError(
        f'no interactions of {name!r}: of the metrics asked for, {able} have '
        'them'
      )
  return tuple(interactions)


def _check_outputs(apply, params, inputs, task, names, of) -> None:
  """Whether a function can be called, and gives what objectives read."""
  try:
    found = jax.eval_shape(apply, params, *inputs)
  except TypeError as error:
    hint = (
      ''
      if _binds(apply, params, *inputs)
      else '. Labels are no inputs where the task has them: '
      f'task={task.name} takes {task.targets} off the end'
    )
    raise TypeError(
      f'apply(params, *inputs) cannot be called with the {len(inputs)} '
      f'input(s) of a batch: {error}{hint}'
    ) from error
  shapes = [x.shape for x in jax.tree.leaves(found)]
  if not isinstance(found, jax.ShapeDtypeStruct) or len(found.shape) < 2:
    raise ValueError(
      f'apply returns {jax.tree.structure(found)} of shapes {shapes}; '
      'sensitivity needs one array (examples, ..., classes), such as logits: '
      'give a function that picks it'
    )
  if not jnp.issubdtype(found.dtype, jnp.floating):
    raise ValueError(
      f'apply returns {found.dtype}; what an error changes in the outputs is '
      'measured on floating-point ones, such as logits'
    )
  examples = {np.shape(x)[:1] for x in jax.tree.leaves(inputs)}
  if found.shape[:1] not in examples:
    raise ValueError(
      f'apply returns {found.shape}, and no input of the batch has a first '
      f'axis of that length: {[np.shape(x) for x in jax.tree.leaves(inputs)]}. '
      'Examples are along the first axis of both'
    )
  derived = set(names) - set(objectives.DIRECT)
  derived -= {'weight_error', *relevance.METRICS}
  classes = {'kl', 'loss'} & {*names, *([of] if derived else [])}
  if classes and found.shape[-1] == 1:
    raise ValueError(
      f'apply returns {found.shape}: over one class {sorted(classes)} cannot '
      "change. Ask for 'output_mse', with of='output_mse' for derivatives"
    )


def _binds(function: Callable, *args: Any) -> bool:
  """Whether a function takes this number of arguments, as far as is known."""
  try:
    inspect.signature(function).bind(*args)
  except TypeError:
    return False
  except ValueError:  # it has no signature
    pass
  return True


def _root_mean_square(x: np.ndarray) -> float | None:
  value = float(np.sqrt(np.mean(np.square(x))))
  return value if np.isfinite(value) else None


class _Run:
  """One call of `sensitivity`."""

  def __init__(self, program, batches, task, names, of, base, key):
    self.program, self.batches, self.task = program, batches, task
    self.names, self.of, self.base, self.key = names, of, base, key
    self.expansion = taylor.Expansion(program, task, of)
    self.flat = curvature.program_flat(program)

  @functools.cached_property
  def measure(self) -> Measure:
    """Runs the model; compiled once."""
    p = self.program
    base = p.float if self.base is None else p.choice(self.base)
    direct = [n for n in self.names if n in objectives.DIRECT]
    return Measure(p, self.batches, self.task, direct, base)

  @property
  def alone(self) -> list[dict[str, int]]:
    """Each option of each row, the others as in the base."""
    return [self.program.alone(i, k, self.measure.base) for i, k in self.flat]

  def all(self, probes, iterations, tolerance):
    """Entries by metric, and facts of all of them."""
    found: dict[str, Entries] = {}
    facts: dict[str, Any] = {'of': self.of}
    names = self.names
    if set(objectives.DIRECT) & set(names):
      found |= self.measure(self.alone, runtime.track)
    else:  # the float model alone must be sound
      self.measure([])
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
    if set(relevance.METRICS) & set(names):
      both, more = relevance.relevance(
        self.program, self.batches, self.task, runtime.track
      )
      found |= both
      facts |= more
    return found, facts

  def interactions(self, names) -> dict[str, Joint]:
    """Means and standard errors by metric."""
    found: dict[str, Joint] = {}
    direct = [n for n in names if n in objectives.DIRECT]
    if direct:
      rows = [i for i, _ in self.flat]
      found |= responses.interactions(
        self.measure, self.alone, rows, direct, self.batches, runtime.track
      )
    if 'hessian' in names:
      found['hessian'] = taylor.interactions(
        self.expansion, self.batches, runtime.track
      )
    return found

  def table(self, name, entries, facts, joint: Joint | None) -> Table:
    found = self.program.space
    if joint is not None:
      error = _root_mean_square(joint[1])
      facts = facts | {'interactions': {'stderr': error}}
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
      interactions=None if joint is None else joint[0],
      facts=facts,
      layers=found.layers,
    )


def _unit(name: str, of: str) -> str:
  if name in objectives.DIRECT:
    return objectives.DIRECT[name]
  if name == 'weight_error':
    return 'squared weight'
  return relevance.METRICS.get(name) or objectives.DIRECT[of]
