"""What a workload is judged by: statistics an example, and their summary.

A metric never sees all outputs at once. `update` and `contrast` run inside the
jitted step and reduce a batch of outputs, however large its logits, to a few
numbers an example (`contrast`: a position); `finish` and `conclude` make
estimates of them on the host.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.quality import estimate, functions

Stats = dict[str, np.ndarray]
Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A quality measure of outputs, and of outputs beside a reference's.

  A batch is `(*inputs, *targets)`.

  Attributes:
    name: of the metric.
    primary: key of its main number in what `finish` returns.
    targets: how many arrays at the end of a batch are not inputs.
    update: `(outputs, *targets) -> {name: (b, ...)}`, traced.
    finish: `([stats of a batch, ...]) -> {name: Estimate}`, on the host.
    contrast: `(reference outputs, outputs, *targets) -> {name: (b, ...)}`.
    conclude: `([stats of a batch, ...]) -> {name: Estimate or index}`.
    counts: `(outputs, *targets) -> bool (b, ...)`: which positions count; the
      axes of the outputs but the last.
  """

  name: str
  primary: str
  targets: int
  update: Callable[..., dict[str, jax.Array]]
  finish: Callable[[Sequence[Stats]], Summary]
  contrast: Callable[..., dict[str, jax.Array]]
  conclude: Callable[[Sequence[Stats]], Summary]
  counts: Callable[..., jax.Array]


def _column(stats: Sequence[Stats], name: str) -> np.ndarray:
  return np.concatenate([batch[name] for batch in stats])


def _sum_rows(x: jax.Array) -> jax.Array:
  """Sums all but the leading axis."""
  return x.reshape(len(x), -1).sum(1)


def _labels_fit(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether labels index the classes; refuses shapes that do not match."""
  if labels.shape != logits.shape[:-1]:
    raise ValueError(
      'Labels must have the shape of the logits without the last axis; got '
      f'{labels.shape=}, {logits.shape=}.'
    )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'Labels are integers, got {labels.dtype}.')
  return (labels >= 0) & (labels < logits.shape[-1])


# --- logits beside a reference's ---------------------------------------------


def _contrast_logits(
  reference: jax.Array, logits: jax.Array, counted: jax.Array
) -> dict[str, jax.Array]:
  kl = jnp.where(counted, functions.kl_divergence(reference, logits), 0)
  same = functions.agreement(reference, logits) & counted
  reference = jnp.where(counted[..., None], reference, 0).astype(jnp.float32)
  noise = jnp.where(counted[..., None], logits, 0) - reference
  return {
    'agree': _sum_rows(same),
    'count': _sum_rows(counted),
    'signal': _sum_rows(jnp.square(reference)),
    'noise': _sum_rows(jnp.square(noise)),
    'kl': kl,
    'counted': counted,
  }


def _conclude_logits(stats: Sequence[Stats]) -> Summary:
  count = _column(stats, 'count')
  kl = [batch['kl'].reshape(len(batch['kl']), -1) for batch in stats]
  counted = [b['counted'].reshape(len(b['counted']), -1) for b in stats]
  by_example = np.concatenate([rows.sum(1, dtype=np.float64) for rows in kl])
  positions = np.concatenate(
    [rows[keep] for rows, keep in zip(kl, counted, strict=True)]
  )
  example = np.repeat(np.arange(len(count)), count)
  return {
    'agreement': estimate.share(_column(stats, 'agree'), count),
    'kl_mean': estimate.ratio(by_example, count, lower=0.0),
    'kl_p99': estimate.quantile(positions, example, 0.99),
    'sqnr_db': estimate.decibel(
      _column(stats, 'signal'), _column(stats, 'noise')
    ),
    'worst_example': int(np.argmax(by_example / np.maximum(count, 1))),
  }


def _everywhere(outputs: jax.Array, *targets: jax.Array) -> jax.Array:
  del targets
  return jnp.ones(outputs.shape[:-1], bool)


# --- classification ----------------------------------------------------------


def _classify(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  return {
    'fit': _labels_fit(logits, labels),
    'correct': functions.correct(logits, labels),
    'loss': functions.cross_entropy(logits, labels),
  }


def _classified(stats: Sequence[Stats]) -> Summary:
  return {
    'accuracy': estimate.proportion(_column(stats, 'correct')),
    'cross_entropy': estimate.mean(_column(stats, 'loss')),
  }


def _classify_contrast(reference, logits, labels) -> dict[str, jax.Array]:
  before = functions.correct(reference, labels).astype(jnp.float32)
  return {
    **_contrast_logits(reference, logits, _everywhere(logits)),
    'change': functions.correct(logits, labels) - before,
  }


def _classify_conclude(stats: Sequence[Stats]) -> Summary:
  return {
    **_conclude_logits(stats),
    'accuracy_change': estimate.mean(_column(stats, 'change')),
  }


classification = Metric(
  name='classification',
  primary='accuracy',
  targets=1,
  update=_classify,
  finish=_classified,
  contrast=_classify_contrast,
  conclude=_classify_conclude,
  counts=_everywhere,
)

# Logits without labels: a batch is all inputs, and only `compare` has a say.
unlabelled = dataclasses.replace(
  classification,
  name='unlabelled',
  primary='agreement',
  targets=0,
  update=lambda logits: {},
  finish=lambda stats: {},
  contrast=lambda reference, logits: _contrast_logits(
    reference, logits, _everywhere(logits)
  ),
  conclude=_conclude_logits,
)


# --- language models ---------------------------------------------------------


def _counted(logits, labels, mask):
  del logits
  if mask.shape != labels.shape:
    raise ValueError(
      f'The mask must have the shape of the labels; got {mask.shape=}, '
      f'{labels.shape=}.'
    )
  # Of floats NaN would count, and a weight of one half as much as one.
  if not jnp.issubdtype(mask.dtype, jnp.integer) and mask.dtype != bool:
    raise TypeError(
      'The mask says which positions count, in booleans or integers; got '
      f'{mask.dtype}.'
    )
  return mask.astype(bool)


def _predict(logits, labels, mask) -> dict[str, jax.Array]:
  counted = _counted(logits, labels, mask)
  fit = _labels_fit(logits, labels) | ~counted
  loss = functions.cross_entropy(logits, labels)
  return {
    'fit': fit,
    'loss': _sum_rows(jnp.where(counted, loss, 0)),
    'correct': _sum_rows(functions.correct(logits, labels) & counted),
    'count': _sum_rows(counted),
  }


def _predicted(stats: Sequence[Stats]) -> Summary:
  count = _column(stats, 'count')
  loss = estimate.ratio(_column(stats, 'loss'), count)
  return {
    'perplexity': estimate.exponential(loss),
    'loss': loss,
    'accuracy': estimate.share(_column(stats, 'correct'), count),
  }


def _predict_contrast(reference, logits, labels, mask) -> dict[str, jax.Array]:
  counted = _counted(logits, labels, mask)
  change = functions.cross_entropy(logits, labels)
  change = change - functions.cross_entropy(reference, labels)
  return {
    **_contrast_logits(reference, logits, counted),
    'change': _sum_rows(jnp.where(counted, change, 0)),
  }


def _predict_conclude(stats: Sequence[Stats]) -> Summary:
  change = estimate.ratio(_column(stats, 'change'), _column(stats, 'count'))
  return {
    **_conclude_logits(stats),
    'loss_change': change,
    'perplexity_ratio': estimate.exponential(change),
  }


# Targets: the next tokens (b, t) and the mask (b, t) of those that count, of
# booleans or integers.
language_model = Metric(
  name='language_model',
  primary='perplexity',
  targets=2,
  update=_predict,
  finish=_predicted,
  contrast=_predict_contrast,
  conclude=_predict_conclude,
  counts=_counted,
)


# --- pairs of embeddings -----------------------------------------------------


def _pair_cosine(embeddings: jax.Array) -> jax.Array:
  if embeddings.ndim != 3 or embeddings.shape[1] != 2:
    raise ValueError(
      f'Expected the embeddings of pairs, (b, 2, d); got {embeddings.shape=}.'
    )
  return functions.cosine(embeddings[:, 0], embeddings[:, 1])


def _pair_contrast(reference, embeddings, score) -> dict[str, jax.Array]:
  reference = reference.astype(jnp.float32)
  return {
    'reference': _pair_cosine(reference),
    'cosine': _pair_cosine(embeddings),
    'score': score,
    'signal': _sum_rows(jnp.square(reference)),
    'noise': _sum_rows(jnp.square(embeddings - reference)),
  }


def _pair_conclude(stats: Sequence[Stats]) -> Summary:
  reference, found = _column(stats, 'reference'), _column(stats, 'cosine')

  def change(reference, found, score):
    return functions.spearman(found, score) - functions.spearman(
      reference, score
    )

  return {
    'spearman_change': estimate.bootstrap(
      change, reference, found, _column(stats, 'score')
    ),
    'similarity_error': estimate.bootstrap(
      functions.similarity_error, reference, found
    ),
    'sqnr_db': estimate.decibel(
      _column(stats, 'signal'), _column(stats, 'noise')
    ),
    'worst_example': int(np.argmax(np.abs(found - reference))),
  }


# Target: the similarity that people gave each pair, (b,).
sentence_pairs = Metric(
  name='sentence_pairs',
  primary='spearman',
  targets=1,
  update=lambda embeddings, score: {
    'cosine': _pair_cosine(embeddings),
    'score': score,
  },
  finish=lambda stats: {
    'spearman': estimate.bootstrap(
      functions.spearman, _column(stats, 'cosine'), _column(stats, 'score')
    )
  },
  contrast=_pair_contrast,
  conclude=_pair_conclude,
  counts=_everywhere,
)
