"""Arguments of a wrong kind are named, with what was expected."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab import quality, search
from quantlab.search.table import Row, Table

TABLE = Table(
  rows=tuple(Row(name, ('a', 'b')) for name in ('r0', 'r1', 'r2')),
  values=tuple(np.array([1.0, 0.0]) for _ in range(3)),
  stderr=tuple(np.zeros(2) for _ in range(3)),
  costs={'bytes': tuple(np.array([1.0, 2.0]) for _ in range(3))},
  metric='kl',
  unit='nats',
)
GROUPS = [TABLE.select('r0'), TABLE.select('r[12]')]
START = [(1,), (1, 1)]


@pytest.mark.parametrize('seed', [-1, 1.5, 'x', None, True, 2**31])
def test_seeds(seed):
  with pytest.raises(ValueError, match=r'seed=.*: expected a whole number'):
    ql.allocate(TABLE, 5, 'random', seed=seed)


@pytest.mark.parametrize('ties', [None, 3, 'r0', ['r0']])
def test_ties(ties):
  with pytest.raises(ValueError, match='names of rows, got'):
    ql.allocate(TABLE, 5, ties=ties)


@pytest.mark.parametrize('target', [None, 'high', math.nan, [1.0], True])
def test_targets_of_a_bisection(target):
  with pytest.raises(ValueError, match='the target is a number, got'):
    search.bisect(TABLE, sum, target)


def test_a_target_is_any_number():
  for target in (1, np.float32(1), jnp.ones(())):
    assert search.bisect(TABLE, sum, target).quality == 1


def test_allocations():
  with pytest.raises(TypeError, match=r'takes a search.Table, got None'):
    search.Allocation(None, (0, 0, 0), 'mine', {})
  with pytest.raises(TypeError, match='budgets are limits by name, got None'):
    search.Allocation(TABLE, (0, 0, 0), 'mine', None)
  data = ql.allocate(TABLE, 5).to_json()
  for name in ('table', 'choice', 'budgets'):
    with pytest.raises(ValueError, match=r'no allocation|no table'):
      search.Allocation.from_json({**data, name: None})


def test_a_budget_without_end_is_kept():
  found = ql.allocate(TABLE, math.inf)
  text = json.dumps(found.to_json(), allow_nan=False)
  again = search.Allocation.from_json(json.loads(text))
  assert again.budgets == {'bytes': math.inf}
  assert again.choice == found.choice == (1, 1, 1)


@pytest.mark.parametrize('groups', [None, 3, {'kl': TABLE}, GROUPS[:1]])
def test_groups(groups):
  with pytest.raises(ValueError, match='between two groups, got'):
    search.decoupled(groups, START, sum)


def test_what_is_divided_between_groups():
  first, second = GROUPS
  with pytest.raises(TypeError, match=r'takes a search.Table, got 3'):
    search.decoupled([first, 3], START, sum)
  costly = Table(
    **{
      **second.__dict__,
      'costs': {**second.costs, 'bops': second.costs['bytes']},
    }
  )
  with pytest.raises(ValueError, match=r"lacks costs of the first: \['bops'\]"):
    search.decoupled([costly, first], START[::-1], sum)
  with pytest.raises(ValueError, match="unknown cost 'size'"):
    search.decoupled(GROUPS, START, sum, cost='size')
  for start in (None, 3, START[:1]):
    with pytest.raises(ValueError, match='a start for each group, got'):
      search.decoupled(GROUPS, start, sum)
  with pytest.raises(ValueError, match=r'several numbers, got 0.5'):
    search.decoupled(GROUPS, START, sum, ratios=0.5)
  for ratio in (None, 'x', math.nan):
    with pytest.raises(ValueError, match='a ratio is a number, got'):
      search.decoupled(GROUPS, START, sum, ratios=[1.0, ratio])
  for ratio in (0, -1.0, math.inf):
    with pytest.raises(ValueError, match='ratios are positive'):
      search.decoupled(GROUPS, START, sum, ratios=[1.0, ratio])


def test_what_is_known_of_a_study(tmp_path):
  with pytest.raises(TypeError, match='a function of a choice for each name'):
    search.Study(TABLE, tmp_path / 'journal.log', known={'loss': 3})
  assert not list(tmp_path.iterdir())


LOGITS, LABELS = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize('dtype', [bool, np.int32, np.uint8])
def test_masks_are_booleans_or_integers(dtype):
  mask = jnp.asarray([[1, 1, 0], [1, 0, 0]], dtype)
  stats = quality.language_model.update(LOGITS, LABELS, mask)
  assert stats['count'].tolist() == [2, 1]


def test_other_masks_are_refused():
  for use in (
    quality.language_model.update,
    quality.language_model.counts,
    lambda *a: quality.language_model.contrast(LOGITS, *a),
  ):
    with pytest.raises(TypeError, match='booleans or integers; got float32'):
      use(LOGITS, LABELS, jnp.full((2, 3), jnp.nan))
    with pytest.raises(ValueError, match='shape of the labels'):
      use(LOGITS, LABELS, jnp.ones((2,), bool))


def test_a_table_says_what_it_holds():
  whole = dataclasses.replace(
    TABLE, fixed={'bytes': 7.0}, interactions=np.zeros((6, 6))
  )
  lines = str(whole).splitlines()
  assert lines[0] == 'kl (nats) of 3 rows'
  assert lines[1] == '  r0: a 1 ± 0, b 0 ± 0'
  assert len(lines) == 6
  assert lines[-2:] == [
    '  with what every two entries do jointly',
    "  not decided, and counted: {'bytes': 7.0}",
  ]


def test_training_takes_a_plan():
  found = ql.allocate(TABLE, 5)
  with pytest.raises(TypeError, match='an allocation, becomes one'):
    ql.qat(lambda p, x: x, found)


@pytest.mark.parametrize('quality', [None, '5', [1.0], np.ones(2)])
def test_the_quality_of_a_choice_is_one_number(quality):
  with pytest.raises(TypeError, match='expected one number, got'):
    search.bisect(TABLE, lambda choice: quality, 0.5)


def test_what_a_bisection_is_given():
  with pytest.raises(TypeError, match='measure is a function of a choice'):
    search.bisect(TABLE, None, 0.5)
  with pytest.raises(ValueError, match=r"unknown cost \['bytes'\]"):
    search.bisect(TABLE, sum, 0.5, cost=['bytes'])
