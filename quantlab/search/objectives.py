"""What a choice does to a model, example by example, traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.quality import estimate
from quantlab.quality import metric as metrics

# Measured by running the quantized model: unit of each.
DIRECT = {
  'loss': 'nats',
  'kl': 'nats',
  'output_mse': 'noise / signal of the output',
  'sqnr': '-dB',
  'similarity': 'squared change of cosine',
}
# Of these, those that a derivative is taken of.
SMOOTH = ('loss', 'kl', 'output_mse', 'similarity')
SILENT = -200.0  # what 'sqnr' counts where there is no noise at all


def known(task: metrics.Metric) -> tuple[str, ...]:
  """The objectives that a task has."""
  found = ['output_mse', 'sqnr']
  if task.name == 'sentence_pairs':
    return (*found, 'similarity')
  if task.name != 'unlabelled':
    found.append('loss')
  return (*found, 'kl')


def default(task: metrics.Metric) -> str:
  """What second-order methods expand, unless told: the loss, if there is."""
  have = known(task)
  return next(n for n in ('loss', 'similarity', 'kl') if n in have)


def check(task: metrics.Metric, name: str) -> str:
  """Refuses an objective that a task has not."""
  if not isinstance(task, metrics.Metric):
    raise TypeError(
      f'task= takes a metric such as quality.classification, got {task!r}'
    )
  if name not in known(task):
    raise ValueError(
      f'the task {task.name!r} has no {name!r}; it has {list(known(task))}. '
      'Labels come with a task such as quality.classification, and with '
      'batches of (*inputs, *targets)'
    )
  return name


def per_example(
  task: metrics.Metric, name: str
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """`(reference, outputs, *targets) -> (sums (b,), counts (b,))`.

  The objective is the sum of the sums over the sum of the counts. Of 'loss'
  it is the change from the reference. Differentiable in the outputs.
  """
  f = {
    'loss': _loss,
    'kl': _kl,
    'output_mse': _noise,
    'sqnr': _noise,
    'similarity': _similarity,
  }[check(task, name)]

  def run(reference, outputs, *targets):
    return f(task, reference, outputs, targets)

  return run


def sound(task: metrics.Metric) -> Callable[..., jax.Array]:
  """`(outputs, *targets) -> bool (3,)`: outputs are finite, labels are
  classes, the loss is finite.
  """

  def run(outputs, *targets):
    found = [jnp.isfinite(outputs).all(), jnp.array(True), jnp.array(True)]
    if 'loss' in known(task):
      stats = task.update(outputs, *targets)
      found[1:] = [stats['fit'].all(), jnp.isfinite(stats['loss']).all()]
    return jnp.stack(found)

  return run


def refuse_unsound(index: int, found: Sequence[bool]) -> None:
  """Refuses a batch on which the float model itself fails.

  Raises:
    ValueError: names the batch.
  """
  outputs, labels, loss = found
  if not outputs:
    raise ValueError(
      f'the float model gives outputs that are not finite on batch {index}: '
      'the batch or the parameters hold NaN or Inf, or the model overflows'
    )
  if not labels:
    raise ValueError(
      f'batch {index} has labels that are none of the classes, 0 to the length '
      'of the last axis of the outputs less one'
    )
  if not loss:
    raise ValueError(
      f'the loss of the float model is not finite on batch {index}, though its '
      'outputs are'
    )


def conclude(
  name: str, sums: np.ndarray, counts: np.ndarray
) -> tuple[float, float]:
  """(value, standard error) over all examples; NaN where one failed."""
  sums, counts = np.asarray(sums, float), np.asarray(counts, float)
  if not np.isfinite(sums).all():
    return float('nan'), float('nan')
  if name == 'sqnr':
    found = estimate.decibel(counts, sums)
    return (-found.value, found.stderr) if sums.any() else (SILENT, 0.0)
  if not counts.sum() > 0:
    raise ValueError(
      f'nothing was counted for {name!r}: its masks are all zero, or the '
      'outputs of the float model are'
    )
  found = estimate.ratio(sums, counts)
  return found.value, found.stderr


def over_batches(
  samples: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mean of batches by what each counts, and its standard error.

  Of a ratio of sums, as `estimate.ratio` has it; with equal weights the mean.

  Args:
    samples: (batches, ...), each a mean over its batch.
    weights: (batches,), what those means were divided by.

  Raises:
    ValueError: nothing was counted.
  """
  used = weights > 0
  if not used.any():
    raise ValueError('nothing was counted in any batch: its masks are all zero')
  samples, weights = samples[used], weights[used]
  w = weights.reshape(-1, *[1] * (samples.ndim - 1))
  n, total = len(w), w.sum()
  mean = (w * samples).sum(0) / total
  if n == 1:
    return mean, np.full_like(mean, np.nan)
  off = np.square(w * (samples - mean)).sum(0)
  return mean, np.sqrt(n / (n - 1) * off) / total


def _loss(task, reference, outputs, targets):
  after = task.update(outputs, *targets)
  before = task.update(jax.lax.stop_gradient(reference), *targets)
  count = after.get('count', jnp.ones(len(outputs)))
  return after['loss'] - before['loss'], count


def _kl(task, reference, outputs, targets):
  """KL(reference || outputs); smooth at 0, where it is never cut."""
  counted = task.counts(outputs, *targets)
  p = jax.nn.log_softmax(reference.astype(jnp.float32))
  q = jax.nn.log_softmax(outputs.astype(jnp.float32))
  kl = jnp.where(counted, (jnp.exp(p) * (p - q)).sum(-1), 0)
  return _rows(kl), _rows(counted)


def _noise(task, reference, outputs, targets):
  counted = task.counts(outputs, *targets)
  # Of embeddings of pairs every element counts.
  counted = counted.reshape(
    *counted.shape, *[1] * (outputs.ndim - counted.ndim)
  )
  noise = jnp.where(counted, outputs - reference, 0).astype(jnp.float32)
  signal = jnp.where(counted, reference, 0).astype(jnp.float32)
  return _rows(jnp.square(noise)), _rows(jnp.square(signal))


def _similarity(task, reference, outputs, targets):
  found, wanted = _cosine(outputs), _cosine(reference)
  return jnp.square(found - wanted), jnp.ones_like(found)


def _cosine(pairs: jax.Array) -> jax.Array:
  a, b = pairs[:, 0].astype(jnp.float32), pairs[:, 1].astype(jnp.float32)
  return (a * b).sum(-1) / (
    jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  )


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(len(x), -1).astype(jnp.float32).sum(1)


def mean(
  task: metrics.Metric, name: str
) -> Callable[[Any, Any, Sequence[Any]], jax.Array]:
  """`(reference, outputs, targets) -> scalar`, the objective of one batch."""
  f = per_example(task, name)

  def run(reference, outputs, targets):
    sums, counts = f(reference, outputs, *targets)
    return sums.sum() / counts.sum()

  return run
