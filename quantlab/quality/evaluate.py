"""Running a model over batches, holding no outputs but those of one batch."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.quality import metric as metrics

Apply = Callable[..., jax.Array]


class NonFiniteError(ValueError):
  """Outputs that are no numbers."""


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
    NonFiniteError: NaN or infinite outputs (the batch and the examples are
      named).
    ValueError: no batch; labels that are no class (named likewise).
    TypeError: a batch or an output of the wrong kind.
  """
  step = _cached(_judging, apply, _metric(metric), ('quality',))
  stats = _stream(step, params, batches, metric.targets)
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
  step = _cached(_judging, apply_b, _metric(metric), ('contrast',))
  reference = functools.partial(_cached(_outputs, apply_a), params_a)
  stats = _stream(step, params_b, batches, metric.targets, reference)
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
  step = _cached(_judging, apply_b, metric, parts)
  reference = functools.partial(_cached(_outputs, apply_a), params_a)
  stats = _stream(step, params_b, batches, metric.targets, reference)
  finish = {'contrast': metric.conclude}
  return {
    part: finish.get(part, metric.finish)([batch[part] for batch in stats])
    for part in parts
  }


def _metric(metric: metrics.Metric) -> metrics.Metric:
  if not isinstance(metric, metrics.Metric):
    raise TypeError(
      'metric must be one of quantlab.quality, such as quality.classification, '
      f'got {metric!r}.'
    )
  return metric


# Few, because a compiled function holds on to the model it closes over.
@functools.lru_cache(maxsize=8)
def _compiled(make: Callable, apply: Apply, *args: Any) -> Callable:
  return jax.jit(make(apply, *args))


def _cached(make: Callable, apply: Apply, *args: Any) -> Callable:
  """The jitted function; compiled once for a model, however often asked.

  The reference is a function of its own, so that judging many variants of a
  model compiles the model itself once.
  """
  if not callable(apply):
    raise TypeError(
      'apply must be a function of (params, *inputs), such as model.apply; got '
      f'{type(apply).__name__}.'
    )
  try:
    hash(apply)
  except TypeError:  # what cannot be hashed cannot be looked up
    return _compiled.__wrapped__(make, apply, *args)
  return _compiled(make, apply, *args)


def _outputs(apply: Apply) -> Callable:
  """`(params, inputs) -> outputs`, checked to be one array."""
  return lambda params, inputs: _array(apply(params, *inputs))


def _judging(
  apply: Apply, metric: metrics.Metric, parts: tuple[str, ...]
) -> Callable:
  """`(params, inputs, targets, reference) -> {part: {name: array}}`.

  The statistics of one batch; `reference` are the outputs to compare with, or
  None.
  """

  def step(params, inputs, targets, reference):
    judged = _array(apply(params, *inputs))
    counted = metric.counts(judged, *targets)
    stats = {'finite': {'model': _finite(judged, counted)}}
    if reference is not None:
      if reference.shape != judged.shape:
        raise ValueError(
          'The outputs of both models must have one shape; got '
          f'{reference.shape} of the reference and {judged.shape}.'
        )
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
  step: Callable,
  params: Any,
  batches: Iterable[Any],
  targets: int,
  reference: Callable = lambda inputs: None,
) -> list[dict[str, metrics.Stats]]:
  """Statistics of every batch, one batch of work ahead of the host."""
  stats: list[dict[str, metrics.Stats]] = []
  ahead = None
  for i, batch in enumerate(batches):
    inputs, wanted = _split(batch, targets, i)
    device = step(params, inputs, wanted, reference(inputs))
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
  if any(np.shape(x)[:1] == (0,) for x in jax.tree.leaves(batch)):
    raise ValueError(
      f'Batch {i} has an array without examples (first axis 0); remove it.'
    )
  cut = len(batch) - targets
  return batch[:cut], batch[cut:]


def _fetch(device: Any, i: int) -> dict[str, metrics.Stats]:
  """Statistics on the host; refuses a batch that went wrong."""
  host = jax.tree.map(np.asarray, device)
  for model, finite in host.pop('finite').items():
    what = f'NaN or infinite outputs of the {model}'
    _refuse(~finite, what, i, NonFiniteError)
  for part in host.values():
    if 'fit' in part:
      fit = part.pop('fit')
      bad = ~fit.reshape(len(fit), -1).all(1)
      _refuse(bad, 'Labels that are no class of the model', i)
  return host


def _refuse(
  bad: np.ndarray, what: str, i: int, error: type[ValueError] = ValueError
) -> None:
  if bad.any():
    rows = np.flatnonzero(bad)
    shown = ', '.join(map(str, rows[:5])) + (', ...' if len(rows) > 5 else '')
    raise error(
      f'{what} in batch {i}: {len(rows)} of {len(bad)} examples (rows {shown}).'
    )
