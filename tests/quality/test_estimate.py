"""Intervals against scipy, against brute force, and by their coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quantlab.quality import estimate


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 300), data=st.data())
def test_proportion_is_wilsons(n, data):
  hits = data.draw(st.integers(0, n))
  found = estimate.proportion(np.arange(n) < hits)
  interval = stats.binomtest(hits, n).proportion_ci(0.95, method='wilson')
  assert found.value == pytest.approx(hits / n)
  assert found.low == pytest.approx(interval.low, abs=1e-12)
  assert found.high == pytest.approx(interval.high, abs=1e-12)
  assert found.low <= found.value <= found.high
  assert found.n == n


def test_mean_is_the_textbook_one():
  values = np.random.RandomState(0).gamma(2, size=200)
  found = estimate.mean(values)
  assert found.value == pytest.approx(values.mean())
  assert found.stderr == pytest.approx(stats.sem(values))
  assert found.high - found.value == pytest.approx(
    stats.norm.ppf(0.975) * found.stderr
  )


def test_ratio_spread_agrees_with_the_jackknife():
  rng = np.random.RandomState(1)
  x = rng.randint(20, 200, 150).astype(float)
  y = x * rng.gamma(4, 0.4, 150)  # texts differ, tokens of one text do not
  found = estimate.ratio(y, x)
  assert found.value == pytest.approx(y.sum() / x.sum())
  left_out = (y.sum() - y) / (x.sum() - x)
  jackknife = np.sqrt((149 / 150) * np.square(left_out - left_out.mean()).sum())
  assert found.stderr == pytest.approx(jackknife, rel=0.03)


def test_ratio_covers_the_truth_as_often_as_it_says():
  rng = np.random.RandomState(2)
  hits = 0
  for _ in range(400):
    x = rng.randint(1, 30, 120)
    y = x * rng.gamma(3, 1 / 3, 120)  # true ratio 1
    found = estimate.ratio(y, x)
    hits += found.low <= 1 <= found.high
  # 95 % of 400, four standard deviations of a binomial either way.
  assert 362 <= hits <= 397


def test_share_at_the_ends_keeps_a_width():
  counts = np.full(50, 100)
  all_right = estimate.share(counts, counts)
  assert all_right.value == all_right.high == 1
  # No surer than fifty independent examples make it.
  assert all_right.low == pytest.approx(
    stats.binomtest(50, 50).proportion_ci(0.95, method='wilson').low
  )
  assert estimate.share(0 * counts, counts).high == pytest.approx(
    1 - all_right.low
  )
  mixed = estimate.share(counts - np.arange(50) % 3, counts)
  assert mixed.value < mixed.high <= 1


def test_exponential_of_an_estimate():
  loss = estimate.mean(np.log([4.0, 5.0, 6.0, 4.5]))
  found = estimate.exponential(loss)
  assert found.value == pytest.approx(stats.gmean([4.0, 5.0, 6.0, 4.5]))
  assert (found.low, found.high) == pytest.approx(
    (math.exp(loss.low), math.exp(loss.high))
  )


def test_decibel():
  signal, noise = np.array([4.0, 6.0, 5.0]), np.array([0.01, 0.02, 0.03])
  found = estimate.decibel(signal, noise)
  assert found.value == pytest.approx(10 * math.log10(15 / 0.06))
  assert found.low < found.value < found.high
  assert estimate.decibel(signal, 0 * noise).value == math.inf
  assert estimate.decibel(0 * signal, noise).value == -math.inf


def test_bootstrap_of_a_mean_agrees_with_theory_and_repeats():
  values = np.random.RandomState(3).normal(size=300)
  found = estimate.bootstrap(np.mean, values)
  assert found.stderr == pytest.approx(values.std() / math.sqrt(300), rel=0.12)
  assert found.low < values.mean() < found.high
  assert found == estimate.bootstrap(np.mean, values)


@settings(max_examples=40, deadline=None)
@given(
  values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60),
  q=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
)
def test_quantile_is_numpys_inverted_cdf(values, q):
  found = estimate.quantile(
    np.array(values), np.arange(len(values)), q, resamples=5
  )
  assert found.value == np.quantile(values, q, method='inverted_cdf')


def test_quantile_resamples_whole_examples():
  # Fifty positions an example, all equal: far less is known than 1000 draws.
  rng = np.random.RandomState(4)
  per_example = rng.gamma(1, size=20)
  values, example = np.repeat(per_example, 50), np.repeat(np.arange(20), 50)
  clustered = estimate.quantile(values, example, 0.5)
  independent = estimate.quantile(values, np.arange(1000), 0.5)
  assert clustered.stderr > 3 * independent.stderr
  assert clustered.n == 20


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: estimate.mean(np.array([])), 'at least one'),
    (lambda: estimate.mean(np.zeros((2, 2))), 'one value an example'),
    (lambda: estimate.ratio(np.ones(2), np.zeros(2)), 'nothing was counted'),
    (lambda: estimate.ratio(np.ones(2), np.ones(3)), 'in both'),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_one_example_has_no_known_spread():
  assert math.isnan(estimate.mean(np.array([3.0])).stderr)
  assert math.isnan(estimate.bootstrap(np.mean, np.array([3.0])).stderr)


def test_reads_as_a_number():
  found = estimate.mean(np.array([1.0, 2.0, 3.0]))
  assert float(found) == 2
  assert str(found) == '2 [0.86841, 3.1316]'
