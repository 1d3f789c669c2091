"""The notebook runs from top to bottom, and is what its source gives."""

import ast
import importlib.util
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'colab'


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """The committed notebook with its outputs; away from the checkout."""
  made = nbformat.read(FOLDER / 'quickstart.ipynb', as_version=4)
  away = str(tmp_path_factory.mktemp('notebook'))
  client = nbclient.NotebookClient(
    made,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': away}},
  )
  return client.execute()


def printed(notebook):
  """All text that its cells print."""
  return ''.join(
    output.text
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if output.output_type == 'stream' and output.name == 'stdout'
  )


def pictures(notebook):
  return [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if 'image/png' in output.get('data', {})
  ]


def test_is_what_its_source_gives():
  spec = importlib.util.spec_from_file_location(
    'generate', FOLDER / 'generate.py'
  )
  generate = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(generate)
  committed = nbformat.read(FOLDER / 'quickstart.ipynb', as_version=4)
  made = generate.notebook(FOLDER / 'quickstart.py')
  assert committed == made, 'run: python colab/generate.py'
  assert sum(cell.cell_type == 'code' for cell in made.cells) > 5


def test_runs_and_shows_what_it_says(executed):
  text = printed(executed)
  assert 'params/block_0/query/kernel' in text  # the plan
  assert 'bits per weight' in text
  assert 'the same: True' in text  # saved and loaded
  assert len(pictures(executed)) == 1


def test_accuracies_are_those_of_models_that_work(executed):
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
