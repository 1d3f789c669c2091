"""The notebook runs from top to bottom, and keeps what it promises."""

import importlib.util
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'colab'


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
  """All text that the cells of the committed notebook print."""
  made = nbformat.read(FOLDER / 'mixed_precision.ipynb', as_version=4)
  away = str(tmp_path_factory.mktemp('notebook'))
  client = nbclient.NotebookClient(
    made,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': away}},
  )
  cells = client.execute().cells
  return ''.join(
    output.text
    for cell in cells
    for output in cell.get('outputs', [])
    if output.output_type == 'stream' and output.name == 'stdout'
  )


def test_is_what_its_source_gives():
  spec = importlib.util.spec_from_file_location(
    'generate', FOLDER / 'generate.py'
  )
  generate = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(generate)
  committed = nbformat.read(FOLDER / 'mixed_precision.ipynb', as_version=4)
  made = generate.notebook(FOLDER / 'mixed_precision.py')
  assert committed == made, 'run: python colab/generate.py'


def test_choices_hold_their_budgets_and_beat_random(printed):
  sizes = [int(n) for n in re.findall(r'(\d+) bytes', printed)]
  assert len(sizes) == 4
  assert max(sizes) == sizes[0]  # none is larger than the uniform one
  assert printed.count('as promised: True') == 4
  kl = dict(re.findall(r'(\w+) +accuracy [\d.]+  KL ([\d.]+)', printed))
  assert float(kl['kl']) < float(kl['random'])
