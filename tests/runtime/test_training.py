"""The loop: the same curve after a stop, a clear end where it diverges."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pairs
import pytest
from runtime import fitting
from runtime.fitting import STEPS, X, Y, fit, start, walk

from quantlab import data, runtime
from quantlab.runtime import saves as saves_lib
from quantlab.runtime import training

OPTIMIZER = optax.adam(0.05)
WORKER = pathlib.Path(fitting.__file__)


@pytest.fixture(scope='module')
def update():
  return fitting.updater()


@pytest.fixture(scope='module')
def whole(update, tmp_path_factory):
  """State and curves of a run without a stop."""
  return fit(tmp_path_factory.mktemp('whole'), update, [walk()])


class StoppedError(Exception):
  pass


def stopping(at):
  def log(step, values):
    if step >= at and 'loss' in values:
      raise StoppedError

  return log


def test_after_a_stop_all_is_as_without(tmp_path, update, whole):
  state, curves = whole
  due = {*range(3, 31, 3), 10, 20}
  assert [s for s, _ in curves['loss']] == sorted(due)
  assert [s for s, _ in curves['distance']] == [0, 10, 20, 30]
  assert curves['loss'][-1][1] < 0.5 * curves['loss'][0][1]
  for at in (4, 17, 29):
    with pytest.raises(StoppedError):
      fit(tmp_path, update, [walk()], log=stopping(at))
  again, resumed = fit(tmp_path, update, [walk()])
  assert resumed == curves
  jax.tree.map(np.testing.assert_array_equal, again, state)
  # And after the end there is nothing left to do.
  done, same = fit(tmp_path, update, [walk()])
  assert same == curves
  jax.tree.map(np.testing.assert_array_equal, done, state)


def test_killed_by_the_system_it_goes_on(tmp_path, update, whole):
  command = [sys.executable, WORKER, tmp_path, '0.5']
  with subprocess.Popen(command) as process:
    try:
      deadline = time.time() + 120
      while not (tmp_path / 'steps/10').exists():
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.01)
    finally:
      process.send_signal(signal.SIGKILL)
  assert not (tmp_path / 'steps/30').exists()
  state, curves = fit(tmp_path, update, [walk()])
  assert curves == whole[1]
  jax.tree.map(np.testing.assert_array_equal, state, whole[0])


def test_two_processes_do_what_one_does(tmp_path, whole):
  """Each with two devices; sums have another order."""
  pairs.run(
    lambda port, index, folder: [WORKER, folder, '0', str(port), str(index)],
    tmp_path,
  )
  expected = jax.tree.leaves(whole[0]['variables'])
  for i in range(2):
    with np.load(tmp_path / f'{i}.npz') as found:
      for name, x in zip(found.files, expected, strict=True):
        np.testing.assert_allclose(found[name], x, rtol=1e-5)


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
    fitting.updater(runs=2),
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


def test_over_a_mesh_it_is_the_same(tmp_path, whole):
  state, curves = fitting.on_mesh(tmp_path)
  w = state['variables']['w']
  assert len(w.sharding.device_set) == jax.device_count() == 8
  np.testing.assert_allclose(w, whole[0]['variables']['w'], rtol=1e-5)
  np.testing.assert_allclose(curves['loss'], whole[1]['loss'], rtol=1e-5)
