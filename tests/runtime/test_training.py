"""The loop: the same curve after a stop, a clear end where it diverges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quantlab import data, runtime
from quantlab.runtime import saves as saves_lib
from quantlab.runtime import training

RNG = np.random.RandomState(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5, 3.0], np.float32)) + 0.1
OPTIMIZER = optax.adam(0.05)
STEPS = 30


def loss(variables, step, x, y):
  """Least squares; a running mean of y beside it, by settlement."""
  del step
  error = x @ variables['w'] + variables['b'] - y
  seen = {**variables, 'mean': 0.9 * variables['mean'] + 0.1 * y.mean()}
  mask = {'w': False, 'b': False, 'mean': True}
  return jnp.square(error).mean(), (mask, seen)


@pytest.fixture(scope='module')
def update():
  return training.compiled(training.updater(loss, OPTIMIZER))


def start():
  zeros = {'w': jnp.zeros(4), 'b': jnp.zeros(()), 'mean': jnp.zeros(())}
  return training.begin(zeros, OPTIMIZER)


def check(state):
  w = state['variables']['w']
  return {'distance': jnp.abs(w - jnp.array([1.0, -2.0, 0.5, 3.0])).max()}


def walk(x=X, y=Y, seed=0, steps=STEPS):
  return data.iterator(data.Draws((x, y), 8, steps=steps, seed=seed))


def fit(folder, update, walks, identity=None, state=None, **options):
  options = {
    'check': check,
    'score': lambda found: -found['distance'],
    'check_every': 10,
    'log_every': 3,
  } | options
  with saves_lib.Saves(folder, identity or {'recipe': 'a'}) as saves:
    return training.train(
      update, state or start(), walks, STEPS, saves, **options
    )


class StoppedError(Exception):
  pass


def stopping(at):
  def log(step, values):
    if step >= at and 'loss' in values:
      raise StoppedError

  return log


def test_after_a_stop_all_is_as_without(tmp_path, update):
  state, curves = fit(tmp_path / 'whole', update, [walk()])
  due = {*range(3, 31, 3), 10, 20}
  assert [s for s, _ in curves['loss']] == sorted(due)
  assert [s for s, _ in curves['distance']] == [0, 10, 20, 30]
  assert curves['loss'][-1][1] < 0.5 * curves['loss'][0][1]
  for at in (4, 17, 29):  # the last one twice
    with pytest.raises(StoppedError):
      fit(tmp_path / 'killed', update, [walk()], log=stopping(at))
  again, resumed = fit(tmp_path / 'killed', update, [walk()])
  assert resumed == curves
  jax.tree.map(np.testing.assert_array_equal, again, state)
  # And after the end there is nothing left to do.
  done, same = fit(tmp_path / 'killed', update, [walk()])
  assert same == curves
  jax.tree.map(np.testing.assert_array_equal, done, state)


def test_running_values_are_settled_and_not_optimized(tmp_path, update):
  state, _ = fit(tmp_path, update, [walk()])
  expected = np.float32(0)
  for batch in data.Draws((X, Y), 8, steps=STEPS, seed=0):
    expected = 0.9 * expected + 0.1 * batch[1].mean()
  np.testing.assert_allclose(state['variables']['mean'], expected, rtol=1e-5)


def test_seeds_trained_as_one_are_those_trained_alone(tmp_path, update):
  alone = [
    fit(tmp_path / str(s), update, [walk(seed=s)], state=start())[0]
    for s in (0, 1)
  ]
  both, _ = fit(
    tmp_path / 'both',
    training.compiled(training.updater(loss, OPTIMIZER), runs=2),
    [walk(seed=s) for s in (0, 1)],
    state=jax.tree.map(lambda *xs: jnp.stack(xs), start(), start()),
    score=lambda found: 0.0,
  )
  for i, one in enumerate(alone):
    np.testing.assert_allclose(
      both['variables']['w'][i], one['variables']['w'], rtol=1e-5
    )
  assert (
    jnp.abs(both['variables']['w'][0] - both['variables']['w'][1]).max() > 0
  )


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_it_stops_where_it_diverges_and_keeps_what_was_before(
  tmp_path, update, bad
):
  x = X.copy()
  x[5, 2] = bad
  draws = data.Draws((x, Y), 8, steps=STEPS, seed=0)
  step = next(i for i, b in enumerate(draws) if not np.isfinite(b[0]).all())
  with pytest.raises(runtime.DivergedError, match='not finite') as caught:
    fit(tmp_path, update, [walk(x)], check_every=1)
  assert caught.value.step == step
  with saves_lib.Saves(tmp_path, {'recipe': 'a'}) as saves:
    assert saves.last == step  # before that update
    state, _ = saves.restore(start())
  assert all(np.isfinite(v).all() for v in jax.tree.leaves(state))


def test_nothing_moves_after_a_failure(update):
  """So that what failed can be looked at later."""
  state, _ = update(start(), X[:8], Y[:8])
  kept = jax.tree.map(np.asarray, state)
  x = X[:8].copy()
  x[0, 0] = np.inf
  state, _ = update(state, x, Y[:8])
  state, _ = update(state, X[8:16], Y[8:16])  # a good batch
  assert state['failed']
  jax.tree.map(
    np.testing.assert_array_equal,
    {k: v for k, v in state.items() if k != 'failed'},
    {k: v for k, v in kept.items() if k != 'failed'},
  )


def test_an_infinite_gradient_of_a_finite_loss_is_a_failure():
  def root(variables, step, x):
    return jnp.sqrt(jnp.abs(variables['w'])).sum() + 0 * x.sum(), None

  update = training.compiled(training.updater(root, OPTIMIZER))
  state, value = update(training.begin({'w': jnp.zeros(3)}, OPTIMIZER), X)
  assert np.isfinite(value)
  assert state['failed']


def test_the_best_and_the_last_are_kept(tmp_path, update):
  scores = iter([0.0, 3.0, 1.0, 2.0])
  fit(tmp_path, update, [walk()], score=lambda found: next(scores))
  with saves_lib.Saves(tmp_path, {'recipe': 'a'}) as saves:
    assert (saves.best, saves.last) == (10, 30)
    best, notes = saves.restore(start(), saves.best)
  assert notes['step'] == int(best['step']) == 10
  assert len(list((tmp_path / 'steps').iterdir())) == 2


def test_a_batch_of_another_shape_is_refused(tmp_path, update):
  class Walk:
    def __init__(self):
      self.i = 0

    def __next__(self):
      self.i += 1
      return (X[:8], Y[:8]) if self.i < 4 else (X[:5], Y[:5])

    def get_state(self):
      return {'i': self.i}

  words = r'batch 3 .*\(5, 4\), \(5,\).*\(8, 4\), \(8,\)'
  with pytest.raises(ValueError, match=words):
    fit(tmp_path, update, [Walk()])


def test_saves_of_another_recipe_are_refused_with_the_differences(
  tmp_path, update
):
  mine = {'recipe': {'w': 'int4'}, 'model': {'dim': 8}}
  with saves_lib.Saves(tmp_path, mine):
    pass
  with pytest.raises(runtime.CheckpointError) as caught:
    saves_lib.Saves(tmp_path, {'recipe': {'w': 'int2'}, 'model': {'dim': 8}})
  assert 'recipe.w: "int4" there, "int2" here' in str(caught.value)
  assert 'dim' not in str(caught.value)


def test_saves_of_another_structure_are_refused(tmp_path, update):
  fit(tmp_path, update, [walk()])
  other = training.begin({'v': jnp.zeros(9)}, OPTIMIZER)
  with (
    saves_lib.Saves(tmp_path, {'recipe': 'a'}) as saves,
    pytest.raises(runtime.CheckpointError, match='step 30'),
  ):
    saves.restore(other)


def test_over_a_mesh_it_is_the_same(tmp_path, update):
  mesh = runtime.make_mesh(data=-1)
  meshed = training.compiled(training.updater(loss, OPTIMIZER), mesh)
  state, curves = fit(
    tmp_path / 'mesh',
    meshed,
    [walk()],
    state=training.placed(start(), mesh),
    place=lambda batch: training.spread(batch, mesh),
  )
  w = state['variables']['w']
  assert len(w.sharding.device_set) == jax.device_count() == 8
  alone, expected = fit(tmp_path / 'alone', update, [walk()])
  np.testing.assert_allclose(w, alone['variables']['w'], rtol=1e-5)
  np.testing.assert_allclose(curves['loss'], expected['loss'], rtol=1e-5)
