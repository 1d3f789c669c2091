"""Sets on disk: the rows as they are stored, and never a stale or half copy."""

import subprocess
import sys

import numpy as np
import pytest

from quantlab import data
from quantlab.data import builder


@pytest.fixture
def arrays():
  rng = np.random.RandomState(0)
  return {
    'x': rng.randint(0, 256, (20, 4, 3)).astype(np.uint8),
    'y': rng.randint(0, 10, 20).astype(np.int32),
    'score': rng.rand(20).astype(np.float32),
    'ids': rng.randint(0, 30000, (20, 7)).astype(np.uint16),
  }


def prepared(home):
  """Folders that hold a whole prepared copy."""
  return {path.parent for path in home.rglob('dataset_info.json')}


def test_rows_come_back_in_order_with_their_dtypes(tmp_path, arrays):
  file = tmp_path / 'set.npz'
  np.savez(file, **arrays)
  source = data.data_source(
    'small', {'train': file}, 'train', data_dir=tmp_path / 'tfds'
  )
  batches = data.Batches(source, 8, fields=tuple(arrays))
  for i, key in enumerate(arrays):
    column = np.concatenate([batch[i] for batch in batches])
    np.testing.assert_array_equal(column, arrays[key])
    assert column.dtype == arrays[key].dtype


def test_slices_of_a_split(tmp_path, arrays):
  def rows(split):
    source = data.data_source(
      'small', {'a': arrays, 'b': arrays}, split, data_dir=tmp_path
    )
    return [int(record['y']) for record in source]

  assert rows('a[:50%]') == list(arrays['y'][:10])
  assert rows('b[5:8]') == list(arrays['y'][5:8])


def test_prepares_once_and_again_when_the_source_changes(tmp_path, arrays):
  home = tmp_path / 'tfds'
  file = tmp_path / 'set.npz'

  def first():
    source = data.data_source('small', {'t': file}, 't', data_dir=home)
    return int(source[0]['y'])

  np.savez(file, y=arrays['y'])
  assert first() == arrays['y'][0]
  (copy,) = prepared(home)
  stamp = (copy / 'dataset_info.json').stat().st_mtime_ns
  assert first() == arrays['y'][0]
  assert (copy / 'dataset_info.json').stat().st_mtime_ns == stamp
  np.savez(file, y=arrays['y'] + 1)
  assert first() == arrays['y'][0] + 1
  assert len(prepared(home)) == 2


@pytest.mark.parametrize(
  'other',
  [
    {'t': {'x': np.arange(6, dtype=np.int32)}},
    {'t': {'x': np.arange(6).reshape(2, 3)}},
    {'t': {'y': np.arange(6)}},
    {'u': {'x': np.arange(6)}},
    {'t': {'x': np.arange(6) + 1}},
  ],
)
def test_fingerprint_sees_values_dtypes_shapes_and_names(other):
  base = {'t': {'x': np.arange(6)}}
  assert builder.fingerprint(base) == builder.fingerprint(
    {'t': {'x': np.arange(6)}}
  )
  assert builder.fingerprint(base) != builder.fingerprint(other)


class Interrupted(np.ndarray):
  """Rows whose fourth is where the user presses Ctrl-C."""

  def __getitem__(self, i):
    if isinstance(i, int) and i == 3:
      raise KeyboardInterrupt
    return super().__getitem__(i)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, arrays):
  home = tmp_path / 'tfds'
  file = tmp_path / 'set.npz'
  np.savez(file, x=arrays['x'])
  stop = True

  def read(path):
    x = data.load_npz(path)['x']
    return {'x': x.view(Interrupted) if stop else x}

  def source():
    return data.data_source('small', {'t': file}, 't', data_dir=home, read=read)

  with pytest.raises(KeyboardInterrupt):
    source()
  assert not prepared(home)
  assert not list(home.rglob('*array_record*'))
  stop = False
  assert len(source()) == 20


def overtaken(monkeypatch, make, before):
  """Lets `before` run when the first builder prepares, which then fails."""
  first = make()

  def download_and_prepare():
    before()
    raise OSError('Directory not empty')

  monkeypatch.setattr(first, 'download_and_prepare', download_and_prepare)
  builders = iter([first])
  return builder.prepared(lambda: next(builders, None) or make())


def test_another_process_may_finish_first(tmp_path, arrays, monkeypatch):
  def make():
    return data.npz_builder('small', {'t': arrays}, data_dir=tmp_path)

  late = overtaken(monkeypatch, make, lambda: make().download_and_prepare())
  assert len(late.as_data_source(split='t')) == 20


def test_a_failure_to_write_is_not_swallowed(tmp_path, arrays, monkeypatch):
  def make():
    return data.npz_builder('small', {'t': arrays}, data_dir=tmp_path)

  with pytest.raises(OSError, match='not empty'):
    overtaken(monkeypatch, make, lambda: None)


def test_a_damaged_copy_is_refused(tmp_path, arrays):
  splits = {'t': {'x': arrays['x']}}
  data.data_source('small', splits, 't', data_dir=tmp_path)
  (copy,) = prepared(tmp_path)
  (copy / 'dataset_info.json').unlink()
  with pytest.raises(ValueError, match=r'damaged.*Delete that folder'):
    data.data_source('small', splits, 't', data_dir=tmp_path)


@pytest.mark.parametrize(
  ('splits', 'split', 'message'),
  [
    ({}, 't', "no split 't'"),
    ({'t': {'x': np.arange(3)}}, 'test[:5]', "no split 'test'; it has: t"),
    ({'t': {'x': np.arange(3), 'y': np.arange(2)}}, 't', 'one leading length'),
    ({'t': {'x': np.zeros((0, 2))}}, 't', 'at least 1'),
    ({'t': {}}, 't', 'one leading length'),
    (
      {'t': {'x': np.zeros((2, 3))}, 'u': {'x': np.zeros((2, 4))}},
      'u',
      r"'x' has rows of \(3,\) in the first split, and \(4,\) in 'u'",
    ),
  ],
)
def test_refuses_what_makes_no_examples(tmp_path, splits, split, message):
  with pytest.raises(ValueError, match=message):
    data.data_source('small', splits, split, data_dir=tmp_path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"'t' of 'small'.*gone\.npz"):
    data.npz_builder('small', {'t': tmp_path / 'gone.npz'}, data_dir=tmp_path)


def test_pickled_and_truncated_files_are_refused(tmp_path):
  pickled = tmp_path / 'pickled.npz'
  np.savez(pickled, x=np.array([{}, None], object))
  with pytest.raises(ValueError, match='cannot be read'):
    data.load_npz(pickled)
  cut = tmp_path / 'cut.npz'
  np.savez(cut, x=np.arange(1000))
  cut.write_bytes(cut.read_bytes()[:700])
  with pytest.raises(ValueError, match='cannot be read'):
    data.load_npz(cut)
  single = tmp_path / 'single.npz'
  with single.open('wb') as file:
    np.save(file, np.arange(3))
  with pytest.raises(ValueError, match='a single array'):
    data.load_npz(single)
  with pytest.raises(FileNotFoundError, match='no such npz'):
    data.load_npz(tmp_path / 'none.npz')


def test_no_tensorflow_is_imported(tmp_path):
  program = (
    'import sys, numpy as np\n'
    'from quantlab import data\n'
    "source = data.data_source('s', {'t': {'x': np.arange(4)}}, 't',"
    f' data_dir={str(tmp_path)!r})\n'
    "assert len(list(data.Batches(source, 2, fields=('x',)))) == 2\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
