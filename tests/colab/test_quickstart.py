"""The notebook runs from top to bottom, and is what its source gives."""

import ast
import pathlib
import re

import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'colab'


@pytest.fixture(scope='module')
def executed(execute):
  return execute('quickstart')


def test_is_what_its_source_gives(generated):
  committed = nbformat.read(FOLDER / 'quickstart.ipynb', as_version=4)
  made = generated('quickstart')
  assert committed == made, 'run: python colab/generate.py'
  assert sum(cell.cell_type == 'code' for cell in made.cells) > 5


def test_runs_and_shows_what_it_says(executed, printed, pictures):
  text = printed(executed)
  assert 'params/block_0/query/kernel' in text  # the plan
  assert 'bits per weight' in text
  assert 'the same: True' in text  # saved and loaded
  assert len(pictures(executed)) == 1


def test_accuracies_are_those_of_models_that_work(executed, printed):
  """Chance is 0.1."""
  found = re.findall(r'accuracy ([\d.]+)', printed(executed))
  assert len(found) == 2
  assert min(map(float, found)) > 0.9


def test_own_model_takes_five_lines():
  """As its text says."""
  cells = nbformat.read(FOLDER / 'quickstart.ipynb', as_version=4).cells
  [index] = [
    i for i, c in enumerate(cells) if c.source.startswith('Five lines ')
  ]
  assert len(ast.parse(cells[index + 1].source).body) == 5
  assert len(cells[index + 1].source.splitlines()) == 5
