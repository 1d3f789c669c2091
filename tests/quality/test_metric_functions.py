"""Measures of quality against scipy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, special, stats
from sklearn import metrics as sk

from quantlab import quality

RNG = np.random.RandomState(0)
LOGITS = (3 * RNG.normal(size=(40, 7))).astype(np.float32)
OTHER = (LOGITS + 0.3 * RNG.normal(size=LOGITS.shape)).astype(np.float32)
LABELS = RNG.randint(0, 7, 40)


def test_cross_entropy_is_sklearns():
  found = quality.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)).mean()
  p = special.softmax(LOGITS.astype(np.float64), axis=1)
  assert found == pytest.approx(sk.log_loss(LABELS, p, labels=range(7)), 1e-5)


def test_cross_entropy_stands_large_logits():
  logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
  np.testing.assert_allclose(
    quality.cross_entropy(logits, jnp.array([0, 0])), [0.0, 1e4]
  )


def test_accuracy_is_sklearns():
  found = quality.correct(jnp.asarray(LOGITS), jnp.asarray(LABELS)).mean()
  assert found == pytest.approx(
    sk.accuracy_score(LABELS, LOGITS.argmax(1)), 1e-6
  )


def test_agreement_counts_equal_choices():
  found = np.asarray(quality.agreement(jnp.asarray(LOGITS), jnp.asarray(OTHER)))
  np.testing.assert_array_equal(found, LOGITS.argmax(1) == OTHER.argmax(1))


def test_kl_is_scipys_relative_entropy():
  p = special.softmax(LOGITS.astype(np.float64), axis=1)
  q = special.softmax(OTHER.astype(np.float64), axis=1)
  found = quality.kl_divergence(jnp.asarray(LOGITS), jnp.asarray(OTHER))
  np.testing.assert_allclose(
    found, special.rel_entr(p, q).sum(1), rtol=2e-4, atol=2e-7
  )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_kl_ignores_a_shift_of_all_logits_and_is_not_negative(seed, shift):
  logits = jnp.asarray(np.random.RandomState(seed).normal(size=(3, 5)))
  divergence = quality.kl_divergence(logits, logits + shift)
  assert (divergence >= 0).all()
  np.testing.assert_allclose(divergence, 0, atol=1e-5)


def test_sqnr():
  noise = OTHER - LOGITS
  expected = 10 * np.log10(np.square(LOGITS).sum() / np.square(noise).sum())
  found = quality.sqnr(jnp.asarray(LOGITS), jnp.asarray(OTHER))
  assert found == pytest.approx(expected, 1e-5)
  assert quality.sqnr(jnp.asarray(LOGITS), jnp.asarray(LOGITS)) == np.inf


def test_cosine_is_scipys():
  found = quality.cosine(jnp.asarray(LOGITS), jnp.asarray(OTHER))
  expected = [
    1 - spatial.distance.cosine(a, b)
    for a, b in zip(LOGITS, OTHER, strict=True)
  ]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert quality.cosine(jnp.zeros(3), jnp.ones(3)) == 0


@settings(max_examples=80, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(0, 6), st.floats(-2, 2, width=16)),
    min_size=3,
    max_size=40,
  )
)
def test_spearman_is_scipys_with_ties(pairs):
  a, b = np.array(pairs, np.float64).T
  found = quality.spearman(a, b)
  if len(set(a)) == 1 or len(set(b)) == 1:
    assert np.isnan(found)
  else:
    assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_similarity_error():
  assert quality.similarity_error(
    np.array([0.5, 0.1, -0.2]), np.array([0.51, 0.1, -0.18])
  ) == pytest.approx(100 * np.sqrt((0.01**2 + 0.02**2) / 3))
