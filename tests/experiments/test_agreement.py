"""Whether tables rank plans as measurements do: against SciPy, by hand."""

import types

import numpy as np
import pytest
import scipy.stats
from tables import table_of

from experiments import agreement
from quantlab import search


def table(values, interactions=None):
  return table_of(values, {'bytes': [[2, 4, 8]] * 3}, interactions=interactions)


def searched(tables, choices, losses):
  """A search with one encoder that reads data and two calibration sets."""
  config = types.SimpleNamespace(
    encoders=('gptq',), seeds=2, budgets=('int4',), show=('accuracy', 'kl_mean')
  )
  plain = next(iter(tables.values()))
  found, values = {}, {}
  for i, (choice, loss) in enumerate(zip(choices, losses, strict=True)):
    name = f'{"int4" if i < 5 else "int2"}/plan-{i}'
    found[name] = search.Allocation(plain, choice, 'dp', {})
    for seed, shift in ((0, -0.5), (1, 0.5)):
      values[f'q/{name}/gptq/{seed}/kl_mean'] = loss + shift
      values[f'q/{name}/gptq/{seed}/accuracy'] = -loss
  return agreement.rows(config, tables, found, values)


def test_ranks_are_those_of_scipy_over_plans_that_differ():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(9, 9))
  values = rng.random((3, 3))
  tables = {
    'kl': table(values, q + q.T),
    'kl.gptq': table(rng.random((3, 3))),
    'kl@int4': table(values),
    'kl.awq': table(values),
  }
  choices = [tuple(map(int, rng.integers(0, 3, 3))) for _ in range(12)]
  choices = list(dict.fromkeys(choices))
  losses = rng.random(len(choices))
  # A plan under two names counts once.
  rows = searched(tables, [*choices, choices[0]], [*losses, losses[0]])
  assert {r['loss'] for r in rows} == {'kl_mean'}
  kinds = [
    (r['table'], r['interactions']) for r in rows if r['budget'] == 'all'
  ]
  assert kinds == [('kl', 'none'), ('kl', 'own'), ('kl.gptq', 'none')]
  for row in rows:
    if row['budget'] != 'all':
      assert row['plans'] == 5
      continue
    used = tables[row['table']]
    if row['interactions'] == 'none':
      used = search.additive(used)
    predicted = [used.predict(c) for c in choices]
    want = scipy.stats.spearmanr(predicted, losses).statistic
    assert row['spearman'] == pytest.approx(want)
    assert row['plans'] == len(choices)
    assert row['low'] <= row['spearman'] <= row['high']


def test_a_table_that_is_the_truth_ranks_all():
  values = np.array([[4, 2, 0], [8, 1, 0], [16, 3, 0.5]])
  choices = [(0, 1, 2), (1, 1, 1), (2, 2, 2), (0, 0, 0), (2, 1, 0), (1, 0, 2)]
  losses = [sum(values[i][k] for i, k in enumerate(c)) for c in choices]
  [whole, *_] = rows = searched({'kl': table(values)}, choices, losses)
  assert whole['spearman'] == whole['low'] == whole['high'] == 1
  [shown] = agreement.summary(rows)
  assert shown == {
    'table': 'kl',
    'interactions': 'none',
    'gptq kl_mean': pytest.approx(1),
  }


def test_few_plans_have_no_rank():
  values = np.ones((3, 3))
  assert searched({'kl': table(values)}, [(0, 0, 0), (1, 1, 1)], [1, 0]) == []
