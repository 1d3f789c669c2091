"""The folder of real models and data, for the tests that need it."""

import importlib.util

import pytest

from quantlab import data


@pytest.fixture
def shared():
  """The folder; the test is skipped where there is none."""
  root = data.shared_dir()
  if root is None:
    pytest.skip('no folder of real models and data (QUANTLAB_DATA)')
  return root


@pytest.fixture
def published(shared):
  """`published('cifar10')`: the module eval.py that came with the data."""

  def load(folder):
    path = shared / folder / 'eval.py'
    spec = importlib.util.spec_from_file_location(f'{folder}_eval', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load


@pytest.fixture(scope='session')
def prepared_sets(tmp_path_factory):
  """One place for prepared sets, so that each is prepared once a session."""
  return str(tmp_path_factory.mktemp('prepared'))
