"""Running a model over batches, holding no outputs but those of one batch."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.quality import metric as metrics

Apply = Callable[..., jax.Array]


def evaluate(
  apply: Apply,
  params: Any,
  batches: Iterable[Any],
  metric: metrics.Metric = metrics.classification,
) -> metrics.Summary:
  """The quality of a model on labelled batches, each number with its spread.

  Args:
    apply: `apply(params, *inputs) -> outputs`, a single array.
    params: its parameters.
    batches: tuples `(*inputs, *targets)`; the last may be shorter.
    metric: what to measure; it says how many arrays are targets.

  Returns:
    `{name: Estimate}`, e.g. `accuracy` and `cross_entropy`.

  Raises:
    ValueError: no batch; NaN or infinite outputs, or labels that are no class
      (the batch and the examples are named).
    TypeError: a batch or an output of the wrong kind.
  """
  step = _cached((apply,), metric, ('quality',))
  stats = _stream(step, (params,), batches, metric.targets)
  return metric.finish([batch['quality'] for batch in stats])


def compare(
  apply_a: Apply,
  params_a: Any,
  apply_b: Apply,
  params_b: Any,
  batches: Iterable[Any],
  metric: metrics.Metric = metrics.unlabelled,
) -> metrics.Summary:
  """How far model b is from the reference a on the same inputs.

  Args:
    apply_a: the reference (float) model.
    params_a: its parameters.
    apply_b: the model to judge.
    params_b: its parameters.
    batches: as in `evaluate`. The default metric takes all arrays as inputs.
    metric: says which arrays are targets, which positions count, and what is
      compared.

  Returns:
    For logits: `agreement` (top-1), `kl_mean` and `kl_p99` in nats from a to b,
    `sqnr_db` of the logits, and `worst_example`, the index of the example
    with the largest mean KL. For pairs of embeddings: `similarity_error`,
    `sqnr_db`, `worst_example`.

  Raises:
    ValueError: as `evaluate`; or outputs of different shapes.
    TypeError: as `evaluate`.
  """
  step = _cached((apply_a, apply_b), metric, ('contrast',))
  stats = _stream(step, (params_a, params_b), batches, metric.targets)
  return metric.conclude([batch['contrast'] for batch in stats])


def assess(
  apply_a: Apply,
  params_a: Any,
  apply_b: Apply,
  params_b: Any,
  batches: Iterable[Any],
  metric: metrics.Metric = metrics.classification,
) -> dict[str, metrics.Summary]:
  """`evaluate` of both models and `compare`, in one walk over the batches.

  Args:
    apply_a: the reference (float) model.
    params_a: its parameters.
    apply_b: the model to judge.
    params_b: its parameters.
    batches: labelled batches.
    metric: what to measure.

  Returns:
    `{'reference': ..., 'quality': ..., 'contrast': ...}`: what `evaluate` gives
    of a, of b, and what `compare` gives of the two.
  """
  parts = 'reference', 'quality', 'contrast'
  step = _cached((apply_a, apply_b), metric, parts)
  stats = _stream(step, (params_a, params_b), batches, metric.targets)
  finish = {'contrast': metric.conclude}
  return {
    part: finish.get(part, metric.finish)([batch[part] for batch in stats])
    for part in parts
  }


# Few, because a compiled step holds on to the models it closes over.
@functools.lru_cache(maxsize=8)
def _compiled(
  applies: tuple[Apply, ...], metric: metrics.Metric, parts: tuple[str, ...]
) -> Callable:
  return jax.jit(_step(applies, metric, parts))


def _cached(
  applies: tuple[Apply, ...], metric: metrics.Metric, parts: tuple[str, ...]
) -> Callable:
  """The jitted step; compiled once for a model, however often it is asked."""
  try:
    hash(applies)
  except TypeError:  # what cannot be hashed cannot be looked up
    return _compiled.__wrapped__(applies, metric, parts)
  return _compiled(applies, metric, parts)


def _step(
  applies: tuple[Apply, ...], metric: metrics.Metric, parts: tuple[str, ...]
) -> Callable:
  """`(params, inputs, targets) -> {part: {name: array}}` of one batch.

  The model to judge is the last of `applies`, the reference the first.
  """

  def step(params, inputs, targets):
    outputs = [
      _array(apply(p, *inputs))
      for apply, p in zip(applies, params, strict=True)
    ]
    reference, judged = outputs[0], outputs[-1]
    if reference.shape != judged.shape:
      raise ValueError(
        'The outputs of both models must have one shape; got '
        f'{reference.shape} of the reference and {judged.shape}.'
      )
    counted = metric.counts(judged, *targets)
    stats = {'finite': {'model': _finite(judged, counted)}}
    if len(outputs) > 1:
      stats['finite']['reference model'] = _finite(reference, counted)
    if 'reference' in parts:
      stats['reference'] = metric.update(reference, *targets)
    if 'quality' in parts:
      stats['quality'] = metric.update(judged, *targets)
    if 'contrast' in parts:
      stats['contrast'] = metric.contrast(reference, judged, *targets)
    return stats

  return step


def _array(outputs: Any) -> jax.Array:
  if not hasattr(outputs, 'shape') or outputs.ndim < 2:
    found = jax.tree.map(jnp.shape, outputs)
    raise TypeError(
      'apply must return one array (examples, ..., features) to be measured; '
      f'got {type(outputs).__name__} of shape {found}. Wrap it in a function '
      'that picks the output.'
    )
  return outputs


def _finite(outputs: jax.Array, counted: jax.Array) -> jax.Array:
  """By example, whether every value at a position that counts is finite."""
  finite = jnp.isfinite(outputs).all(-1) | ~counted
  return finite.reshape(len(finite), -1).all(1)


def _stream(
  step: Callable, params: tuple, batches: Iterable[Any], targets: int
) -> list[dict[str, metrics.Stats]]:
  """Statistics of every batch, one batch of work ahead of the host."""
  stats: list[dict[str, metrics.Stats]] = []
  ahead = None
  for i, batch in enumerate(batches):
    device = step(params, *_split(batch, targets, i))
    if ahead is not None:
      stats.append(_fetch(ahead, i - 1))
    ahead = device
  if ahead is None:
    raise ValueError('There is no batch to measure on; at least one is needed.')
  stats.append(_fetch(ahead, len(stats)))
  return stats


def _split(batch: Any, targets: int, i: int) -> tuple[tuple, tuple]:
  """A batch as inputs and targets."""
  batch = batch if isinstance(batch, tuple) else (batch,)
  if len(batch) <= targets:
    raise TypeError(
      f'Batch {i} has {len(batch)} arrays; the metric takes the last {targets} '
      'as targets, and at least one input must come before them.'
    )
  cut = len(batch) - targets
  return batch[:cut], batch[cut:]


def _fetch(device: Any, i: int) -> dict[str, metrics.Stats]:
  """Statistics on the host; refuses a batch that went wrong."""
  host = jax.tree.map(np.asarray, device)
  for model, finite in host.pop('finite').items():
    _refuse(~finite, f'NaN or infinite outputs of the {model}', i)
  for part in host.values():
    if 'fit' in part:
      fit = part.pop('fit')
      bad = ~fit.reshape(len(fit), -1).all(1)
      _refuse(bad, 'Labels that are no class of the model', i)
  return host


def _refuse(bad: np.ndarray, what: str, i: int) -> None:
  if bad.any():
    rows = np.flatnonzero(bad)
    shown = ', '.join(map(str, rows[:5])) + (', ...' if len(rows) > 5 else '')
    raise ValueError(
      f'{what} in batch {i}: {len(rows)} of {len(bad)} examples (rows {shown}).'
    )
