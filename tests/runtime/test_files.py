"""A file or folder is whole or absent."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from quantlab.runtime import files


def test_write_replaces_in_one_step_and_leaves_no_other_file(tmp_path):
  path = tmp_path / 'sub' / 'a.json'
  files.write_json(path, {'b': 1})
  files.write_json(path, {'b': 2})
  assert files.read_json(path) == {'b': 2}
  assert os.listdir(path.parent) == ['a.json']


@pytest.mark.parametrize('where', ['write', 'fsync', 'replace'])
def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, where):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')

  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  if where == 'write':
    monkeypatch.setattr(files, 'open', interrupt, raising=False)
  else:
    monkeypatch.setattr(files.os, where, interrupt)
  with pytest.raises(KeyboardInterrupt):
    files.write_text(path, 'new')
  monkeypatch.undo()
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a.txt']


def test_new_folder_disappears_when_the_body_raises(tmp_path):
  def fill():
    with files.new_folder(tmp_path / 'ck') as folder:
      (folder / 'x').write_text('half')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fill()
  assert os.listdir(tmp_path) == []


def test_new_folder_removes_what_a_killed_writer_left(tmp_path):
  partial = files.partial_name(tmp_path / 'ck')
  partial.mkdir()
  (partial / 'stale').write_text('x')
  with files.new_folder(tmp_path / 'ck') as folder:
    (folder / 'x').write_text('1')
  assert os.listdir(tmp_path) == ['ck']
  assert os.listdir(tmp_path / 'ck') == ['x']


def test_new_folder_refuses_an_existing_one_unless_told(tmp_path):
  path = tmp_path / 'ck'
  with files.new_folder(path) as folder:
    (folder / 'old').write_text('1')
  with pytest.raises(FileExistsError, match='overwrite=True'):
    files.new_folder(path).__enter__()
  with files.new_folder(path, overwrite=True) as folder:
    (folder / 'new').write_text('1')
  assert os.listdir(path) == ['new']


def test_json_is_strict_and_takes_arrays():
  value = {'a': np.float32(0.5), 'b': jnp.arange(2), 'c': (1, None), 3: True}
  assert json.loads(files.dumps(value)) == {
    'a': 0.5,
    'b': [0, 1],
    'c': [1, None],
    '3': True,
  }

  def reject(token):
    raise AssertionError(f'{token} is not JSON')

  text = files.dumps([float('nan'), -np.inf])
  back = json.loads(text, parse_constant=reject)
  assert np.isnan(float(back[0]))
  assert float(back[1]) == -np.inf


def test_json_names_what_has_no_form():
  with pytest.raises(TypeError, match=r'no JSON form for .*object'):
    files.dumps({'a': object()})


def test_read_json_names_a_truncated_file(tmp_path):
  path = tmp_path / 'm.json'
  path.write_text('{"a": ')
  with pytest.raises(ValueError, match=r'm\.json.*truncated'):
    files.read_json(path)


def test_fingerprint_ignores_key_order_and_sees_values():
  assert files.fingerprint({'a': 1, 'b': 2}) == files.fingerprint(
    {'b': 2, 'a': 1}
  )
  assert files.fingerprint({'a': 1}) != files.fingerprint({'a': 2})
