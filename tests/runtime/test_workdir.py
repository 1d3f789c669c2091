"""A workdir belongs to one run of one config, and can be resumed."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from quantlab import runtime
from quantlab.runtime import files

_CONFIG = {'models': ['cnn'], 'seed': 0, 'train': {'steps': 10, 'lr': 0.1}}


def test_config_and_manifest_are_there_before_any_work(tmp_path):
  with runtime.Workdir(tmp_path / 'run', _CONFIG, seed=0) as w:
    assert not w.resumed
    assert json.loads((w.path / 'config.json').read_text()) == _CONFIG
    manifest = json.loads((w.path / 'manifest.json').read_text())
  assert manifest['seed'] == 0
  assert manifest['versions']['jax']
  assert manifest['fingerprints']['config'] == files.fingerprint(_CONFIG)


def test_manifest_says_nothing_of_this_machine(tmp_path):
  with runtime.Workdir(tmp_path / 'run', _CONFIG) as w:
    text = (w.path / 'manifest.json').read_text()
  for private in (str(tmp_path), os.getcwd(), os.path.expanduser('~')):
    assert private not in text
  assert f'"{platform.node()}' not in text


def test_resuming_keeps_the_numbers(tmp_path):
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    w.metrics.record('q/cnn/w8', {'top1': np.float32(0.5), 'nbytes': 7})
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    assert w.resumed
    assert 'q/cnn/w8' in w.metrics
    assert 'q/cnn/w' not in w.metrics
    assert w.metrics.get('q/cnn/w8') == {'top1': 0.5, 'nbytes': 7}


def test_another_config_is_refused_with_the_differing_keys(tmp_path):
  runtime.Workdir(tmp_path, _CONFIG).close()
  other = {'models': ['cnn'], 'seed': 1, 'train': {'steps': 10, 'wd': 0.1}}
  with pytest.raises(runtime.WorkdirError) as e:
    runtime.Workdir(tmp_path, other)
  message = str(e.value)
  assert 'seed: 0 there, 1 here' in message
  assert 'train.lr: 0.1 there, absent here' in message
  assert 'train.wd: absent there, 0.1 here' in message
  assert 'steps' not in message
  assert '--workdir' in message


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(runtime.WorkdirError, match=r'thesis\.tex.*not a workdir'):
    runtime.Workdir(tmp_path, _CONFIG)
  assert [p.name for p in tmp_path.iterdir() if p.name[0] != '.'] == [
    'thesis.tex'
  ]


def test_an_unwritable_folder_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(runtime.WorkdirError, match=r'cannot write .*--workdir'):
    runtime.Workdir(tmp_path / 'file' / 'run', _CONFIG)


@pytest.mark.skipif(
  not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write'
)
def test_a_read_only_folder_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(runtime.WorkdirError, match='Permission denied'):
    runtime.Workdir(tmp_path, _CONFIG)


def test_a_damaged_config_is_named(tmp_path):
  runtime.Workdir(tmp_path, _CONFIG).close()
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match=r'config\.json.*not a JSON'):
    runtime.Workdir(tmp_path, _CONFIG)


def test_two_at_once_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
  held = runtime.Workdir(tmp_path, _CONFIG)
  code = (
    'import sys; from quantlab import runtime\n'
    f'runtime.Workdir({str(tmp_path)!r}, {_CONFIG!r})'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode != 0
  assert 'another process is writing' in done.stderr
  held.close()
  runtime.Workdir(tmp_path, _CONFIG).close()


def test_another_environment_is_noted_not_hidden(tmp_path, monkeypatch):
  from quantlab.runtime import manifest

  with runtime.Workdir(tmp_path, _CONFIG) as w:
    assert w.read_json('manifest.json')['resumed_by'] == []
  runtime.Workdir(tmp_path, _CONFIG).close()
  environment = manifest.environment() | {'x64': True}
  monkeypatch.setattr(manifest, 'environment', lambda: environment)
  for _ in range(2):
    with runtime.Workdir(tmp_path, _CONFIG) as w:
      content = w.read_json('manifest.json')
  assert content['x64'] is False
  assert [m['x64'] for m in content['resumed_by']] == [True]


def test_json_helpers(tmp_path):
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    assert w.read_json('plan.json') is None
    w.update_json('plan.json', 'a', {'x': 1})
    w.update_json('plan.json', 'b', {'x': 2})
    assert w.read_json('plan.json') == {'a': {'x': 1}, 'b': {'x': 2}}


def test_metrics_replace_a_prefix_whole_and_write_events(tmp_path):
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    w.metrics.record('fp/cnn', {'top1': 0.5, 'old': 1, 'note': 'n'})
    w.metrics.record('fp/cnn', {'top1': 0.6, 'kl': float('nan')})
    w.metrics.record('fp/vit', {'top1': 0.7})
  flat = json.loads((tmp_path / 'metrics.json').read_text())
  assert flat == {'fp/cnn/top1': 0.6, 'fp/cnn/kl': 'nan', 'fp/vit/top1': 0.7}
  assert any((tmp_path / 'events').iterdir())


def test_metrics_read_back_what_json_has_no_numbers_for(tmp_path):
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    w.metrics.record('q', {'a': float('nan'), 'b': -np.inf})
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    assert np.isnan(w.metrics.values['q/a'])
    assert w.metrics.values['q/b'] == -np.inf


def test_metrics_refuse_arrays_and_nothing(tmp_path):
  with runtime.Workdir(tmp_path, _CONFIG) as w:
    with pytest.raises(TypeError, match="metric 'a'"):
      w.metrics.record('fp/cnn', {'a': np.ones(2)})
    with pytest.raises(ValueError, match='no values'):
      w.metrics.record('fp/cnn', {})
