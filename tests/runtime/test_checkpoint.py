"""Arrays come back as they were; a damaged checkpoint is refused by name."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quantlab.runtime import checkpoint, files

_DTYPES = [
  *('bool', 'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32'),
  *('float16', 'bfloat16', 'float32', 'complex64'),
  *('float8_e4m3fn', 'float8_e5m2', 'float8_e8m0fnu'),
  *('int4', 'uint4', 'int2', 'uint2', 'float4_e2m1fn'),
]


def _arrays():
  rng = np.random.default_rng(0)
  arrays = {
    f'x/{d}': rng.integers(0, 2, (3, 5)).astype(jnp.dtype(d)) for d in _DTYPES
  }
  arrays['scalar'] = np.float32(2.5) * np.ones(())
  arrays['empty'] = np.zeros((0, 4), np.int8)
  arrays['wide'] = np.arange(3.0)  # float64, which JAX would narrow
  arrays['device'] = jnp.linspace(0, 1, 7)
  return arrays


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'ck'
  checkpoint.save_arrays(path, _arrays(), {'note': 'n'})
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'ck'))


def test_every_dtype_returns_bit_for_bit(saved):
  back, metadata = checkpoint.load_arrays(saved)
  assert metadata == {'note': 'n'}
  expected = _arrays()
  assert back.keys() == expected.keys()
  for name, x in expected.items():
    assert back[name].dtype == x.dtype, name
    assert back[name].shape == x.shape, name
    assert np.asarray(back[name]).tobytes() == np.asarray(x).tobytes(), name
  assert isinstance(back['x/int8'], jax.Array)
  assert isinstance(back['wide'], np.ndarray)


def test_manifest_states_sizes_and_is_plain_json(saved):
  content = json.loads((saved / 'manifest.json').read_text())
  for name, x in _arrays().items():
    assert content['arrays'][name]['nbytes'] == np.asarray(x).nbytes
  on_disk = {str(p.relative_to(saved)) for p in saved.rglob('*') if p.is_file()}
  assert on_disk - {'manifest.json'} == set(content['files'])


def test_no_array_at_all(tmp_path):
  checkpoint.save_arrays(tmp_path / 'ck', {}, {'a': 1})
  assert checkpoint.load_arrays(tmp_path / 'ck') == ({}, {'a': 1})


def test_identity_names_the_content_not_the_files(tmp_path):
  x = {'a': np.arange(4, dtype=np.int8)}
  one, two, other = (
    checkpoint.save_arrays(tmp_path / str(i), {'a': x['a'] + d}, {})
    for i, d in enumerate((0, 0, 1))
  )
  assert checkpoint.identity(one) == checkpoint.identity(two)
  assert checkpoint.identity(one) != checkpoint.identity(other)


def _biggest(path):
  return max(
    (p for p in (path / 'arrays').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def test_a_truncated_file_is_named(copy):
  file = _biggest(copy)
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(checkpoint.CheckpointError, match=f'{file.name}.*trunc'):
    checkpoint.load_arrays(copy)


def test_an_edited_file_is_named(copy):
  file = _biggest(copy)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(checkpoint.CheckpointError, match=f'{file.name}.*edited'):
    checkpoint.load_arrays(copy)


def test_a_missing_file_is_named(copy):
  file = _biggest(copy)
  file.unlink()
  with pytest.raises(checkpoint.CheckpointError, match=f'{file.name}.*missing'):
    checkpoint.load_arrays(copy)


def test_an_edited_manifest_is_refused(copy):
  content = json.loads((copy / 'manifest.json').read_text())
  content['metadata']['note'] = 'other'
  (copy / 'manifest.json').write_text(json.dumps(content))
  with pytest.raises(checkpoint.CheckpointError, match=r'manifest .* edited'):
    checkpoint.load_arrays(copy)


def test_a_truncated_manifest_is_refused(copy):
  text = (copy / 'manifest.json').read_text()
  (copy / 'manifest.json').write_text(text[: len(text) // 2])
  with pytest.raises(checkpoint.CheckpointError, match='no readable manifest'):
    checkpoint.load_arrays(copy)


def test_a_foreign_folder_is_refused(tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(b'x')
  with pytest.raises(checkpoint.CheckpointError, match=r'not a .*safet'):
    checkpoint.load_arrays(tmp_path)
  (tmp_path / 'manifest.json').write_text('{"format": "theirs"}')
  with pytest.raises(checkpoint.CheckpointError, match="format='theirs'"):
    checkpoint.load_arrays(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='no checkpoint folder'):
    checkpoint.load_arrays(tmp_path / 'nope')


def test_a_newer_version_asks_for_an_upgrade(copy):
  content = json.loads((copy / 'manifest.json').read_text())
  content['version'] = 2
  content['digest'] = checkpoint._digest(content)
  (copy / 'manifest.json').write_text(json.dumps(content))
  with pytest.raises(checkpoint.CheckpointError, match=r'version=2.*Upgrade'):
    checkpoint.load_arrays(copy)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint, '_describe_files', interrupt)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.save_arrays(tmp_path / 'ck', {'a': np.ones(3)}, {})
  assert os.listdir(tmp_path) == []


def test_a_killed_save_is_not_taken_for_whole(tmp_path):
  partial = files.partial_name(tmp_path / 'ck')
  partial.mkdir()  # what SIGKILL leaves
  with pytest.raises(FileNotFoundError, match='no checkpoint folder'):
    checkpoint.load_arrays(tmp_path / 'ck')


def test_arrays_go_where_they_are_told(saved):
  device = jax.devices()[-1]
  sharding = jax.sharding.SingleDeviceSharding(device)
  back, _ = checkpoint.load_arrays(
    saved, sharding=lambda name, shape: sharding if 'int8' in name else None
  )
  assert back['x/int8'].devices() == {device}
  assert back['x/float32'].devices() == {jax.devices()[0]}


def test_sub_byte_dtypes_are_stored_as_bytes(saved):
  content = checkpoint.read_manifest(saved)
  stored = {d: content['arrays'][f'x/{d}']['stored'] for d in _DTYPES}
  narrow = {d for d in _DTYPES if jnp.dtype(d).kind == 'V' and _bits(d) < 8}
  assert {d for d in _DTYPES if stored[d] != d} == narrow
  assert {stored[d] for d in narrow} == {'uint8'}


def _bits(dtype):
  try:
    return ml_dtypes.iinfo(jnp.dtype(dtype)).bits
  except ValueError:
    return ml_dtypes.finfo(jnp.dtype(dtype)).bits
