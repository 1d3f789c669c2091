"""What was trained, frozen and judged: numbers of a variant over its seeds."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quantlab as ql
from experiments import decoding, training
from quantlab import quality, report, runtime
from quantlab.core import named_leaves, nonfinite
from quantlab.models import llama
from quantlab.qat.start import thawed

# A frozen model adds up integers, a simulated one floats: now and then a value
# between two codes goes to the other one, and one of 8 bits moves an output by
# some tenths of a per cent. A wrong scale or code moves it by many per cent.
TOLERANCE = 1e-2


class FrozenError(RuntimeError):
  """A frozen model that is not what was trained."""


def judge(
  folder: runtime.Workdir,
  made: training.Trainee,
  names: tuple[str, str],
  trained: Sequence[training.Variables],
  curves: Sequence[Mapping[str, Any]],
  base: tuple[Callable[..., Any], Sequence[Any]],
  config: Mapping[str, Any],
) -> None:
  """Judges every seed, and writes all that a variant leaves.

  Args:
    folder: of the run.
    made: what was trained.
    names: the head of its metrics, and its name in other files.
    trained: variables of each seed.
    curves: of each stretch of training.
    base: the float net, which may have another width, and its parameters of
      each seed: what agreement is with.
    config: of the run; 'tokens' to decode for speed, 0: none.
  """
  head, name = names
  with runtime.timed() as timer:
    if made.freeze is None:
      rows = [_judge_float(made, v['weights']) for v in trained]
      model = None
    else:
      rows, model = _judge_frozen(made, trained, *base)
  values = summary(rows)
  weights = trained[0]['weights']
  values |= {
    'parameters': _count(jax.eval_shape(made.task.init, jax.random.key(0))),
    'trained_parameters': _trained(made, trained[0]),
    'optimizer_nbytes': training.optimizer_nbytes(made, trained[0]),
    'steps': made.variant.steps,
    'nbytes': ql.nbytes(weights) if model is None else model.nbytes,
    'bits_per_weight': 32.0
    if model is None
    else model.plan.totals()['bits_per_weight'],
    'judged_seconds': timer.seconds,
    'peak_bytes': runtime.peak_bytes(),
  }
  values |= _starts(curves)
  if made.task.step is not None and config['tokens']:
    values |= speed(made, model, weights, config['tokens'])
  if model is not None:
    # Adapters leave no float weights to compare the model's with.
    compared = base[1][0] if made.variant.lora else weights
    _keep(folder, name, made, model, compared, config)
  by_seed = dict(zip(map(str, config['seeds']), rows, strict=True))
  folder.update_json('seeds.json', name, by_seed)
  folder.metrics.record(head, values)


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _trained(made: training.Trainee, variables: training.Variables) -> int:
  """How many numbers training moves."""
  named = training.labels(made, variables)
  moved = jax.tree.map(
    lambda label, x: x if label != 'state' else None, named, variables
  )
  return _count(moved)


def _starts(curves: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What was checked before the first step: without training."""
  names = {'validation_accuracy': 'accuracy', 'validation_loss': 'loss'}
  return {
    f'start_{short}': float(np.mean([c[name][0][1] for c in curves]))
    for name, short in names.items()
    if all(name in c for c in curves)
  }


def _judge_float(made: training.Trainee, params: Any) -> dict[str, Any]:
  task = made.task
  return quality.flat(
    quality.evaluate(task.apply, params, task.evaluation, task.metric)
  )


def _judge_frozen(made, trained, reference, floats):
  """Numbers of every seed, and the model of the first."""
  task = made.task
  frozen = [made.freeze(v, *made.example) for v in trained]
  model = frozen[0]
  simulated, deployed = jax.jit(made.apply), jax.jit(model.apply)
  rows = []
  for variables, one, params in zip(trained, frozen, floats, strict=True):
    batch = task.evaluation[0][: task.inputs]
    there = simulated(variables, *batch)
    here = deployed(one.params, *batch)
    row = differences(there, here)
    found = quality.assess(
      reference,
      params,
      model.apply,
      one.params,
      task.evaluation,
      task.metric,
    )
    row |= quality.flat(found['quality']) | quality.flat(found['contrast'])
    rows.append(row)
  return rows, model


def differences(simulated: jax.Array, frozen: jax.Array) -> dict[str, float]:
  """How far the frozen outputs are from the simulated ones, by example.

  Raises:
    FrozenError: the median is beyond what rounding explains.
  """
  a, b = (np.asarray(x, np.float64) for x in (simulated, frozen))
  axes = tuple(range(1, a.ndim))
  norms = np.sqrt(np.square(a).sum(axes)) + 1e-30
  relative = np.sqrt(np.square(a - b).sum(axes)) / norms
  median = float(np.median(relative))
  if not median <= TOLERANCE:
    raise FrozenError(
      f'the frozen model differs from the one that was trained: the median '
      f'example by {median:.2g} of its outputs, expected {TOLERANCE:g} at most'
    )
  return {
    'frozen_median_difference': median,
    'frozen_largest_difference': float(relative.max()),
  }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The mean over seeds of every number, with its spread.

  `_stderr`, `_low`, `_high` and `_std` are over the seeds where there are
  several, and else those of the evaluation set.
  """
  if len(rows) == 1:
    return dict(rows[0])
  out: dict[str, Any] = {}
  spreads = ('_stderr', '_low', '_high')
  for key in rows[0]:
    if key.endswith(spreads) or key == 'worst_example':
      continue
    values = np.array([row[key] for row in rows], np.float64)
    deviation = float(values.std(ddof=1))
    out[key] = float(values.mean())
    if any(key + end in rows[0] for end in spreads):
      out[f'{key}_stderr'] = deviation / math.sqrt(len(rows))
      out[f'{key}_std'] = deviation
      out[f'{key}_low'] = float(values.min())
      out[f'{key}_high'] = float(values.max())
  return out | {'seeds': len(rows)}


def speed(
  made: training.Trainee, model: Any, weights: Any, count: int
) -> dict[str, float]:
  """Tokens a second, greedily and one at a time, the best of three."""
  task = made.task
  assert task.step is not None
  assert task.sizes is not None
  step, params = task.step, weights
  if model is not None:
    params, step = model.params, ql.quantized(task.step, decoder(made))
  prompt = jnp.zeros((1, 8), jnp.int32)
  cache = llama.empty_cache(1, 8 + count, task.sizes)

  @functools.partial(jax.jit, static_argnames='count')
  def run(params, cache, count):
    return decoding.greedy(step, params, cache, prompt, count)

  best = math.inf
  for _ in range(4):  # the first one compiles
    with runtime.timed() as timer:
      jax.block_until_ready(run(params, cache, count))
    best = min(best, timer.seconds)
  return {'tokens_per_second': count / best}


def decoder(made: training.Trainee) -> ql.Plan:
  """The plan of the token-by-token function, by the same recipe."""
  task = made.task
  assert task.step is not None
  assert task.sizes is not None
  params = jax.eval_shape(task.init, jax.random.key(0))
  cache = llama.empty_cache(1, 8, task.sizes)
  return ql.plan(
    task.step,
    params,
    training.recipe(made.variant),
    cache,
    jnp.zeros((1, 1), jnp.int32),
    jnp.int32(0),
  )


def _keep(folder, name, made, model, weights, config) -> None:
  """The first seed's model, its plan, and what the page says of its sites."""
  note = {'config': config, 'variant': made.variant.name}
  note['environment'] = runtime.environment()
  model = dataclasses.replace(model, report={**model.report, 'made': note})
  ql.save(folder.path / 'checkpoints' / name, model, overwrite=True)
  folder.update_json('plan.json', name, model.plan.to_json())
  noise = ql.site_sqnr(made.task.apply, weights, model, [made.example])
  rows = report.site_rows(model, noise, weights)
  folder.update_json('sites.json', name, rows)


class _Finite:
  """Whether each operand of a product, and what it gives, is finite."""

  def init(self, site):
    del site
    return {k: jnp.ones((), bool) for k in ('inputs', 'output')}

  def update(self, site, stat, lhs, rhs, out, state):
    del site, state
    fine = [jnp.isfinite(x).all() for x in (lhs, rhs) if _is_float(x)]
    inputs = jnp.stack(fine).all() if fine else jnp.ones((), bool)
    seen = {'inputs': inputs, 'output': jnp.isfinite(out).all()}
    return self.merge(None, stat, seen)

  def merge(self, site, a, b):
    del site
    return jax.tree.map(jnp.logical_and, a, b)


def _is_float(x: Any) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)


def overflow(
  made: training.Trainee, variables: training.Variables, batch: Sequence[Any]
) -> str:
  """Where the first value that is not finite arises: a phrase for a message.

  Args:
    made: what is trained.
    variables: before the update that failed.
    batch: of that update.
  """
  task, inputs = made.task, batch[: made.task.inputs]
  if bad := nonfinite(dict(named_leaves(variables))):
    return f'the variable {bad[0]!r} is not finite'
  weights = thawed(variables)  # floats, of an adapted base too
  _, found = jax.jit(ql.observe(task.apply, _Finite()))(weights, *inputs)
  # In the order of the program, which a jitted function's dict has lost.
  plan = made.plan or ql.plan(task.apply, weights, {'.': ql.int8()}, *inputs)
  for name in (n for n in plan.sites if n in found):
    fine = jax.tree.map(lambda x: bool(np.all(x)), found[name])
    if not fine['inputs']:
      return f'the range of the input of site {name!r} overflowed first'
    if not fine['output']:
      return f'the range of the output of site {name!r} overflowed first'
  return (
    'every product is finite going forward: a gradient overflowed, or the '
    'outputs did after the last product'
  )
