"""The launcher: what it leaves, refuses and resumes. One tiny run for most."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import pytest
from absl import app, flags

import quantlab as ql
from experiments import ptq, variants
from quantlab import models, quality, runtime
from quantlab.models import digits

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIGS = _ROOT / 'configs' / 'ptq'
_W8 = {
  'weight': {'format': 'int8'},
  'input': {
    'format': 'int8',
    'per': 'tensor',
    'static': True,
    'symmetric': False,
  },
}
_W4 = {'weight': {'format': 'int4'}}


def tiny(*names, model_names=('digits_cnn',)):
  config = ml_collections.ConfigDict()
  config.seed, config.calibration, config.evaluation = 0, 50, 100
  config.models = model_names
  rules = {'w8': _W8, 'w4': _W4}
  config.variants = tuple(
    {'name': n, 'rules': (('/kernel$', rules[n]),)} for n in names
  )
  return config


class Small(digits.Cnn):
  """Two convolutions: a block less to compile in every walk."""

  widths: tuple[int, ...] = (8, 16)


@pytest.fixture(scope='module')
def quick():
  """A small model, little training, no folder of real models and data."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(digits, 'Cnn', Small)
    train = functools.partial(digits.train_digits, epochs=4)
    patch.setattr(digits, 'train_digits', functools.cache(train))
    patch.setenv('QUANTLAB_DATA', '')
    yield patch


# w8 before w4: not the order of the alphabet, in which files are kept.
_BOTH = tiny('w8', 'w4', model_names=('mnist_lenet', 'digits_cnn'))


@pytest.fixture(scope='module')
def finished(quick, tmp_path_factory):
  """A finished run: (folder, metrics)."""
  folder = tmp_path_factory.mktemp('runs') / 'tiny'
  return folder, ptq.run(_BOTH, str(folder))


@pytest.fixture
def calls(monkeypatch):
  """Counts the calls that cost."""
  count = dict.fromkeys(('ptq', 'train'), 0)

  def counting(name, f):
    def call(*args, **kwargs):
      count[name] += 1
      return f(*args, **kwargs)

    return call

  monkeypatch.setattr(ql, 'ptq', counting('ptq', ql.ptq))
  monkeypatch.setattr(
    digits, 'train_digits', counting('train', digits.train_digits)
  )
  return count


def command(monkeypatch, *args):
  """Runs the command in this process, as `python -m experiments.ptq` would."""
  values = flags.FlagValues()
  ptq.define_flags(values)
  argv = ['ptq', *args]
  monkeypatch.setattr(sys, 'argv', argv)  # where config overrides are read
  ptq.main(values(argv), values)


# What a run leaves ------------------------------------------------------------


def test_the_workdir_is_complete(finished):
  folder, metrics = finished
  assert {p.name for p in folder.iterdir() if p.name[0] != '.'} == {
    'config.json',
    'manifest.json',
    'plan.json',
    'sites.json',
    'blocks.json',
    'metrics.json',
    'report.html',
    'checkpoints',
    'events',
  }
  assert json.loads((folder / 'metrics.json').read_text()) == metrics
  config = json.loads((folder / 'config.json').read_text())
  assert (config['seed'], config['evaluation']) == (0, 100)
  plan = json.loads((folder / 'plan.json').read_text())
  assert plan.keys() == {'digits_cnn/w8', 'digits_cnn/w4'}
  assert list((folder / 'events').iterdir())
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['seed'] == 0
  assert manifest['versions']['jax'] == jax.__version__


def test_metrics_are_flat_and_in_the_order_of_the_config(finished):
  _, metrics = finished
  heads = [key.rsplit('/', 1)[0] for key in metrics]
  assert list(dict.fromkeys(heads)) == [
    'fp/digits_cnn',
    'q/digits_cnn/w8',
    'q/digits_cnn/w4',
  ]
  for name in ('accuracy', 'cross_entropy', 'nbytes', 'bits_per_weight'):
    assert all(f'{head}/{name}' in metrics for head in heads)
  coded = [metrics[f'q/digits_cnn/{v}/nbytes'] for v in ('w4', 'w8')]
  assert sorted(coded) == coded
  assert coded[1] < metrics['fp/digits_cnn/nbytes']
  agreement = metrics['q/digits_cnn/w8/agreement']
  assert 0.9 <= agreement <= 1


def test_the_report_shows_every_variant_with_pictures(finished):
  folder, _ = finished
  page = (folder / 'report.html').read_text()
  # Two pictures of the model, four of each variant.
  assert page.count('<img') == page.count('data:image/png;base64,') == 10
  assert 'there are no errors by block' not in page
  walks = json.loads((folder / 'blocks.json').read_text())
  assert all(len(w['blocks']) > 1 for w in walks.values())
  assert page.count('no transform changed them') == 4  # captions, twice
  assert page.index('<summary>w8<') < page.index('<summary>w4<')


@pytest.mark.parametrize('name', ['w8', 'w4'])
def test_a_checkpoint_gives_the_recorded_numbers_again(finished, name):
  folder, metrics = finished
  work = models.workload('digits_cnn', calibration=50, evaluation=100)
  model = ql.load(folder / 'checkpoints' / 'digits_cnn' / name, work.apply)
  found = quality.evaluate(
    model.apply, model.params, work.evaluation, work.metric
  )
  head = f'q/digits_cnn/{name}'
  assert found['accuracy'].value == metrics[f'{head}/accuracy']
  assert found['cross_entropy'].value == pytest.approx(
    metrics[f'{head}/cross_entropy'], rel=1e-5
  )
  assert model.nbytes == metrics[f'{head}/nbytes']


def test_a_chain_leaves_what_its_page_shows(quick, tmp_path):
  config = tiny('w4')
  rules = (('/kernel$', {**_W4, 'input': {'format': 'int8', 'per': 'token'}}),)
  chain = ('smooth', 'gptq', 'bias_correction')
  config.variants = ({'name': 'c', 'rules': rules, 'transform': chain},)
  ptq.run(config, str(tmp_path))
  walk = json.loads((tmp_path / 'blocks.json').read_text())['digits_cnn/c']
  assert walk['transform'] == list(chain)
  assert walk['prepared'] == ['smooth']
  model = ql.load(tmp_path / 'checkpoints' / 'digits_cnn' / 'c', lambda p, x: x)
  assert walk['blocks'] == model.report['blocks']
  rows = json.loads((tmp_path / 'sites.json').read_text())['digits_cnn/c']
  for row in rows:
    before, after = row['before'], row['after']
    assert before.keys() == after.keys() == {'input', 'weight'}
    assert sum(before['input']['counts']) == sum(after['input']['counts'])
  assert any(r['before']['weight'] != r['after']['weight'] for r in rows)
  page = (tmp_path / 'report.html').read_text()
  assert 'Made by smooth, then gptq, then bias_correction.' in page
  assert 'after smooth (line)' in page
  # What was encoded is what codes are compared with: SQNR is not of a scaling.
  assert all(float(r['sqnr']) > 10 for r in rows)


# Resuming ---------------------------------------------------------------------


def test_a_finished_run_is_not_computed_again(finished, calls, capsys):
  folder, metrics = finished
  page = _results(folder)
  assert ptq.run(_BOTH, str(folder)) == metrics
  assert calls == {'ptq': 0, 'train': 0}
  assert _results(folder) == page
  printed = capsys.readouterr().out
  assert 'finished before' in printed
  assert printed.index('w8') < printed.index('w4')


def _results(folder):
  """The page but for its end, which also says by what it was resumed."""
  return (folder / 'report.html').read_text().split('<h2>How it was made')[0]


def test_what_was_lost_is_made_again(finished, calls, tmp_path):
  folder, metrics = finished
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  # As if killed after the checkpoint was written, before it was recorded.
  lost = 'q/digits_cnn/w4/'
  kept = {k: v for k, v in metrics.items() if not k.startswith(lost)}
  (copy / 'metrics.json').write_text(json.dumps(kept))
  found = ptq.run(_BOTH, str(copy))
  assert calls == {'ptq': 1, 'train': 1}
  assert list(found) == list(metrics)
  cost = ('/seconds', '/peak_bytes')
  assert {k: v for k, v in found.items() if not k.endswith(cost)} == {
    k: v for k, v in metrics.items() if not k.endswith(cost)
  }


def test_another_config_is_refused_with_the_differing_keys(finished, calls):
  folder, _ = finished
  config = tiny('w8', model_names=_BOTH.models)
  config.seed = 3
  with pytest.raises(runtime.WorkdirError, match='another config') as caught:
    ptq.run(config, str(folder))
  message = str(caught.value)
  assert 'seed: 0 there, 3 here' in message
  assert 'variants: ' in message
  assert 'models: ' not in message
  assert calls == {'ptq': 0, 'train': 0}


# Refusals ---------------------------------------------------------------------


def test_absent_data_is_said_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv('QUANTLAB_DATA', str(tmp_path / 'no [such] folder'))
  config = tiny('w8', model_names=('mnist_lenet', 'stories'))
  assert ptq.run(config, str(tmp_path / 'run')) == {}
  printed = ' '.join(capsys.readouterr().out.split())
  assert 'mnist_lenet is skipped:' in printed
  assert 'stories is skipped:' in printed
  assert 'no [such] folder' in printed
  assert 'QUANTLAB_DATA' in printed
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert '0 models' in page


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, calls):
  (tmp_path / 'file').write_text('')
  with pytest.raises(runtime.WorkdirError, match='cannot write to the folder'):
    ptq.run(tiny('w8'), str(tmp_path / 'file' / 'below'))
  assert calls == {'ptq': 0, 'train': 0}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'models': ('digits_cn',)}, "model 'digits_cn'.*mean 'digits_cnn'"),
    ({'calibration': -5}, 'calibration=-5: expected a number of examples'),
    ({'variants': ('w8',)}, "a variant is a dict .* found 'w8'"),
    (
      {
        'variants': (
          {'name': 'w', 'rules': (('.*', {'weight': {'format': 'itn8'}}),)},
        )
      },
      "variant 'w': unknown format 'itn8'.*Did you mean 'int8'",
    ),
  ],
)
def test_a_typo_is_refused_before_the_folder_is_made(tmp_path, change, message):
  config = tiny('w8')
  config.update(change)
  with pytest.raises(variants.ConfigError, match=message):
    ptq.run(config, str(tmp_path / 'run'))
  with pytest.raises(variants.ConfigError, match=message):
    ptq.dry_run(config)
  assert not (tmp_path / 'run').exists()


# The command line -------------------------------------------------------------

_DIGITS = f'--config={_CONFIGS / "digits.py"}'


def test_a_misspelt_field_is_refused(monkeypatch):
  with pytest.raises(AttributeError, match='Did you mean "seed"'):
    command(monkeypatch, _DIGITS, '--config.sed=1', '--workdir=x')


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ((_DIGITS, '--config.varients=1'), 'Did you mean "variants"'),
    (('--config=nowhere.py',), 'No such file'),
  ],
)
def test_a_slip_in_the_config_gives_no_traceback(tmp_path, args, message):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.ptq', *args, f'--workdir={tmp_path}'],
    cwd=_CONFIGS.parent.parent,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.startswith('error: --config: ')
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('args', 'message'),
  [((), '--workdir is needed'), (('--workdir=x', 'y'), "arguments .'y'.")],
)
def test_usage(monkeypatch, tmp_path, args, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(app.UsageError, match=message):
    command(monkeypatch, _DIGITS, *args)
  assert not list(tmp_path.iterdir())


def test_a_config_is_needed(monkeypatch):
  with pytest.raises(app.UsageError, match='--config is needed'):
    command(monkeypatch, '--workdir=x')


def test_a_run_without_models_says_so(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv('QUANTLAB_DATA', str(tmp_path / 'none'))
  config = f'--config={_CONFIGS / "mnist.py"}'
  command(monkeypatch, config, f'--workdir={tmp_path / "run"}')
  assert capsys.readouterr().out.endswith(
    'no model of the config has its files here\n'
  )


@pytest.mark.parametrize('folder', ['file/below', 'other'])
def test_what_a_user_does_wrong_is_said_without_a_traceback(
  monkeypatch, tmp_path, folder
):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('')
  with pytest.raises(SystemExit, match=r'^error: .*(--workdir|new folder)'):
    command(monkeypatch, _DIGITS, f'--workdir={tmp_path / folder}')


def test_a_dry_run_plans_and_does_nothing(monkeypatch, tmp_path, capsys, calls):
  monkeypatch.chdir(tmp_path)
  command(
    monkeypatch,
    _DIGITS,
    '--config.models=digits_cnn',
    '--dry_run',
    '--workdir=run',
  )
  printed = capsys.readouterr().out
  assert printed.count('bytes needed: weights ') == 10
  assert 'digits_cnn, w8a8_static\n' in printed
  assert 'digits_cnn, ternary\n' in printed
  assert 'digits_vit' not in printed
  assert 'params/conv_1/kernel' in printed
  assert calls == {'ptq': 0, 'train': 0}
  assert not list(tmp_path.iterdir())


# The second variant waits while there is a file `hold`, to be interrupted.
_TWO = """
import functools
import pathlib
import runpy
import time
import quantlab as ql
from quantlab.models import digits

hold, run, ptq = pathlib.Path({hold!r}), pathlib.Path({run!r}), ql.ptq

def held(*args, **kwargs):
  metrics = run / 'metrics.json'
  while hold.exists() and metrics.exists() and '/w8a8' in metrics.read_text():
    time.sleep(0.1)
  return ptq(*args, **kwargs)

def get_config():
  ql.ptq = held
  digits.train_digits = functools.partial(digits.train_digits, epochs=2)
  config = runpy.run_path({path!r})['get_config']()
  config.evaluation, config.models = 100, ('digits_cnn',)
  config.variants = config.variants[:2]
  return config
"""


def start(config, run):
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.ptq']
    + [f'--config={config}', f'--workdir={run}'],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_an_interrupted_run_is_whole_and_goes_on(tmp_path):
  config, run = tmp_path / 'two.py', tmp_path / 'run'
  hold = tmp_path / 'hold'
  hold.touch()
  text = _TWO.format(
    path=str(_CONFIGS / 'digits.py'), hold=str(hold), run=str(run)
  )
  config.write_text(text)
  process = start(config, run)
  try:
    deadline = time.monotonic() + 300
    while not (run / 'metrics.json').exists() or not _recorded(run):
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline
      time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
  assert process.returncode == 130, err
  assert 'the same command goes on from here' in err
  assert 'Traceback' not in err
  assert 'written to' not in out
  for path in run.rglob('*.json'):
    json.loads(path.read_text())
  assert _recorded(run) == {'w8a8_static'}
  before = json.loads((run / 'metrics.json').read_text())
  for folder in (run / 'checkpoints' / 'digits_cnn').iterdir():
    if folder.name[0] != '.':  # a dot: never looked at, removed by the next
      assert ql.load(folder, digits.Cnn().apply).nbytes > 0
  assert (run / 'checkpoints' / 'digits_cnn' / 'w8a8_static').exists()
  hold.unlink()
  process = start(config, run)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert '1 of 2 variants to do' in out
  assert 'written to' in out
  assert _recorded(run) == {'w8a8_static', 'w8a8_dynamic'}
  after = json.loads((run / 'metrics.json').read_text())
  assert {k: after[k] for k in before} == before
  assert (run / 'report.html').exists()


def _recorded(run):
  metrics = json.loads((run / 'metrics.json').read_text())
  return {k.split('/')[2] for k in metrics if k.startswith('q/')}


def test_replay_makes_the_same_bytes_again(finished, monkeypatch, capsys):
  folder, _ = finished
  path = folder / 'checkpoints' / 'digits_cnn' / 'w4'
  with pytest.raises(SystemExit) as stop:
    command(monkeypatch, f'--replay={path}')
  assert stop.value.code == 0
  assert 'identical' in capsys.readouterr().out


def test_replay_finds_what_differs(finished, monkeypatch, capsys, tmp_path):
  folder, _ = finished
  name = 'digits_cnn/w4'
  model = ql.load(folder / 'checkpoints' / name, lambda params, x: x)
  made = {**model.report['made']}
  made['config'] = {**made['config'], 'seed': 1}
  report = {**model.report, 'made': made}
  ql.save(tmp_path / 'm', dataclasses.replace(model, report=report))
  with pytest.raises(SystemExit) as stop:
    command(monkeypatch, f'--replay={tmp_path / "m"}')
  assert stop.value.code == 1
  assert 'differences' in capsys.readouterr().out
