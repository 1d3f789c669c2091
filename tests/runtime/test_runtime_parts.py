"""Progress, fingerprints, meshes."""

import gc
import io
import signal
import sys

import jax
import jax.numpy as jnp
import pytest

from quantlab import runtime
from quantlab.runtime import manifest, progress


def test_track_is_silent_off_a_terminal(capsys):
  assert list(runtime.track(iter(range(3)), 'work')) == [0, 1, 2]
  captured = capsys.readouterr()
  assert captured.out + captured.err == ''


def test_track_shows_nested_loops_and_lets_go(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  screen = Terminal()
  monkeypatch.setattr(sys, 'stderr', screen)
  monkeypatch.setenv('TERM', 'xterm')
  seen = [
    (i, j)
    for i in progress.track(range(2), 'outer', force=True)
    for j in progress.track(iter('ab'), 'inner', total=2, force=True)
  ]
  assert seen == [(0, 'a'), (0, 'b'), (1, 'a'), (1, 'b')]
  assert 'outer' in screen.getvalue()
  assert progress._display._progress is None


def test_track_lets_go_when_the_loop_is_left(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  loop = progress.track(range(5), 'work', force=True)
  next(loop)
  loop.close()
  assert progress._display._progress is None


def test_fingerprint_of_arrays_sees_path_dtype_and_content():
  base = {'a': jnp.zeros(4, jnp.int8)}
  prints = [
    runtime.fingerprint(t)
    for t in (
      base,
      {'b': base['a']},
      {'a': jnp.zeros(4, jnp.uint8)},
      {'a': jnp.zeros((2, 2), jnp.int8)},
      {'a': jnp.ones(4, jnp.int8)},
    )
  ]
  assert len(set(prints)) == 5
  assert runtime.fingerprint({'a': jnp.zeros(4, jnp.int8)}) == prints[0]


def test_differences_of_equal_values_are_none():
  assert manifest.differences({'a': [1]}, {'a': [1]}) == []


def test_differences_within_lists_are_named_by_place():
  there = {'variants': [{'name': 'a', 'steps': 20}, {'name': 'b'}]}
  here = {'variants': [{'name': 'a', 'steps': 30}, {'name': 'b'}]}
  assert manifest.differences(there, here) == [
    'variants[0].steps: 20 there, 30 here'
  ]


def test_environment_names_versions_and_device():
  env = runtime.environment()
  assert env['versions']['jax'] == jax.__version__
  assert env['device']['platform'] == jax.devices()[0].platform


def test_mesh_is_auto_and_takes_all_devices():
  mesh = runtime.make_mesh(data=-1, model=1)
  assert dict(mesh.shape) == {'data': jax.device_count(), 'model': 1}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({}, 'no axes'),
    ({'a': -1, 'b': -1}, 'at most one'),
    ({'a': 0}, 'positive'),
    ({'a': 1000003}, 'devices; give'),
  ],
)
def test_mesh_refuses_sizes_that_do_not_fit(axes, message):
  with pytest.raises(ValueError, match=message):
    runtime.make_mesh(**axes)


def test_usage_measures():
  with runtime.timed() as t:
    sum(range(1000))
  assert t.seconds > 0
  peak = runtime.peak_bytes()
  assert peak is None or peak > 1 << 20


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_an_interrupt_that_python_drops_is_not_lost():
  """Raised in a callback of the garbage collector, where nothing sees it."""
  pressed = []

  def callback(phase, info):
    if not pressed:
      pressed.append(True)
      signal.raise_signal(signal.SIGINT)

  def work():
    for _ in runtime.track(range(3), 'work'):
      gc.callbacks.append(callback)
      try:
        gc.collect()
      finally:
        gc.callbacks.remove(callback)

  before = signal.getsignal(signal.SIGINT)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt), runtime.interruptible():
      work()
    assert pressed
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with runtime.interruptible():
      assert list(runtime.track(range(2), 'again')) == [0, 1]
  finally:
    signal.signal(signal.SIGINT, before)
