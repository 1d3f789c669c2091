"""Notebooks executed away from the checkout."""

import importlib.util
import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'colab'


@pytest.fixture(scope='session')
def execute(tmp_path_factory):
  """`execute(name)`: the committed notebook with its outputs."""

  def run(name):
    made = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    away = str(tmp_path_factory.mktemp('notebook'))
    client = nbclient.NotebookClient(
      made,
      timeout=300,
      kernel_name='python3',
      resources={'metadata': {'path': away}},
    )
    return client.execute()

  return run


@pytest.fixture(scope='session')
def generated():
  """`generated(name)`: what its source gives."""
  spec = importlib.util.spec_from_file_location(
    'generate', FOLDER / 'generate.py'
  )
  generate = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(generate)
  return lambda name: generate.notebook(FOLDER / f'{name}.py')


@pytest.fixture(scope='session')
def printed():
  """`printed(notebook)`: all text that its cells print."""

  def text(notebook):
    return ''.join(
      output.text
      for cell in notebook.cells
      for output in cell.get('outputs', [])
      if output.output_type == 'stream' and output.name == 'stdout'
    )

  return text


@pytest.fixture(scope='session')
def pictures():
  """`pictures(notebook)`: all that its cells draw."""

  def drawn(notebook):
    return [
      output
      for cell in notebook.cells
      for output in cell.get('outputs', [])
      if 'image/png' in output.get('data', {})
    ]

  return drawn
