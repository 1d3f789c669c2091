"""Plans whose outputs are no numbers, and work that was cut short."""

import math
import types

import numpy as np
import pytest
from tables import table_of

from experiments import allocated, bisected, sensitivity, variants
from quantlab import quality, runtime

NAN = float('nan')


def table(values, interactions=None):
  return table_of(values, {'bytes': [[2, 4, 8]] * 3}, interactions=interactions)


def test_plans_with_an_entry_that_failed_are_left_out():
  """Of ranks and of R squared alike; NaN is text in JSON."""
  rng = np.random.default_rng(0)
  values = rng.random((3, 3))
  whole, holed = table(values), values.copy()
  holed[0, 0] = NAN
  plans = [list(map(int, rng.integers(0, 3, 3))) for _ in range(40)]
  losses = [whole.predict(p) + 0.1 * rng.normal() for p in plans]
  joint = [[v, 0.0] for v in losses]
  joint[5] = ['nan', 'nan']

  def truth(kept):
    return {
      'objective': 'loss',
      'plans': {'all': [plans[i] for i in kept]},
      'joint': {'all': {'loss': [joint[i] for i in kept]}},
    }

  usable = [i for i, p in enumerate(plans) if p[0] != 0 and i != 5]
  [found] = sensitivity._explained({'loss': table(holed)}, truth(range(40)))
  [want] = sensitivity._explained({'loss': whole}, truth(usable))
  assert found == want
  assert found['n'] == len(usable) < 39
  assert all(math.isfinite(v) for k, v in found.items() if k.startswith('R2'))


def test_entries_that_failed_are_left_out_when_read_again():
  values = np.arange(9.0).reshape(3, 3)
  alone = [[v, 0.0] for v in values.ravel()]
  alone[4] = ['nan', 'nan']
  rows = sensitivity._correlations({'loss': table(values)}, {'alone': alone})
  assert (rows[0]['options'], rows[0]['n']) == ('all', 8)
  assert rows[0]['spearman'] == pytest.approx(1)


def test_a_gain_is_the_difference_on_the_same_plans():
  rng = np.random.default_rng(1)
  q = 0.2 * rng.normal(size=(9, 9))
  whole = table(rng.random((3, 3)), q + q.T)
  plans = [list(map(int, rng.integers(0, 3, 3))) for _ in range(30)]
  truth = {
    'objective': 'loss',
    'plans': {'all': plans},
    'joint': {'all': {'loss': [[whole.predict(p), 0.0] for p in plans]}},
  }
  plain, own = sensitivity._explained({'loss': whole}, truth)
  assert own['R2'] == pytest.approx(1)
  assert own['R2 gain'] == pytest.approx(1 - plain['R2'])
  assert 0 < own['R2 gain low'] <= own['R2 gain'] <= own['R2 gain high']


def test_a_plan_without_numbers_failed_and_ends_nothing(monkeypatch):
  def assess(*args):
    raise quality.NonFiniteError('NaN or infinite outputs of the model')

  monkeypatch.setattr(quality, 'assess', assess)
  monkeypatch.setattr('experiments.spaces.judged_on', lambda *a: [])
  work = types.SimpleNamespace(apply=None, params=None, metric=None)
  assert allocated._judged(None, work, None, None) == {'failed': 1}


def test_what_a_bisection_measured_outlives_a_kill(tmp_path):
  calls = []

  def measure(choice):
    calls.append(choice)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return NAN if choice == (0, 0) else sum(choice)

  def begun():
    return runtime.Workdir(tmp_path / 'run', {}, seed=0)

  choices = [(2, 2), (0, 0), (1, 1)]
  with begun() as folder:
    kept = bisected._kept(folder, 'kl', measure)
    kept(choices[0])
    kept(choices[1])
    with pytest.raises(KeyboardInterrupt):
      kept(choices[2])
  with begun() as folder:
    again = bisected._kept(folder, 'kl', measure)
    found = [again(c) for c in choices]
    other = bisected._kept(folder, 'trace', measure)
    other((2, 2))
  assert calls == [*choices, (1, 1), (2, 2)]
  np.testing.assert_array_equal(found, [4, NAN, 2])


@pytest.mark.parametrize('before', [-0.1, 0.0, NAN])
def test_a_share_is_of_a_quality(before):
  value = types.SimpleNamespace
  found = {
    'quality': {'spearman': value(value=-0.5)},
    'reference': {'spearman': value(value=before)},
  }
  with pytest.raises(variants.ConfigError, match='expected a positive one'):
    bisected._share(found, 'spearman')
