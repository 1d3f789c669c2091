"""Two processes with one device each do what one process does."""

import json
import pathlib
import re

import jax
import numpy as np
import pairs
import pytest
from ptq import spread

import quantlab as ql
from quantlab.runtime import checkpoint

pytestmark = pytest.mark.as_for_users

WORKER = pathlib.Path(__file__).with_name('worker.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What two workers left behind."""
  folder = tmp_path_factory.mktemp('processes')
  pairs.run(
    lambda port, index, folder: [WORKER, str(index), str(port), folder], folder
  )
  return folder


def arrays(path):
  with np.load(path) as found:
    return [found[f'arr_{i}'] for i in range(len(found))]


def test_the_model_is_that_of_one_process(folder):
  """Codes equal; ranges but for the last bit, by the order of sums."""
  apply, params, batches = spread.setup()
  one = ql.ptq(apply, params, spread.RECIPE, batches, ql.gptq())
  two = arrays(folder / 'whole0.npz')
  leaves = jax.tree.leaves(one.params)
  assert len(leaves) == len(two) == 11
  for a, b in zip(leaves, two, strict=True):
    assert a.dtype == b.dtype
    if a.dtype == np.float32:
      np.testing.assert_allclose(a, b, rtol=1e-6)
    else:
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('other', ['whole1', 'resumed0', 'resumed1'])
def test_both_have_it_also_after_a_stop(folder, other):
  """Bit for bit."""
  for a, b in zip(
    arrays(folder / 'whole0.npz'), arrays(folder / f'{other}.npz'), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_the_first_process_writes(folder):
  """The second adds its parts of spread arrays, inside orbax's folder."""
  first, second = (
    (folder / f'written{i}.txt').read_text().splitlines() for i in range(2)
  )
  assert {'walk/walk.json', 'walk/blocks/00000', 'walk/blocks/00001'} <= {
    *first
  }
  assert 'model' in first
  own = re.compile(r'.*\.partial/arrays[^/]*/(.*/)?[^/]*process_1(/.*)?')
  assert second
  for name in second:
    assert own.fullmatch(name), name


def test_both_know_the_files_of_what_they_saved(folder):
  """The manifest is written when all have listed the others."""
  first, second = (
    json.loads((folder / f'manifest{i}.json').read_text()) for i in range(2)
  )
  assert first == second
  assert first == checkpoint.read_manifest(folder / 'model')


def test_one_process_reads_what_two_wrote(folder):
  apply, _, [x, _] = spread.setup()
  model = ql.load(folder / 'model', apply)
  for a, b in zip(
    jax.tree.leaves(model.params), arrays(folder / 'whole0.npz'), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert np.isfinite(model.apply(model.params, x)).all()
