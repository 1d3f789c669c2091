"""Bisection to a quality: the linear scan decides what is right."""

import numpy as np
import pytest
from tables import table_of

from quantlab import search


def test_bisection_is_the_linear_scan_where_quality_is_monotone():
  rng = np.random.default_rng(3)
  for _ in range(10):
    loss = np.sort(rng.random((9, 3)), axis=1)[:, ::-1]
    table = table_of(list(loss), {'bytes': [np.array([2, 4, 8])] * 9})
    target = -0.5 * loss[:, 0].sum()
    calls = []

    def measure(choice, table=table, calls=calls):
      calls.append(choice)
      return -table.predict(choice)

    found = search.bisect(table, measure, target)
    assert found.quality >= target
    assert found.violations == 0
    assert len(calls) == len(found.measured) <= 12
    order = np.argsort(loss[:, 0])
    count = sum(k == 0 for k in found.choice)
    assert {i for i, k in enumerate(found.choice) if k == 0} == set(
      order[:count]
    )
    more = [2] * 9
    for i in order[: count + 1]:
      more[i] = 0
    if count < 9:
      assert measure(tuple(more)) < target
  with pytest.raises(ValueError, match='out of reach'):
    search.bisect(table, measure, 1.0)


def test_bisection_takes_nan_for_a_failure():
  values = [[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]
  table = table_of(values, {'bytes': [np.array([1, 2])] * 4})

  def measure(choice):  # row 2 overflows where it is lowered
    return float('nan') if choice[2] == 0 else -table.predict(choice)

  found = search.bisect(table, measure, -100)
  assert found.choice == (1, 0, 1, 1)
  assert found.quality == -1
  assert any(np.isnan(q) for _, q in found.measured)
  with pytest.raises(ValueError, match=r'out of reach: .* the quality is nan'):
    search.bisect(table, lambda c: float('nan'), -100)


def test_the_augmented_order_looks_at_interactions():
  values = [[1.0, 0.0], [1.1, 0.0], [1.2, 0.0]]
  q = np.zeros((6, 6))
  q[0, 2] = q[2, 0] = 5.0  # the two least sensitive rows harm each other
  costs = {'bytes': [np.array([1, 2])] * 3}

  def allowed(table):
    full = table_of(values, costs, interactions=q)
    found = search.bisect(table, lambda c: -full.predict(c), -2.5)
    return sum(k == 0 for k in found.choice)

  assert allowed(table_of(values, costs)) == 1
  assert allowed(table_of(values, costs, interactions=q)) >= 1


def test_bisection_starts_at_options_that_did_not_fail():
  nan = np.nan
  table = table_of(
    [[3.0, 2.0, nan], [1.0, nan, 0.0], [nan, 1.0, 0.0]],
    {'bytes': [[1, 2, 3]] * 3},
  )
  found = search.bisect(table, lambda c: sum(c), 0)
  assert found.choice == (0, 0, 1)
  assert all(
    np.isfinite([v[k] for v, k in zip(table.values, c, strict=True)]).all()
    for c, _ in found.measured
  )
  two = table_of([[1.0, 0], [2.0, 1, 0]], {'bytes': [[1, 2], [1, 2, 3]]})
  with pytest.raises(ValueError, match='same number of options'):
    search.bisect(two, sum, 0)
  with pytest.raises(TypeError, match='pass one of them'):
    search.bisect({'kl': table}, sum, 0)
  failed = table_of([[nan, nan]], {'bytes': [[1, 2]]})
  with pytest.raises(ValueError, match="every option of row 'r0' failed"):
    search.bisect(failed, sum, 0)
