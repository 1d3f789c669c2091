"""A walk that is killed goes on, bit for bit; streams may lie on disk."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab.ptq import resume, streams, walk
from quantlab.runtime import checkpoint

RECIPE = {'/w': ql.rule(weight=ql.int4(group=8), input=ql.int8(per='token'))}


def setup(scanned=False, seed=0):
  """Three residual layers, cheap to compile."""

  def layer(x, p):
    return x + jnp.tanh(x @ p['w1']) @ p['w2'], None

  def apply(params, x):
    if scanned:
      return jax.lax.scan(layer, x, params['layers'])[0]
    for p in params['layers']:
      x, _ = layer(x, p)
    return x

  keys = jax.random.split(jax.random.key(1), 7)
  stack = {
    'w1': jax.random.normal(keys[0], (3, 16, 24)) / 4,
    'w2': jax.random.normal(keys[1], (3, 24, 16)) / 5,
  }
  rows = [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(3)]
  params = {'layers': stack if scanned else rows}
  batches = jax.random.normal(jax.random.key(seed), (3, 32, 16))
  return apply, params, list(batches)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('scanned', [False, True])
def test_a_walk_for_its_errors_alone_makes_the_same_codes(scanned):
  apply, params, batches = setup(scanned)
  at_once = ql.ptq(apply, params, RECIPE, batches)
  walked = ql.ptq(apply, params, RECIPE, batches, block_errors=True)
  same(at_once.params, walked.params)
  assert 'blocks' not in at_once.report
  floats, codes = (
    apply(params, batches[0]),
    walked.apply(walked.params, batches[0]),
  )
  last = walked.report['blocks'][-1]['relative_error']
  found = jnp.sum((floats - codes) ** 2) / jnp.sum(floats**2)
  assert 0.5 < last / found < 2  # one batch of three


@pytest.mark.parametrize('scanned', [False, True])
def test_spilled_streams_change_nothing(scanned, tmp_path):
  apply, params, batches = setup(scanned)
  whole = ql.ptq(apply, params, RECIPE, batches, ql.gptq())
  spilled = ql.ptq(
    apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path, memory=0
  )
  same(whole.params, spilled.params)
  assert whole.report == spilled.report
  assert not (tmp_path / 'streams').exists()


class StoppedError(Exception):
  pass


@pytest.mark.parametrize('scanned', [False, True])
def test_a_stopped_walk_goes_on(scanned, tmp_path, monkeypatch):
  """Whichever block it stopped in, codes and report come out the same."""
  apply, params, batches = setup(scanned)
  chain = ql.chain(ql.gptq())
  whole = ql.ptq(apply, params, RECIPE, batches, chain)
  blocks = len(whole.report['blocks'])
  assert blocks == 3
  real = walk._Walker.block
  for stop in (1,) if scanned else range(blocks):
    left = [stop]

    def stopping(self, *args, left=left):
      if not left[0]:
        raise StoppedError
      left[0] -= 1
      return real(self, *args)

    folder = tmp_path / str(stop)
    monkeypatch.setattr(walk._Walker, 'block', stopping)
    with pytest.raises(StoppedError):
      ql.ptq(apply, params, RECIPE, batches, chain, workdir=folder)
    monkeypatch.setattr(walk._Walker, 'block', real)
    done = sorted((folder / 'blocks').glob('*')) if stop else []
    assert len(done) == stop
    resumed = ql.ptq(apply, params, RECIPE, batches, chain, workdir=folder)
    same(whole.params, resumed.params)
    assert whole.report == resumed.report


def test_finished_blocks_are_not_encoded_again(tmp_path):
  apply, params, batches = setup()
  first = ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)
  encoder = ql.gptq()

  def never(*args):
    raise AssertionError('encoded again')

  again = dataclasses.replace(encoder, encode=never)
  second = ql.ptq(apply, params, RECIPE, batches, again, workdir=tmp_path)
  same(first.params, second.params)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from ptq import test_resume as t
import quantlab as ql
from quantlab.ptq import resume
kill = int(sys.argv[2])
write = resume.Checkpoints.write
def dying(self, index, *args):
  write(self, index, *args)
  if index == kill:
    os.kill(os.getpid(), signal.SIGKILL)
resume.Checkpoints.write = dying
apply, params, batches = t.setup()
m = ql.ptq(apply, params, t.RECIPE, batches, ql.gptq(), workdir=sys.argv[1])
ql.save(sys.argv[1] + '/model', m)
"""


def test_kill_9(tmp_path):
  """A process that is killed, and another that goes on."""
  tests = pathlib.Path(__file__).parent.parent

  def start(folder, kill):
    command = [sys.executable, '-c', SCRIPT, folder, str(kill), tests]
    return subprocess.run(command, check=False, timeout=300).returncode

  broken, whole = tmp_path / 'broken', tmp_path / 'whole'
  assert start(broken, 1) == -signal.SIGKILL
  assert not (broken / 'model').exists()
  assert start(broken, -1) == 0
  apply, params, batches = setup()
  uninterrupted = ql.ptq(apply, params, RECIPE, batches, ql.gptq())
  ql.save(whole / 'model', uninterrupted)
  ids = [
    checkpoint.identity(checkpoint.read_manifest(p / 'model'))
    for p in (broken, whole)
  ]
  assert ids[0] == ids[1]


def other(what, apply, params, batches):
  if what == 'params':
    params = jax.tree.map(lambda x: x + 1e-3, params)
  if what == 'calibration':
    batches = batches[::-1]
  recipe = {'/w': ql.rule(weight=ql.int4(group=4), input=ql.int8(per='token'))}
  damp = 0.02 if what == 'chain' else 0.01
  return (
    apply,
    params,
    recipe if what == 'recipe' else RECIPE,
    batches,
    ql.gptq(damp=damp),
  )


@pytest.mark.parametrize('what', ['params', 'calibration', 'recipe', 'chain'])
def test_another_run_is_refused_and_named(what, tmp_path):
  apply, params, batches = setup()
  ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)
  with pytest.raises(resume.ResumeError, match=rf'\n  {what}.*there, .*here'):
    ql.ptq(*other(what, apply, params, batches), workdir=tmp_path)


def test_other_versions_are_refused(tmp_path):
  apply, params, batches = setup()
  ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)
  path = tmp_path / 'walk.json'
  found = json.loads(path.read_text())
  found['versions']['jax'] = '0.0.1'
  path.write_text(json.dumps(found))
  with pytest.raises(resume.ResumeError, match=r'versions\.jax: "0\.0\.1"'):
    ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)


def test_a_damaged_block_is_refused(tmp_path):
  apply, params, batches = setup()
  ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)
  manifest = tmp_path / 'blocks' / '00001' / 'manifest.json'
  manifest.write_text(manifest.read_text().replace('[]', '[0]', 1))
  with pytest.raises(ql.runtime.CheckpointError, match='edited or damaged'):
    ql.ptq(apply, params, RECIPE, batches, ql.gptq(), workdir=tmp_path)


def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch):
  """The message says what to do; the same call goes on when there is room."""
  apply, params, batches = setup()
  whole = ql.ptq(apply, params, RECIPE, batches, ql.gptq())
  write = streams.epath.Path.write_bytes
  left = [8]

  def full(self, data):
    if self.suffix == '.bin':
      left[0] -= 1
      if left[0] < 0:
        raise OSError(28, 'No space left on device')
    return write(self, data)

  kind = type(streams.epath.Path(tmp_path))
  monkeypatch.setattr(kind, 'write_bytes', full)
  options = {'workdir': tmp_path, 'memory': 0}
  with pytest.raises(OSError, match=r'No space left on device.*larger memory='):
    ql.ptq(apply, params, RECIPE, batches, ql.gptq(), **options)
  left[0] = 10**9
  assert list((tmp_path / 'blocks').glob('*'))
  resumed = ql.ptq(apply, params, RECIPE, batches, ql.gptq(), **options)
  same(whole.params, resumed.params)


def test_a_store_keeps_to_its_limit(tmp_path):
  store = streams.Store(tmp_path, 100)
  stream = store.stream()
  values = [jnp.arange(20, dtype=t) for t in ('float32', 'bfloat16', 'int8')]
  for x in values:
    stream.append((x,))
  assert store.held == 100  # 80 in memory, 40 on disk, 20 in memory
  assert len(os.listdir(tmp_path)) == 1
  for x, (y,) in zip(values, stream, strict=True):
    np.testing.assert_array_equal(x, y)
    assert y.dtype == x.dtype
  stream[1] = (values[2],)
  assert len(os.listdir(tmp_path)) == 1  # the old file is gone
  stream.clear()
  assert not os.listdir(tmp_path)
  assert store.held == 0


def test_the_walk_holds_both_streams_and_little_more(monkeypatch):
  """Live arrays: weights and 2.5 streams, whatever the calibration size."""
  apply, params, _ = setup()
  batches = list(jax.random.normal(jax.random.key(3), (24, 256, 16)))
  stream = 24 * 256 * 16 * 4
  held = jax.live_arrays()  # kept: what dies meanwhile would count as freed
  before = sum(x.nbytes for x in held)
  seen = []
  real = streams.Stream.__setitem__

  def watching(self, index, arrays):
    seen.append(sum(x.nbytes for x in jax.live_arrays()) - before)
    real(self, index, arrays)

  monkeypatch.setattr(streams.Stream, '__setitem__', watching)
  ql.ptq(apply, params, RECIPE, batches, ql.gptq())
  assert len(seen) == 3 * 2 * 24  # blocks, streams, batches
  assert max(seen) < ql.nbytes(params) + 2.5 * stream
  assert max(seen) > 1.9 * stream
