"""Rules of the house that no linter knows."""

import ast
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = [
  *ROOT.glob('quantlab/**/*.py'),
  *ROOT.glob('kernels/**/*.py'),
  *ROOT.glob('experiments/**/*.py'),
  *ROOT.glob('configs/**/*.py'),
]


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module or ''
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _attributes(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute):
      yield ast.unparse(node)


def test_two_modules_touch_the_internals_of_jax():
  inside = ('jax._src', 'jax.extend', 'jax.core', 'jax.interpreters')
  found = {
    str(path.relative_to(ROOT))
    for path in SHIPPED
    for name in (*_imports(path), *_attributes(path))
    if name.startswith(inside)
  }
  # The kernels stand alone: they have one of their own.
  assert found == {'quantlab/graph/_jaxpr.py', 'kernels/whole.py'}


def test_nothing_is_unpickled():
  for path in SHIPPED:
    names = {name.split('.')[0] for name in _imports(path)}
    assert not names & {'pickle', 'cloudpickle', 'dill', 'shelve'}, path
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
        assert ast.literal_eval(node.value) is False, path


def test_packages_define_nothing_in_their_face():
  for path in SHIPPED:
    if path.name == '__init__.py':
      kinds = {type(n) for n in ast.parse(path.read_text()).body}
      assert not kinds & {ast.FunctionDef, ast.ClassDef}, path


def test_files_stay_readable():
  for path in (*SHIPPED, *ROOT.glob('tests/**/*.py')):
    assert len(path.read_text().splitlines()) <= 600, path


@pytest.mark.parametrize('package', ['quantlab', 'quantlab_kernels'])
def test_wheel_holds_both_packages(package, tmp_path_factory):
  folder = tmp_path_factory.getbasetemp() / 'wheel'
  if not folder.exists():
    subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps']
      + ['--wheel-dir', str(folder), str(ROOT)],
      check=True,
      capture_output=True,
    )
    [wheel] = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'site')
  code = f'import {package}; print({package}.__file__)'
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=folder,
    env={'PYTHONPATH': str(folder / 'site'), 'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip().startswith(str(folder / 'site'))
  assert not (folder / 'site' / 'tests').exists()
  assert not (folder / 'site' / 'experiments').exists()
