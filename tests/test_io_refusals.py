"""A damaged, foreign or unfitting checkpoint is refused by name."""

import dataclasses
import json
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import quantlab as ql
from quantlab import io
from quantlab.graph.values import Dropped
from quantlab.runtime import checkpoint, files

CheckpointError = io.CheckpointError


def small(params, x):
  h = jax.nn.relu(x @ params['layers'][0]['w'] + params['bias'])
  return h @ params['layers'][1]['w']


@pytest.fixture(scope='module')
def model():
  params = {
    'layers': [{'w': normal(0, 16, 16)}, {'w': normal(1, 16, 8)}],
    'bias': normal(2, 16),
  }
  recipe = {'0/w$': ql.int4(group=8), '1/w$': ql.int8()}
  return ql.ptq(small, params, recipe, [normal(3, 4, 16)])


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'ck'
  ql.save(path, model)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'ck'))


def biggest(path):
  found = [p for p in (path / 'arrays').rglob('*') if p.is_file()]
  return max(found, key=lambda p: p.stat().st_size)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .*'"):
    ql.load(tmp_path / 'nope', small)


def test_a_foreign_folder(tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(b'x')
  with pytest.raises(
    CheckpointError, match=r'not a quantlab .*model\.safetens'
  ):
    ql.load(tmp_path, small)


def test_a_truncated_file(copy):
  file = biggest(copy)
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=rf'{file.name}.* truncated'):
    ql.load(copy, small)


def test_an_edited_file(copy):
  file = biggest(copy)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(CheckpointError, match=rf'{file.name}.* edited'):
    ql.load(copy, small)


def test_an_edited_manifest(copy):
  file = copy / 'manifest.json'
  text = file.read_text()
  assert '"group": 8' in text
  file.write_text(text.replace('"group": 8', '"group": 4'))
  with pytest.raises(CheckpointError, match=r'manifest of .* was edited'):
    ql.load(copy, small)


def test_a_newer_version(copy):
  content = json.loads((copy / 'manifest.json').read_text())
  content['version'] = checkpoint.VERSION + 1
  (copy / 'manifest.json').write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match=r'version=2; .* Upgrade quantlab'):
    ql.load(copy, small)


def test_a_tree_is_no_model(tmp_path, saved):
  io.save_tree(tmp_path / 'tree', {'a': jnp.ones(3)}, {'step': 4})
  with pytest.raises(CheckpointError, match=r"holds 'tree', .*load_tree"):
    ql.load(tmp_path / 'tree', small)
  with pytest.raises(CheckpointError, match=r"holds 'model', .*ql\.load"):
    io.load_tree(saved)
  checkpoint.save_arrays(tmp_path / 'bare', {'a': jnp.ones(3)}, {})
  with pytest.raises(CheckpointError, match=r"'bare arrays'.*load_arrays"):
    ql.load(tmp_path / 'bare', small)


def rewritten(path, saved, change):
  """A checkpoint with other metadata, as a faulty writer would make it."""
  arrays, metadata = checkpoint.load_arrays(saved)
  change(metadata)
  checkpoint.save_arrays(path, arrays, metadata)
  return path


def test_a_plan_that_does_not_fit_is_refused_when_reading(tmp_path, saved):
  def group(m):
    m['plan']['leaves']['layers/0/w']['quantizer']['group'] = 4

  def lacking(m):
    weights = dict(m['tree']['items'])['weights']['items']
    weights[:] = [item for item in weights if item[0] != 'bias']

  def unknown(m):
    m['plan']['leaves']['layers/0/w']['quantizer']['format'] = 'int4.5'

  def strange(m):
    m['tree'] = {'kind': 'hologram'}

  for i, (change, message) in enumerate(
    [
      (group, r"'layers/0/w' has quantizer int4\(group=8\), planned .*group=4"),
      (lacking, "not whole: .*'bias' is missing"),
      (unknown, r'plan in .* cannot be read: .*int4\.5'),
      (strange, 'tree in .* is not restored: .*hologram'),
    ]
  ):
    path = rewritten(tmp_path / str(i), saved, change)
    with pytest.raises(CheckpointError, match=message):
      ql.load(path, small)


def test_a_plan_that_does_not_fit_is_refused_when_writing(tmp_path, model):
  q = model.params['weights']['layers'][0]['w']
  b = model.params['weights']['bias']
  for layer, bias, message in [
    (q.dequantize(), b, "'layers/0/w' is planned as int4.*, found Array"),
    (
      q.astype(jnp.bfloat16),
      b,
      "'layers/0/w' has dtype dtype.bfloat16.*float32",
    ),
    (
      q.slice((0, 0), (16, 8)),
      b,
      r"codes of 'layers/0/w' are uint8\(8, 8\), pl",
    ),
    (q, b[:4], "'bias' has 4 elements, planned 16"),
    (q, Dropped((16,), 'float32'), "'bias' holds no data"),
  ]:
    last = model.params['weights']['layers'][1]
    weights = {'layers': [{'w': layer}, last], 'bias': bias}
    other = dataclasses.replace(
      model, params={**model.params, 'weights': weights}
    )
    with pytest.raises(ValueError, match=message):
      ql.save(tmp_path / 'ck', other)
  bare = dataclasses.replace(model, params=model.params['weights'])
  with pytest.raises(ValueError, match=r"no {'weights', 'sites', 'effective'}"):
    ql.save(tmp_path / 'ck', bare)
  assert not list(tmp_path.iterdir())


def test_another_function_is_refused_at_its_first_call(saved):
  def other(params, x):
    return small(params, x) @ params['layers'][1]['w'].T

  back = ql.load(saved, other)
  with pytest.raises(ValueError, match='the plan does not know: layers/1/w:1'):
    back.apply(back.params, normal(3, 4, 16))


def test_what_is_there_is_not_overwritten_unasked(tmp_path, model, copy):
  before = files.hash_file(copy / 'manifest.json')
  with pytest.raises(
    FileExistsError, match=r'exists already; .* overwrite=True'
  ):
    ql.save(copy, model)
  assert files.hash_file(copy / 'manifest.json') == before
  other = dataclasses.replace(model, report={'note': 'second'})
  ql.save(copy, other, overwrite=True)
  assert ql.load(copy, small).report == {'note': 'second'}


def test_overwrite_replaces_checkpoints_alone(tmp_path, model):
  folder = tmp_path / 'thesis'
  folder.mkdir()
  (folder / 'chapter.tex').write_text('x')
  for taken in (folder, folder / 'chapter.tex'):
    with pytest.raises(FileExistsError, match=r'is not a .*chapter\.tex'):
      ql.save(taken, model, overwrite=True)
  assert (folder / 'chapter.tex').read_text() == 'x'
  (tmp_path / 'empty').mkdir()
  ql.save(tmp_path / 'empty', model, overwrite=True)
  assert ql.load(tmp_path / 'empty', small).nbytes == model.nbytes


def test_a_folder_that_cannot_be_made(tmp_path, model):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(NotADirectoryError, match='file'):
    ql.save(tmp_path / 'file' / 'ck', model)


KILLED = """
import os, signal, sys
import numpy as np
from quantlab import io
from quantlab.runtime import files

# The last thing that is written; the arrays are on the disk by then.
files.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
io.save_tree(sys.argv[1], {'a': np.arange(100)}, overwrite=True)
"""


@pytest.mark.parametrize('before', [False, True])
def test_killed_while_saving(before, tmp_path):
  path = tmp_path / 'ck'
  if before:
    io.save_tree(path, {'a': np.arange(3, dtype=np.int8)})
  code = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(KILLED), str(path)],
    check=False,
    capture_output=True,
  ).returncode
  assert code == -signal.SIGKILL
  left = {p.name for p in tmp_path.iterdir()}
  assert '.ck.partial' in left
  assert (tmp_path / '.ck.partial' / 'arrays').is_dir()
  with pytest.raises(CheckpointError, match=r'not a quantlab .* no manifest'):
    io.load_tree(tmp_path / '.ck.partial')
  if before:  # the old one is whole
    assert io.load_tree(path)[0]['a'].tolist() == [0, 1, 2]
  else:
    with pytest.raises(FileNotFoundError, match='no checkpoint folder'):
      io.load_tree(path)
  io.save_tree(path, {'a': np.arange(4, dtype=np.int8)}, overwrite=before)
  assert io.load_tree(path)[0]['a'].tolist() == [0, 1, 2, 3]
  assert {p.name for p in tmp_path.iterdir()} == {'ck'}


def test_interrupted_while_saving(tmp_path, model, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(files, 'write_json', interrupt)
  with pytest.raises(KeyboardInterrupt):
    ql.save(tmp_path / 'ck', model)
  assert not list(tmp_path.iterdir())


def test_only_models_are_saved(tmp_path, model):
  with pytest.raises(
    TypeError, match=r'what ql\.ptq .* found dict; .*save_tree'
  ):
    ql.save(tmp_path / 'ck', model.params)


def test_prepacked_codes_are_refused(tmp_path):
  q = ql.ptq(
    lambda p, x: x @ p['w'],
    {'w': normal(0, 16, 8)},
    {'w': ql.int4()},
    [normal(1, 2, 16)],
  ).params['weights']['w']
  packed = dataclasses.replace(q, tag='tiled_8x8')
  with pytest.raises(
    ValueError, match=r"'layer/w' .* 'tiled_8x8', for one dev"
  ):
    io.save_tree(tmp_path / 'ck', {'layer': {'w': packed}})


def test_nothing_is_unpickled(saved, model, monkeypatch):
  def refuse(*_, **__):
    raise AssertionError('unpickled')

  for name in ('load', 'loads', 'Unpickler'):
    monkeypatch.setattr(pickle, name, refuse)
  assert ql.load(saved, small).nbytes == model.nbytes
