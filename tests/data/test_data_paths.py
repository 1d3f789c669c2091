"""The shared folder is optional, and its absence is said plainly."""

import numpy as np
import pytest

from quantlab import data


def test_named_by_the_environment(tmp_path, monkeypatch):
  (tmp_path / 'cifar10').mkdir()
  monkeypatch.setenv('QUANTLAB_DATA', str(tmp_path))
  assert data.shared_dir() == tmp_path
  assert data.require('cifar10') == tmp_path / 'cifar10'
  with pytest.raises(FileNotFoundError, match=r"'mnist' in it; found: cifar10"):
    data.require('mnist')


def test_absent_folder_names_the_variable(monkeypatch):
  monkeypatch.setenv('QUANTLAB_DATA', '')
  assert data.shared_dir() is None
  with pytest.raises(FileNotFoundError, match='variable QUANTLAB_DATA'):
    data.require('mnist/test.npz')
  with pytest.raises(FileNotFoundError, match='variable QUANTLAB_DATA'):
    data.load_set('mnist', 'test')


def test_a_misspelt_path_is_no_absence(tmp_path, monkeypatch):
  monkeypatch.setenv('QUANTLAB_DATA', str(tmp_path / 'dtaa'))
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    data.shared_dir()


def test_unset_looks_beside_the_checkout(monkeypatch):
  monkeypatch.delenv('QUANTLAB_DATA', raising=False)
  found = data.shared_dir()
  assert found is None or found.parts[-2:] == ('shared', 'data')


def test_cache_dir_can_be_moved(tmp_path, monkeypatch):
  monkeypatch.setenv('QUANTLAB_CACHE', str(tmp_path))
  assert data.cache_dir() == tmp_path
  monkeypatch.delenv('QUANTLAB_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'x'))
  assert data.cache_dir() == tmp_path / 'x' / 'quantlab'


def test_unknown_sets_and_splits_are_named():
  with pytest.raises(ValueError, match="Did you mean 'cifar10'"):
    data.load_set('cifar', 'test')
  with pytest.raises(ValueError, match='it has: test, train'):
    data.load_set('mnist', 'dev')


def test_digits_are_split_without_overlap():
  split = data.digits()
  assert split.train_x.shape == (1297, 8, 8, 1)
  assert split.test_x.shape == (500, 8, 8, 1)
  assert split.train_x.dtype == np.uint8
  assert split.train_x.max() == 16
  assert set(split.test_y) == set(range(10))
  # Together they are the set that scikit-learn ships, each image once.
  from sklearn.datasets import load_digits

  ours = np.concatenate([split.train_x, split.test_x]).reshape(1797, 64)
  stored = load_digits().data
  np.testing.assert_array_equal(
    ours[np.lexsort(ours.T)], stored[np.lexsort(stored.T)]
  )


def test_digits_cannot_be_written_to():
  with pytest.raises(ValueError, match='read-only'):
    data.digits().train_x[0] = 0
