"""Streaming evaluation against the same numbers from all outputs at once."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from quantlab import data, quality


def linear(params, x):
  return x @ params['w']


@pytest.fixture
def problem():
  rng = np.random.RandomState(0)
  x = rng.normal(size=(23, 5)).astype(np.float32)
  params = {'w': rng.normal(size=(5, 4)).astype(np.float32)}
  y = rng.randint(0, 4, 23)
  noisy = {'w': params['w'] + 0.2 * rng.normal(size=(5, 4)).astype(np.float32)}
  return x, y, params, noisy


@pytest.mark.parametrize('size', [1, 4, 23, 100])
def test_classification_does_not_depend_on_the_batches(problem, size):
  x, y, params, _ = problem
  found = quality.evaluate(linear, params, data.Batches((x, y), size))
  logits = (x @ params['w']).astype(np.float64)
  loss = -special.log_softmax(logits, axis=1)[np.arange(23), y]
  assert found['accuracy'].value == (logits.argmax(1) == y).mean()
  assert found['cross_entropy'].value == pytest.approx(loss.mean(), 1e-5)
  assert found['cross_entropy'].stderr == pytest.approx(stats.sem(loss), 1e-4)
  assert found['accuracy'].n == 23


def test_compare_classification(problem):
  x, y, params, noisy = problem
  a, b = x.astype(np.float64) @ params['w'], x.astype(np.float64) @ noisy['w']
  p, q = special.softmax(a, axis=1), special.softmax(b, axis=1)
  kl = special.rel_entr(p, q).sum(1)
  found = quality.compare(
    linear,
    params,
    linear,
    noisy,
    data.Batches((x, y), 6),
    quality.classification,
  )
  assert found['agreement'].value == (a.argmax(1) == b.argmax(1)).mean()
  assert found['kl_mean'].value == pytest.approx(kl.mean(), 1e-3)
  assert found['kl_p99'].value == pytest.approx(
    np.quantile(kl, 0.99, method='inverted_cdf'), 1e-3
  )
  sqnr = 10 * math.log10(np.square(a).sum() / np.square(a - b).sum())
  assert found['sqnr_db'].value == pytest.approx(sqnr, 1e-4)
  assert found['worst_example'] == kl.argmax()
  change = (b.argmax(1) == y).astype(float) - (a.argmax(1) == y)
  assert found['accuracy_change'].value == pytest.approx(change.mean())
  assert found['accuracy_change'].stderr == pytest.approx(stats.sem(change))


def test_compare_with_itself(problem):
  x, _, params, _ = problem
  found = quality.compare(linear, params, linear, params, data.Batches(x, 6))
  assert found['agreement'].value == 1
  assert found['agreement'].low < 1
  assert found['kl_mean'].value == 0
  assert found['sqnr_db'].value == math.inf


def test_assess_is_both_evaluations_and_the_comparison(problem):
  x, y, params, noisy = problem
  batches = data.Batches((x, y), 6)
  found = quality.assess(linear, params, linear, noisy, batches)
  assert found['reference'] == quality.evaluate(linear, params, batches)
  assert found['quality'] == quality.evaluate(linear, noisy, batches)
  assert found['contrast'] == quality.compare(
    linear, params, linear, noisy, batches, quality.classification
  )
  before, after = (found[k]['accuracy'].value for k in ('reference', 'quality'))
  change = found['contrast']['accuracy_change'].value
  assert change == pytest.approx(after - before)


def bigram(params, tokens):
  return params['table'][tokens]


@pytest.fixture
def language():
  rng = np.random.RandomState(1)
  tokens = rng.randint(0, 9, (11, 7))
  lengths = rng.randint(2, 8, 11)
  mask = np.arange(6) < lengths[:, None] - 1
  inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
  targets[~mask] = -100  # what is masked need not be a token
  params = {'table': rng.normal(size=(9, 9)).astype(np.float32)}
  noisy = {'table': params['table'] + 0.1 * rng.normal(size=(9, 9))}
  return inputs, targets, mask, params, noisy


def test_perplexity_weights_tokens_and_skips_the_padding(language):
  inputs, targets, mask, params, _ = language
  log_p = special.log_softmax(params['table'].astype(np.float64), axis=1)
  log_p = log_p[inputs]
  picked = np.take_along_axis(log_p, np.where(mask, targets, 0)[..., None], -1)
  loss = -picked[..., 0][mask].mean()
  found = quality.evaluate(
    bigram,
    params,
    data.Batches((inputs, targets, mask), 4),
    quality.language_model,
  )
  assert found['loss'].value == pytest.approx(loss, 1e-5)
  assert found['perplexity'].value == pytest.approx(math.exp(loss), 1e-5)
  right = log_p.argmax(-1)[mask] == targets[mask]
  assert found['accuracy'].value == pytest.approx(right.mean())
  assert found['loss'].n == 11  # texts, not tokens


def test_compare_language_models(language):
  inputs, targets, mask, params, noisy = language
  a = params['table'].astype(np.float64)[inputs]
  b = noisy['table'][inputs]
  p, q = special.softmax(a, axis=-1), special.softmax(b, axis=-1)
  kl = special.rel_entr(p, q).sum(-1)
  found = quality.compare(
    bigram,
    params,
    bigram,
    noisy,
    data.Batches((inputs, targets, mask), 4),
    quality.language_model,
  )
  assert found['kl_mean'].value == pytest.approx(kl[mask].mean(), 1e-3)
  assert found['kl_p99'].value == pytest.approx(
    np.quantile(kl[mask], 0.99, method='inverted_cdf'), 1e-3
  )
  agree = (a.argmax(-1) == b.argmax(-1))[mask]
  assert found['agreement'].value == pytest.approx(agree.mean())
  noise = np.square((a - b)[mask]).sum()
  sqnr = 10 * math.log10(np.square(a[mask]).sum() / noise)
  assert found['sqnr_db'].value == pytest.approx(sqnr, 1e-4)
  by_text = np.where(mask, kl, 0).sum(1) / mask.sum(1)
  assert found['worst_example'] == by_text.argmax()
  batches = data.Batches((inputs, targets, mask), 4)
  after, before = (
    quality.evaluate(bigram, v, batches, quality.language_model)['loss'].value
    for v in (noisy, params)
  )
  assert found['loss_change'].value == pytest.approx(after - before, abs=1e-6)
  assert found['perplexity_ratio'].value == pytest.approx(
    math.exp(after - before), 1e-5
  )


def embed(params, x):
  y = jnp.tanh(x @ params['w'])
  return y / jnp.linalg.norm(y, axis=-1, keepdims=True)


def test_sentence_pairs():
  rng = np.random.RandomState(2)
  pairs = rng.normal(size=(30, 2, 5)).astype(np.float32)
  score = rng.randint(0, 6, 30).astype(np.float32)
  params = {'w': rng.normal(size=(5, 8)).astype(np.float32)}
  noisy = {'w': params['w'] + 0.05 * rng.normal(size=(5, 8))}

  def cosines(w):
    y = np.tanh(pairs.astype(np.float64) @ w)
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return (y[:, 0] * y[:, 1]).sum(-1)

  batches = data.Batches((pairs, score), 8)
  a, b = cosines(params['w']), cosines(noisy['w'])
  found = quality.assess(
    embed, params, embed, noisy, batches, quality.sentence_pairs
  )
  spearman = [stats.spearmanr(c, score).statistic for c in (a, b)]
  assert found['reference']['spearman'].value == pytest.approx(spearman[0])
  assert found['quality']['spearman'].value == pytest.approx(spearman[1])
  contrast = found['contrast']
  assert contrast['spearman_change'].value == pytest.approx(
    spearman[1] - spearman[0]
  )
  assert contrast['similarity_error'].value == pytest.approx(
    100 * np.sqrt(np.square(b - a).mean()), 1e-4
  )
  assert contrast['worst_example'] == np.abs(b - a).argmax()
  assert contrast['similarity_error'].low > 0


def test_compiles_once_for_each_shape(problem):
  x, y, params, noisy = problem
  traced = []

  def apply(params, x):
    traced.append(x.shape)
    return x @ params['w']

  batches = data.Batches((x, y), 10)  # 10, 10, 3
  quality.evaluate(apply, params, batches)
  assert traced == [(10, 5), (3, 5)]
  quality.evaluate(apply, noisy, batches)
  assert len(traced) == 2


def test_an_apply_that_cannot_be_hashed(problem):
  x, y, params, _ = problem

  class Model:
    __hash__ = None

    def __call__(self, params, x):
      return x @ params['w']

  batches = data.Batches((x, y), 10)
  assert quality.evaluate(Model(), params, batches) == quality.evaluate(
    linear, params, batches
  )


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_bad_outputs_are_named_by_batch(problem, value):
  x, y, params, _ = problem
  x = x.copy()
  x[14, 2] = value
  batches = data.Batches((x, y), 6)
  with pytest.raises(
    ValueError, match=r'outputs of the model in batch 2: 1 of 6.*rows 2'
  ):
    quality.evaluate(linear, params, batches)

  def broken(params, x):
    return jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0) @ params['w']

  with pytest.raises(ValueError, match='of the reference model in batch 2'):
    quality.compare(
      linear, params, broken, params, batches, quality.classification
    )


def test_bad_outputs_in_the_padding_do_not_matter(language):
  inputs, targets, mask, params, _ = language

  def apply(params, tokens, real):
    return jnp.where(real[..., None], params['table'][tokens], jnp.nan)

  found = quality.evaluate(
    apply,
    params,
    data.Batches((inputs, mask, targets, mask), 4),
    quality.language_model,
  )
  expected = quality.evaluate(
    bigram,
    params,
    data.Batches((inputs, targets, mask), 4),
    quality.language_model,
  )
  assert found == expected


def test_refuses_what_cannot_be_measured(problem, language):
  x, y, params, _ = problem
  evaluate = functools.partial(quality.evaluate, linear, params)
  with pytest.raises(ValueError, match='There is no batch'):
    evaluate([])
  with pytest.raises(ValueError, match=r'no class.*in batch 1: 1 of 10'):
    evaluate(data.Batches((x, np.where(np.arange(23) == 12, 4, y)), 10))
  with pytest.raises(ValueError, match='shape of the logits'):
    evaluate([(x, y[:, None])])
  with pytest.raises(TypeError, match='Batch 0 has 1 arrays'):
    evaluate(data.Batches(x, 4))
  with pytest.raises(TypeError, match='must return one array'):
    quality.evaluate(lambda p, x: (x, x), params, [(x, y)])
  with pytest.raises(ValueError, match='one shape'):
    quality.compare(linear, params, lambda p, x: x, params, [x])
  with pytest.raises(ValueError, match=r'pairs, \(b, 2, d\)'):
    quality.evaluate(linear, params, [(x, y)], quality.sentence_pairs)
  inputs, targets, mask, table, _ = language
  wrong = np.where(np.arange(11)[:, None] == 3, 99, targets)
  with pytest.raises(ValueError, match='no class'):
    quality.evaluate(
      bigram, table, [(inputs, wrong, mask)], quality.language_model
    )


def test_bfloat16_logits_are_measured_in_float32():
  rng = np.random.RandomState(5)
  half = {'table': jnp.asarray(4 * rng.normal(size=(6, 9)), jnp.bfloat16)}
  rows, labels = rng.randint(0, 6, 30), rng.randint(0, 9, 30)
  found = quality.evaluate(bigram, half, [(rows, labels)])
  logits = np.asarray(half['table'], np.float64)[rows]
  loss = -special.log_softmax(logits, axis=1)[np.arange(30), labels].mean()
  assert found['cross_entropy'].value == pytest.approx(loss, 1e-5)


def test_arguments_of_another_type_are_refused(problem):
  x, y, params, _ = problem
  with pytest.raises(TypeError, match=r'apply must be a function.*got dict'):
    quality.evaluate(params, params, [(x, y)])
  with pytest.raises(TypeError, match=r"metric must be one of.*got 'accuracy'"):
    quality.evaluate(linear, params, [(x, y)], 'accuracy')
  with pytest.raises(ValueError, match='Batch 1 has an array without examples'):
    quality.evaluate(linear, params, [(x, y), (x[:0], y[:0])])
