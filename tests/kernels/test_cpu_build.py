"""The compiled kernels: one build, kept privately, repaired, or refused."""

import os
import stat
import subprocess
import sys
import textwrap
import warnings

import pytest

from quantlab_kernels.cpu import build, library

pytestmark = pytest.mark.usefixtures('cpu_kernels')

# A compiler that writes what takes no time to write, and counts its calls.
FAKE = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0"; exit 0; fi
echo call >> {log}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
sleep 0.2
echo "made by $$" > "$out"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty folder of compiled kernels."""
  folder = tmp_path / 'cache'
  monkeypatch.setenv('QUANTLAB_CACHE', str(folder))
  return folder


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A stand-in for the compiler; returns a function counting its calls."""
  log = tmp_path / 'log'
  log.touch()
  path = tmp_path / 'c++'
  path.write_text(FAKE.format(log=log))
  path.chmod(0o700)
  monkeypatch.setenv('CXX', str(path))
  build.compiler.cache_clear()
  yield lambda: len(log.read_text().splitlines())
  build.compiler.cache_clear()


ONE_BUILD = len(build.OBJECTS) + 1


def test_it_is_built_once_and_kept_privately(cache, fake):
  path = build.build()
  assert path.parent == cache
  assert build.intact(path)
  assert stat.S_IMODE(cache.stat().st_mode) == 0o700
  assert build.build() == path
  assert fake() == ONE_BUILD
  assert not [p for p in cache.iterdir() if p.name.startswith('build-')]


@pytest.mark.parametrize(
  'damage', ['changed', 'cut', 'no digest', 'bad digest']
)
def test_a_damaged_file_is_built_again(damage, cache, fake):
  path = build.build()
  if damage == 'changed':
    path.write_bytes(b'x' + path.read_bytes()[1:])
  elif damage == 'cut':
    path.write_bytes(b'')
  elif damage == 'bad digest':
    path.with_suffix('.sha256').write_bytes(b'\xff\xfe')
  else:
    path.with_suffix('.sha256').unlink()
  assert not build.intact(path)
  assert build.intact(build.build())
  assert fake() == 2 * ONE_BUILD


def test_the_name_follows_what_it_depends_on(cache, fake, monkeypatch):
  before = build.key()
  monkeypatch.setattr(build, 'FLAGS', (*build.FLAGS, '-g'))
  assert build.key() != before
  monkeypatch.undo()
  assert len(before) == 32


def test_two_processes_build_it_once(cache, fake):
  program = 'from quantlab_kernels.cpu import build; print(build.build())'
  running = [
    subprocess.Popen(
      [sys.executable, '-c', program], stdout=subprocess.PIPE, text=True
    )
    for _ in range(2)
  ]
  paths = {p.communicate(timeout=120)[0].strip() for p in running}
  assert len(paths) == 1
  assert fake() == ONE_BUILD


def test_a_folder_that_cannot_be_written(cache, fake, monkeypatch):
  monkeypatch.setattr(build, '_lock', _read_only)
  with pytest.warns(UserWarning, match='compiled for this process alone'):
    path = build.build()
  assert path.parent != cache
  assert build.intact(path)


def test_a_library_in_a_folder_that_cannot_be_written_is_used(
  cache, fake, monkeypatch
):
  path = build.build()
  monkeypatch.setattr(build, '_lock', _read_only)
  assert build.build() == path
  assert fake() == ONE_BUILD


def _read_only(path):
  raise PermissionError(30, 'Read-only file system', str(path))


def test_a_folder_that_others_can_write_is_not_trusted(cache, fake):
  cache.mkdir()
  cache.chmod(0o777)
  with pytest.warns(UserWarning, match='can be written by others'):
    assert build.build().parent != cache


def test_a_failing_compiler_says_why(cache, tmp_path, monkeypatch):
  path = tmp_path / 'c++'
  path.write_text(
    '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\n'
    'echo unknown flag; exit 1\n'
  )
  path.chmod(0o700)
  monkeypatch.setenv('CXX', str(path))
  build.compiler.cache_clear()
  with pytest.raises(build.BuildError, match='unknown flag'):
    build.build()
  build.compiler.cache_clear()
  assert not list(cache.glob('*.so'))


def test_the_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
  monkeypatch.delenv('QUANTLAB_CACHE', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert build.folder() == tmp_path / 'quantlab'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert build.folder() == tmp_path / '.cache' / 'quantlab'


def test_another_machine_is_refused(monkeypatch):
  monkeypatch.setattr(build.platform, 'machine', lambda: 'aarch64')
  assert 'this machine is aarch64' in library.unavailable()


NO_COMPILER = """
import warnings, numpy as np, jax
import quantlab_kernels as qk
x, w = np.ones((2, 8), np.int8), np.ones((8, 3), np.int8)
with warnings.catch_warnings(record=True) as found:
  warnings.simplefilter('always')
  for _ in range(3):
    np.testing.assert_array_equal(qk.int8_matmul(x, w), np.full((2, 3), 8))
texts = [str(f.message) for f in found if 'quantlab' in str(f.message)]
assert len(texts) == 1, texts
assert 'no C++ compiler (CXX=nothing)' in texts[0], texts
(choice,) = qk.choices(qk.int8_matmul, x, w)
assert choice.implementation == 'xla'
"""

REBUILT = """
import hashlib, os, shutil
from quantlab_kernels.cpu import build, library

def copied(path):
  shutil.copy(os.environ['MADE'], path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  path.with_suffix('.sha256').write_text(digest)

build._compile = copied
path = build.folder() / f'cpu-{build.key()}.so'
path.parent.mkdir(mode=0o700)
path.write_bytes(b'no library')
digest = hashlib.sha256(b'no library').hexdigest()
path.with_suffix('.sha256').write_text(digest)
assert library.unavailable() is None
assert library.isa() in library.ISAS
assert path.stat().st_size > 10000
"""


def _python(program, **environment):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program)],
    env=env | environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_compiler_xla_serves_after_one_warning(tmp_path):
  _python(NO_COMPILER, CXX='nothing', QUANTLAB_CACHE=str(tmp_path / 'c'))


def test_a_library_that_does_not_load_is_built_again(tmp_path):
  made = build.build()  # what the compiler would make
  _python(REBUILT, QUANTLAB_CACHE=str(tmp_path / 'c'), MADE=str(made))


def test_no_warning_where_it_is_built():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert library.unavailable() is None
