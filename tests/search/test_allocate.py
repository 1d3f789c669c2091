"""Allocation: brute force decides what is right."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tables import table_of

import quantlab as ql
from configs.search import hawq_v3
from experiments import spaces
from quantlab import search
from quantlab.search import Row, Table, knapsack


def brute(table, budgets):
  """The least value of all choices within the budgets, or None."""
  best = None
  for choice in itertools.product(*(range(len(r.options)) for r in table.rows)):
    if all(table.cost(choice, n) <= b for n, b in budgets.items()):
      value = table.predict(choice)
      best = value if best is None or value < best else best
  return best


def draw(seed, interactions=False):
  rng = np.random.default_rng(seed)
  rows = rng.integers(2, 6)
  sizes = rng.integers(1, 5, rows)
  whole = bool(rng.integers(2))  # integers make ties of value and of cost

  def column(n):
    x = rng.normal(size=n) if not whole else rng.integers(-3, 4, n)
    return x.astype(float)

  values = [column(n) for n in sizes]
  costs = {
    'bytes': [rng.integers(1, 9, n) for n in sizes],
    'bops': [rng.random(n) for n in sizes],
  }
  q = None
  if interactions:
    n = sizes.sum()
    q = rng.normal(size=(n, n)) * 0.5
    q = q + q.T
    start = np.cumsum([0, *sizes])
    for a, b in itertools.pairwise(start):
      q[a:b, a:b] = 0
  table = table_of(values, costs, interactions=q, fixed={'bytes': 2.0})
  low = {
    n: table.fixed.get(n, 0) + sum(map(np.min, c)) for n, c in costs.items()
  }
  high = {
    n: table.fixed.get(n, 0) + sum(map(np.max, c)) for n, c in costs.items()
  }
  at = {n: low[n] + rng.random() * (high[n] - low[n]) for n in costs}
  return table, at


@pytest.mark.parametrize('seed', range(20))
def test_dp_milp_and_brute_force_agree(seed):
  for k in range(10):
    table, at = draw(10 * seed + k)
    rng = np.random.default_rng(k)
    name = ['bytes', 'bops'][k % 2]
    want = brute(table, {name: at[name]})
    for method in ('dp', 'milp'):
      found = ql.allocate(table, {name: at[name]}, method)
      assert found.value == pytest.approx(want, abs=1e-9)
      assert found.costs[name] <= at[name] + 1e-9
    for method in ('greedy', 'random'):
      found = ql.allocate(table, {name: at[name]}, method, seed=k)
      assert found.value >= want - 1e-9
      assert found.costs[name] <= at[name] + 1e-9
    both = brute(table, at)
    if both is None:
      with pytest.raises(ValueError, match='no choice meets all'):
        ql.allocate(table, at)
    else:
      found = ql.allocate(table, at)
      assert found.method == 'milp'
      assert found.value == pytest.approx(both, abs=1e-9)
    tie_ties(table, at, name, rng)


def tie_ties(table, at, name, rng):
  """Tied rows take one option: brute force over the tied choices only."""
  sizes = [len(r.options) for r in table.rows]
  pairs = [
    (i, j)
    for i, j in itertools.combinations(range(len(sizes)), 2)
    if sizes[i] == sizes[j]
  ]
  if not pairs:
    return
  i, j = pairs[rng.integers(len(pairs))]
  best = None
  for choice in itertools.product(*map(range, sizes)):
    if choice[i] == choice[j] and table.cost(choice, name) <= at[name]:
      value = table.predict(choice)
      best = value if best is None or value < best else best
  ties = [(f'r{i}', f'r{j}')]
  if best is None:
    with pytest.raises(ValueError, match='smallest reachable cost'):
      ql.allocate(table, {name: at[name]}, ties=ties)
    return
  for method in ('dp', 'milp'):
    found = ql.allocate(table, {name: at[name]}, method, ties=ties)
    assert found.value == pytest.approx(best, abs=1e-9)


def test_quadratic_finds_the_optimum_of_small_problems():
  exact = 0
  for seed in range(60):
    table, at = draw(seed, interactions=True)
    want = brute(table, {'bytes': at['bytes']})
    found = ql.allocate(table, at['bytes'], 'quadratic')
    assert found.value >= want - 1e-9
    assert found.costs['bytes'] <= at['bytes'] + 1e-9
    exact += found.value < want + 1e-9
  assert exact >= 57


def test_ties_keep_the_prediction():
  table, _ = draw(4, interactions=True)
  same = table_of(
    [table.values[0][:1].repeat(2)] * 3,
    {'bytes': [np.array([1, 2])] * 3},
    interactions=np.kron(1 - np.eye(3), [[1.0, 0.2], [0.2, 3.0]]),
  )
  tied = same.tied([('r0', 'r2')])
  for a, b in itertools.product(range(2), repeat=2):
    assert tied.predict((a, b)) == pytest.approx(same.predict((a, b, a)))
    assert tied.cost((a, b)) == same.cost((a, b, a))


def test_the_front_holds_the_optimum_of_every_budget():
  table, _ = draw(11)
  front = search.pareto(table)
  assert front.exact
  for point in range(len(front)):
    choice = front.choice(point)
    assert table.cost(choice) == front.cost[point]
    assert table.predict(choice) == pytest.approx(front.value[point])
  for budget in np.arange(front.cost[0], front.cost[-1] + 1):
    value = table.predict(front.within(budget))
    assert value == pytest.approx(brute(table, {'bytes': budget}))


def test_a_thinned_front_stays_feasible_and_close():
  rng = np.random.default_rng(0)
  costs = [np.sort(rng.random(5)) for _ in range(12)]
  values = [-np.sqrt(c) * rng.random() for c in costs]
  whole = knapsack.front(tuple(values), tuple(costs))
  few = knapsack.front(tuple(values), tuple(costs), limit=200)
  assert whole.exact
  assert not few.exact
  assert len(few) <= 200
  span = whole.value[0] - whole.value[-1]
  for budget in np.linspace(whole.cost[0], whole.cost[-1], 20):
    best, choice = whole.within(budget), few.within(budget)
    cost = sum(c[k] for c, k in zip(costs, choice, strict=True))
    assert cost <= budget + 1e-12
    lost = sum(
      v[a] - v[b] for v, a, b in zip(values, choice, best, strict=True)
    )
    assert -1e-12 <= lost < 0.05 * span


def test_hawq_v3_reaches_the_published_optimum():
  """arXiv 2011.10680; the constants of its notebook, ties included."""
  table = spaces.from_config(hawq_v3.get_config())
  budgets = dict(hawq_v3.get_config().budgets)
  want = {'size': -1.2332, 'bops': -1.0920, 'latency': -1.1050}
  strings = {
    'size': '8888888888888884844',
    'bops': '8884888848884444444',
    'latency': '8888848848884484844',
  }
  ties = hawq_v3.get_config().ties
  for name, objective in want.items():
    for method in ('dp', 'milp'):
      found = ql.allocate(table, {name: budgets[name]}, method, ties=ties)
      assert found.value == pytest.approx(objective, abs=6e-5)
      assert found.costs[name] <= budgets[name]
    chosen = {
      row.strip(): bits
      for rows, bits in found.options.items()
      for row in rows.split('+')
    }
    in_order = ''.join(chosen[r.name] for r in table.rows)
    assert in_order == strings[name]
  together = ql.allocate(table, budgets, ties=ties)
  assert all(together.costs[n] <= budgets[n] for n in budgets)
  assert together.value >= max(want.values()) - 6e-5


def test_json_holds_everything():
  table, at = draw(5, interactions=True)
  values = (table.values[0].copy(), *table.values[1:])
  table = table_of(
    values,
    {k: list(c) for k, c in table.costs.items()},
    interactions=table.interactions,
    model='abc',
  )
  found = ql.allocate(table, at['bytes'], 'quadratic')
  again = type(found).from_json(json.loads(json.dumps(found.to_json())))
  assert again.choice == found.choice
  assert again.value == found.value
  assert again.costs == found.costs
  assert again.table.to_json() == table.to_json()
  with pytest.raises(ValueError, match=r"another model: .* 'abc'"):
    again.table.check_model('def')


def test_what_cannot_be_is_said():
  table, _ = draw(2)
  least = sum(c.min() for c in table.costs['bytes']) + 2
  with pytest.raises(
    ValueError, match=f'smallest reachable cost is {least:g} '
  ):
    ql.allocate(table, least - 1)
  assert ql.allocate(table, least).costs['bytes'] == least
  with pytest.raises(ValueError, match=r"unknown cost 'size'; known: \['bops"):
    ql.allocate(table, {'size': 3})
  with pytest.raises(ValueError, match="unknown method 'ilp'"):
    ql.allocate(table, 50, 'ilp')
  with pytest.raises(ValueError, match='needs a budget'):
    ql.allocate(table, {})
  with pytest.raises(ValueError, match='takes one budget'):
    ql.allocate(table, {'bytes': 90, 'bops': 90}, 'dp')
  with pytest.raises(ValueError, match='needs interactions'):
    ql.allocate(table, 50, 'quadratic')
  with pytest.raises(ValueError, match=r"unknown rows \['nothing'\]"):
    ql.allocate(table, 50, ties=[('r0', 'nothing')])
  two = table_of([[1, 2], [1, 2, 3]], {'bytes': [[1, 2], [1, 2, 3]]})
  with pytest.raises(ValueError, match='tied rows need the same options'):
    ql.allocate(two, 50, ties=[('r0', 'r1')])
  with pytest.raises(ValueError, match='of no program'):
    _ = ql.allocate(two, 50).recipe
  with pytest.raises(ValueError, match='at least one row'):
    table_of([], {})
  with pytest.raises(ValueError, match='no options'):
    Row('r', ())
  with pytest.raises(ValueError, match='one number for each option'):
    table_of([[1, 2]], {'bytes': [[1, 2, 3]]})


def test_a_budget_is_any_number_and_nothing_else():
  table, at = draw(2)
  limit = int(at['bytes'])
  found = ql.allocate(table, limit)
  for same in (np.int64(limit), np.float32(limit), jnp.asarray(limit)):
    again = ql.allocate(table, same)
    assert again.choice == found.choice
    assert json.dumps(again.to_json()['budgets']) == f'{{"bytes": {limit}.0}}'
  for wrong in (True, 'much', None, [limit], float('nan'), np.ones(2)):
    with pytest.raises(ValueError, match="budget of 'bytes' is a number"):
      ql.allocate(table, wrong)


def test_interactions_are_never_ignored_unsaid():
  table, at = draw(5, interactions=True)
  limit = at['bytes']
  found = ql.allocate(table, limit)
  assert found.method == 'quadratic'
  assert found.value <= ql.allocate(table, limit, 'random').value
  plain = search.additive(table)
  for method in ('dp', 'milp', 'greedy'):
    with pytest.raises(ValueError, match=f"'{method}' minimizes a sum"):
      ql.allocate(table, limit, method)
    ql.allocate(plain, limit, method)
  with pytest.raises(ValueError, match='pareto minimizes a sum'):
    search.pareto(table)
  assert len(search.pareto(plain)) > 1


def test_an_integer_program_is_solved_to_the_end():
  """HiGHS stops within 1e-6 of the optimum, however small values are."""
  for seed in range(20):
    rng = np.random.default_rng(seed)
    rows = rng.integers(10, 30)
    sizes = 10 ** rng.uniform(-8, 0, (rows, 1))
    values = sizes * [1, 0.25, 0.06, 0.01] * rng.uniform(0.7, 1.3, (rows, 4))
    costs = rng.integers(100, 10000, (rows, 1)) * np.array([2, 3, 4, 8])
    table = table_of(values, {'bytes': costs})
    limit = costs[:, 0].sum() * rng.uniform(1.1, 3.5)
    dp, milp = (ql.allocate(table, limit, m) for m in ('dp', 'milp'))
    assert milp.costs['bytes'] <= limit
    assert milp.value == pytest.approx(dp.value, rel=1e-9, abs=0)


def test_an_integer_program_stays_within_its_budget():
  """Where the budget is one byte less than a choice of a large model costs."""
  for seed in range(5):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10**7, 10**8, (12, 1))
    costs = np.floor(sizes * np.array([2, 3, 4, 8]) / 8)
    values = rng.random((12, 1)) * np.array([1, 0.25, 0.06, 0.0])
    table = table_of(values, {'bytes': costs, 'more': costs})
    free = ql.allocate(table, costs[:, 1].sum() * 1.5, 'dp')
    limit = free.costs['bytes'] - 1
    found = ql.allocate(table, {'bytes': limit, 'more': limit})
    assert found.method == 'milp'
    assert found.costs['bytes'] <= limit
    exact = ql.allocate(table, limit, 'dp')
    assert found.value == pytest.approx(exact.value, rel=1e-9)


def test_a_choice_is_an_option_of_each_row():
  table, _ = draw(2)
  rows = len(table.rows)
  for wrong in ((-1,), (99,), (0.5,), ('a',), (None,), (True,)):
    with pytest.raises(ValueError, match="row 'r0' has the options"):
      search.Allocation(table, wrong + (0,) * (rows - 1), 'mine', {})
  for wrong in ((0,), 3, None):
    with pytest.raises(ValueError, match='one option for each of'):
      search.Allocation(table, wrong, 'mine', {})
  numpy = search.Allocation(table, np.zeros(rows, int), 'mine', {})
  plain = search.Allocation(table, (0,) * rows, 'mine', {})
  assert json.dumps(numpy.to_json()) == json.dumps(plain.to_json())


def test_what_is_no_table_is_refused():
  table, _ = draw(2)
  for use in (lambda t: ql.allocate(t, 50), search.pareto):
    with pytest.raises(TypeError, match=r"those of \['kl'\]: pass one"):
      use({'kl': table})
    with pytest.raises(TypeError, match=r'takes a search\.Table, got 3'):
      use(3)
  for ties in (['r0'], [()]):
    with pytest.raises(ValueError, match='a tie is a list of names of rows'):
      ql.allocate(table, 50, ties=ties)
  with pytest.raises(ValueError, match='is not a regular expression'):
    table.select('(')
  with pytest.raises(ValueError, match="unknown cost 'latency'"):
    search.bisect(table, sum, 0, cost='latency')

  def read(change):
    data = json.loads(json.dumps(table.to_json()))
    change(data)
    return Table.from_json(data)

  read(lambda d: None)
  for match, change in (
    ("it has no 'values'", lambda d: d.pop('values')),
    ('two rows of one name', lambda d: d['rows'][1].update(name='r0')),
    ('two rows of one site', _same_site),
    (
      'negative or not finite',
      lambda d: d['costs']['bytes'][0].__setitem__(0, -1),
    ),
    ('found inf', lambda d: d['values'][0].__setitem__(0, -np.inf)),
    ('this is no table', lambda d: d.update(rows=3)),
    ('none of the costs', lambda d: d['fixed'].update(much=1.0)),
    ('from 0 on', lambda d: d['fixed'].update(bytes=-1.0)),
    ('from 0 on', lambda d: d['fixed'].update(bytes=np.nan)),
    ('NaN or infinity', lambda d: d.update(interactions=[[np.nan]])),
    ('not negative', lambda d: d['stderr'][0].__setitem__(0, -1.0)),
    ('expected a list', lambda d: d['rows'][0].update(options='abc')),
    ('have names', lambda d: d['rows'][0].update(name=3)),
    ('could not convert', lambda d: d['values'][0].__setitem__(0, 'much')),
    ('one number for each option', lambda d: d['stderr'].pop()),
  ):
    with pytest.raises(ValueError, match=match):
      read(change)
  for data in ({}, [], {'table': 3, 'choice': [], 'method': '', 'budgets': {}}):
    with pytest.raises(ValueError, match='this is no'):
      search.Allocation.from_json(data)


def _same_site(data):
  for row in data['rows'][:2]:
    row['sites'] = ['a']


def test_what_failed_is_never_chosen():
  table = table_of(
    [[np.nan, 1.0], [0.0, np.nan], [2.0, 1.0]], {'bytes': [[1, 2]] * 3}
  )
  for method in ('dp', 'milp', 'greedy', 'random'):
    assert ql.allocate(table, 6, method).choice[:2] == (1, 0)
  failed = table_of([[np.nan, np.nan]], {'bytes': [[1, 2]]})
  with pytest.raises(ValueError, match="every option of row 'r0' failed"):
    ql.allocate(failed, 6)
  with pytest.raises(ValueError, match="every option of row 'r0' failed"):
    search.pareto(failed)


def test_noise_below_zero_is_floored():
  table = table_of([[0.5, -0.2, 0.1]], {'bytes': [[1, 2, 3]]})
  table = Table(
    table.rows, table.values, (np.array([0.1, 0.1, 0.1]),), table.costs, '', ''
  )
  np.testing.assert_array_equal(table.floored().values[0], [0.5, 0, 0.1])
  np.testing.assert_array_equal(table.floored(3).values[0], [0.5, 0, 0])


def test_groups_of_two_metrics_share_a_budget():
  """MixDQ: whatever the units of the groups, the division is by measurement."""
  rng = np.random.default_rng(0)
  costs = {'bytes': [[2, 3, 4, 8]] * 5}
  start = [(2,) * 2, (2,) * 3]

  def groups(values, units):
    scaled = [v * units[i > 1] for i, v in enumerate(values)]
    table = table_of(scaled, costs)
    return [table.select('r[01]'), table.select('r[234]')]

  for _ in range(5):
    values = [-np.sort(-rng.random(4)) for _ in range(5)]
    true, seen = table_of(values, costs), set()

    def measure(choice, seen=seen, true=true):
      seen.add(choice)
      return true.predict(choice)

    found = search.decoupled(
      groups(values, (1, 1)), start, measure, ratios=(0.5, 0.75, 1, 1.25)
    )
    assert found.costs['bytes'] <= 20
    assert [r.name for r in found.table.rows] == [r.name for r in true.rows]
    assert len(seen) > 1
    assert true.predict(found.choice) == min(map(true.predict, seen))
    assert true.predict(found.choice) <= true.predict((2,) * 5)
    # Other units change nothing.
    again = search.decoupled(
      groups(values, (7, 0.1)), start, measure, ratios=(0.5, 0.75, 1, 1.25)
    )
    assert again.choice == found.choice


def test_what_is_not_decided_is_no_part_of_a_divided_budget():
  values, costs = [[3, 1], [3, 1]], {'bytes': [[2, 8]] * 2}
  whole = table_of(values, costs)
  groups = [
    dataclasses.replace(whole.select(r), fixed={'bytes': 6.0})
    for r in ('r0', 'r1')
  ]
  for start in ([(0,), (0,)], [(1,), (0,)]):
    limit = sum(whole.costs['bytes'][i][s[0]] for i, s in enumerate(start))
    found = search.decoupled(groups, start, whole.predict)
    assert found.costs['bytes'] <= found.budgets['bytes'] == limit
  with pytest.raises(ValueError, match="row 'r1' has the options"):
    search.decoupled(groups, [(0,), (-1,)], whole.predict)
  with pytest.raises(ValueError, match='a ratio is a number'):
    search.decoupled(groups, start, whole.predict, ratios=[float('nan')])
  joint = dataclasses.replace(groups[0], interactions=np.zeros((2, 2)))
  with pytest.raises(ValueError, match='decoupled minimizes a sum'):
    search.decoupled([joint, groups[1]], start, whole.predict)


def test_groups_that_cannot_share_are_refused():
  whole = table_of([[1, 0]] * 3, {'bytes': [[1, 2]] * 3})
  groups = [whole.select('r0'), whole.select('r[12]')]
  start = [(1,), (1, 1)]
  with pytest.raises(ValueError, match='between two groups, got 1'):
    search.decoupled(groups[:1], start[:1], sum)
  with pytest.raises(ValueError, match=r"rows in common: \['r0'\]"):
    search.decoupled([groups[0], whole], start, sum)
  for failed in (float('nan'), float('-inf')):
    with pytest.raises(ValueError, match='choices measured as a number'):
      search.decoupled(groups, start, lambda c, failed=failed: failed)
  named = [
    dataclasses.replace(t, layers={n: (f'{n}[0]',)})
    for t, n in zip(groups, 'ab', strict=True)
  ]
  assert [*search.joined(named).layers] == ['a', 'b']
  # Where only one division can be met, it is taken.
  assert search.decoupled(groups, [(0,), (0, 0)], sum).choice == (0, 0, 0)


def test_measurement_decides_between_allocations():
  table, at = draw(5)
  choices = [ql.allocate(table, at['bytes'], m) for m in ('dp', 'random')]
  true = table_of(
    [np.random.default_rng(9).random(len(v)) for v in table.values],
    {'bytes': list(table.costs['bytes'])},
  )
  calls = []

  def measure(choice):
    calls.append(choice)
    return true.predict(choice)

  best = search.measured([*choices, choices[0]], measure)
  assert best in choices
  assert len(calls) == len(set(calls)) == len({c.choice for c in choices})
  assert true.predict(best.choice) == min(map(true.predict, calls))
  # What failed is not chosen, and nothing at all is an error.
  first = choices[0].choice
  again = search.measured(choices, lambda c: np.nan if c == first else 1.0)
  assert again.choice == choices[1].choice
  with pytest.raises(ValueError, match='none of 2 choices measured'):
    search.measured(choices, lambda c: np.inf)
  with pytest.raises(ValueError, match='at least one allocation'):
    search.measured([], measure)
  other = search.Allocation(
    table.select('r0'), choices[0].choice[:1], 'mine', {}
  )
  renamed = search.Allocation(
    dataclasses.replace(table, model='another'), first, 'mine', {}
  )
  for wrong in (other, renamed):
    with pytest.raises(ValueError, match='of other rows, options or models'):
      search.measured([choices[0], wrong], measure)
  with pytest.raises(TypeError, match='takes allocations'):
    search.measured([table], measure)
