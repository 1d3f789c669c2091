"""The training launcher: what it leaves, goes on with, and refuses."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from qat import tiny_launch

import quantlab as ql
from experiments import qat, tasks, variants
from quantlab import runtime

ROOT = pathlib.Path(__file__).parents[2]
BAD = tiny_launch.ADAM | {'name': 'adan'}
CONFIG = pathlib.Path(__file__).parents[1] / 'qat' / 'tiny_launch.py'


def read(folder, name):
  return json.loads((folder / name).read_text())


def measured(folder):
  """The metrics without what no two runs share."""
  return {
    k: v
    for k, v in read(folder, 'metrics.json').items()
    if not k.endswith(('seconds', 'peak_bytes'))
  }


class StoppedError(Exception):
  pass


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Stopped once in the middle of the second variant, and finished."""
  folder = tmp_path_factory.mktemp('qat') / 'run'

  def stop(self, values, step):
    if step == 45 and any('w2a4' in name for name in values):
      raise StoppedError

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runtime.metrics.Metrics, 'scalars', stop)
    with pytest.raises(StoppedError):
      qat.run(tiny_launch.get_config(), str(folder))
  return folder, qat.run(tiny_launch.get_config(), str(folder))


def test_the_workdir_is_complete(finished):
  folder, metrics = finished
  assert {p.name for p in folder.iterdir() if p.name[0] != '.'} == {
    *('config.json', 'manifest.json', 'plan.json', 'sites.json'),
    *('curves.json', 'seeds.json', 'metrics.json', 'report.html'),
    *('events', 'checkpoints', 'training'),
  }
  assert list((folder / 'events').iterdir())
  assert read(folder, 'metrics.json') == metrics
  heads = [k.rsplit('/', 1)[0] for k in metrics]
  assert list(dict.fromkeys(heads)) == [
    'fp/digits_mlp',
    'q/digits_mlp/w2a4',
    'q/digits_mlp/ternary_wide',
    'q/digits_mlp/ternary_lora',
  ]


def test_models_are_trained(finished):
  """Chance is 0.1; two bits are learned, not only rounded to."""
  _, metrics = finished
  assert metrics['fp/digits_mlp/accuracy'] > 0.85
  for name in ('w2a4', 'ternary_wide'):
    head = f'q/digits_mlp/{name}'
    assert metrics[f'{head}/accuracy'] > 0.8
    assert metrics[f'{head}/frozen_median_difference'] < 1e-5
  assert (
    metrics['q/digits_mlp/w2a4/accuracy']
    > metrics['q/digits_mlp/w2a4/start_accuracy'] + 0.02
  )


def test_adapters_are_trained_and_nothing_else(finished):
  folder, metrics = finished
  head = 'q/digits_mlp/ternary_lora'
  assert metrics[f'{head}/accuracy'] > metrics[f'{head}/start_accuracy'] + 0.02
  assert metrics[f'{head}/trained_parameters'] == 4 * (64 + 24)
  task = tasks.make('digits_mlp', {'hidden': (24,)})
  model = ql.load(folder / 'checkpoints/digits_mlp/ternary_lora', task.apply)
  kernel = model.params['weights']['layer_0']['kernel']
  assert len(np.unique(kernel.dequantize())) == 3
  assert 'adapter' in model.params['sites']['layer_0/kernel']


def test_spread_is_that_of_the_seeds(finished):
  folder, metrics = finished
  for name in ('float', 'w2a4', 'ternary_wide'):
    seeds = read(folder, 'seeds.json')[f'digits_mlp/{name}']
    found = [seeds[s]['cross_entropy'] for s in '01']
    assert found[0] != found[1]
    head = 'fp/digits_mlp' if name == 'float' else f'q/digits_mlp/{name}'
    assert metrics[f'{head}/cross_entropy'] == pytest.approx(np.mean(found))
    assert metrics[f'{head}/cross_entropy_stderr'] == pytest.approx(
      abs(found[0] - found[1]) / 2
    )
    assert metrics[f'{head}/seeds'] == 2


def test_the_checkpoint_is_the_model_that_was_judged(finished):
  folder, _ = finished
  task = tasks.make('digits_mlp', {'hidden': (24,)})
  path = folder / 'checkpoints/digits_mlp/w2a4'
  model = ql.load(path, task.apply)
  found = ql.evaluate(model.apply, model.params, task.evaluation, task.metric)
  first = read(folder, 'seeds.json')['digits_mlp/w2a4']['0']
  assert float(found['accuracy'].value) == first['accuracy']
  kernel = model.params['weights']['layer_1']['kernel']
  assert isinstance(kernel, ql.QTensor)
  assert len(np.unique(np.asarray(kernel.dequantize()))) <= 4
  assert read(folder, 'plan.json')['digits_mlp/w2a4']


def test_curves_have_every_point(finished):
  folder, _ = finished
  curves = read(folder, 'curves.json')['q/digits_mlp/w2a4/seed_0-1']
  assert [s for s, _ in curves['validation_loss']] == [0, 20, 40, 60]
  assert [s for s, _ in curves['loss']] == list(range(5, 61, 5))


def training_steps(path):
  return sorted(p.name for p in (path / 'steps').iterdir() if p.name.isdigit())


def test_the_report_has_learning_curves(finished):
  folder, _ = finished
  page = (folder / 'report.html').read_text()
  for words in (
    'loss over training steps',
    'validation loss over training steps',
    'validation accuracy over training steps',
  ):
    assert words in page


def test_again_does_nothing_anew(finished, monkeypatch):
  folder, metrics = finished
  monkeypatch.setattr(qat.judging, 'judge', None)
  before = {p: p.stat().st_mtime_ns for p in (folder / 'training').rglob('*')}
  assert qat.run(tiny_launch.get_config(), str(folder)) == metrics
  after = {p: p.stat().st_mtime_ns for p in (folder / 'training').rglob('*')}
  assert {p for p in after if p.is_file()} == {p for p in before if p.is_file()}


# Stops ------------------------------------------------------------------------


def command(folder, *more, config='all', **options):
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.qat', f'--config={CONFIG}:{config}']
    + [f'--workdir={folder}', *more],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


# What the loop itself is tested for always, with the whole launcher: a minute.
whole_launcher = pytest.mark.skipif(
  not os.environ.get('QUANTLAB_LONG_TESTS'), reason='QUANTLAB_LONG_TESTS unset'
)


@whole_launcher
def test_killed_it_goes_on_with_the_same_curves(finished, tmp_path):
  """kill -9 in the middle of the last variant; then to the end."""
  folder = tmp_path / 'killed'
  saves = folder / 'training/w2a4/0-1/steps'
  with command(folder, config='short') as process:
    try:
      deadline = time.time() + 120
      while not (saves / '20').exists() and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.001)
    finally:
      process.send_signal(signal.SIGKILL)
  assert not (folder / 'report.html').exists()
  assert 'q/digits_mlp/w2a4/accuracy' not in read(folder, 'metrics.json')
  qat.run(tiny_launch.get_config('short'), str(folder))
  whole, _ = finished
  for name in ('curves.json', 'seeds.json'):
    found = read(folder, name)
    assert len(found) == 2
    assert found.items() <= read(whole, name).items()
  assert len(measured(folder)) > 40
  assert measured(folder).items() <= measured(whole).items()


def test_divergence_ends_with_the_site_and_a_save(tmp_path):
  config = tiny_launch.get_config()
  config.float.steps = 0
  bad = {'name': 'sgd', 'learning_rate': 1e25}
  config.variants = (tiny_launch.LSQ | {'optimizer': bad, 'distill': {}},)
  with pytest.raises(qat.TrainingError) as caught:
    qat.run(config, str(tmp_path / 'run'))
  words = str(caught.value)
  assert "variant 'w2a4', seed" in words
  assert "site 'layer_0/kernel'" in words or "site 'layer_1/kernel'" in words
  assert 'The save of step 0 is kept' in words
  path = tmp_path / 'run/training/w2a4/0-1'
  assert training_steps(path) == ['0']


# Several devices and processes ----------------------------------------------


@whole_launcher
def test_two_processes_do_what_one_does(tmp_path):
  """With two devices each; sums have another order."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  flag = '--xla_force_host_platform_device_count=2'
  workers = [
    command(
      tmp_path / 'two',
      f'--coordinator=localhost:{port}',
      '--processes=2',
      f'--process={i}',
      config='mesh',
      env=os.environ | {'XLA_FLAGS': flag},
    )
    for i in range(2)
  ]
  try:
    outputs = [w.communicate(timeout=300)[0] for w in workers]
  finally:
    for w in workers:
      w.kill()
  for w in workers:
    assert w.returncode == 0, outputs
  assert jax.device_count() == 8
  one = qat.run(tiny_launch.get_config('mesh'), str(tmp_path / 'one'))
  two = read(tmp_path / 'two', 'metrics.json')
  assert one.keys() == two.keys()
  head = 'q/digits_mlp/w2a4/cross_entropy'
  assert two[head] == pytest.approx(one[head], rel=1e-2)
  name = 'q/digits_mlp/w2a4/seed_0'
  here, there = (
    read(tmp_path / folder, 'curves.json')[name]['loss']
    for folder in ('one', 'two')
  )
  assert here != there or here[-1][1] < here[0][1]
  np.testing.assert_allclose(here[:6], there[:6], rtol=1e-3)


# What is refused --------------------------------------------------------------


def changed(**fields):
  config = tiny_launch.get_config()
  for name, value in fields.items():
    config[name] = value
  return config


@pytest.mark.parametrize(
  ('config', 'words'),
  [
    (changed(task='digit_mlp'), "Did you mean 'digits_mlp'"),
    (changed(seeds=()), 'expected one or more'),
    (changed(seeds=(1, 1)), 'each once'),
    (changed(log_every=0), 'log_every=0'),
    (changed(variants=({'rules': ()},)), 'a variant is a dict'),
    (changed(variants=(tiny_launch.LSQ | {'name': 'float'},)), 'is taken'),
    (
      changed(variants=(tiny_launch.LSQ | {'stepz': 1},)),
      "Did you mean 'steps'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'estimator': 'lsk'},)),
      "Did you mean 'lsq'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'model': {'hidden': (9,)}},)),
      "say start='scratch'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'optimizer': BAD},)),
      "Did you mean 'adam'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'distill': {'weight': 1.0}},)),
      "'temperature'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'lora': {'pattern': '.'}},)),
      'no estimator',
    ),
    (
      changed(variants=({'name': 'a', 'rules': (('.', None),)},)),
      'has no steps',
    ),
    (
      changed(variants=(tiny_launch.WIDE | {'warm_up': 3},)),
      'expected 0 to 1',
    ),
    (
      changed(variants=(tiny_launch.ADAPTED | {'lora': {'pattern': 'no'}},)),
      "variant 'ternary_lora': 'no' meets none",
    ),
    (
      changed(variants=(tiny_launch.ADAPTED | {'lora': {'rank': 4}},)),
      "needs a 'pattern'",
    ),
    (
      changed(variants=(tiny_launch.LSQ | {'batch_norm': 1.0},)),
      'no BatchNorms',
    ),
  ],
)
def test_mistakes_in_a_config_are_told_before_any_work(config, words, tmp_path):
  with pytest.raises(variants.ConfigError, match=words):
    qat.run(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()  # the folder is still free


def test_another_config_in_the_folder_is_refused(finished):
  folder, _ = finished
  with pytest.raises(runtime.WorkdirError, match='batch_size: 64 there, 32'):
    qat.run(changed(batch_size=32), str(folder))
