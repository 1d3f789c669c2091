"""Makes the notebooks of this folder from their sources in py:percent.

python colab/generate.py
"""

import pathlib

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parent


def notebook(source: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook of a source, without outputs; the same every time."""
  made = jupytext.read(source, fmt='py:percent')
  made.metadata = nbformat.from_dict(
    {
      'kernelspec': {
        'display_name': 'Python 3',
        'language': 'python',
        'name': 'python3',
      },
      'language_info': {'name': 'python'},
    }
  )
  for number, cell in enumerate(made.cells):
    cell.id = f'cell-{number}'  # else a random one each time
  nbformat.validate(made)
  return made


if __name__ == '__main__':
  for name in ('quickstart', 'bitnet', 'mixed_precision'):
    nbformat.write(notebook(FOLDER / f'{name}.py'), FOLDER / f'{name}.ipynb')
