"""Eight host devices, so that sharding is tested everywhere; one compilation
of each program.
"""

import os
import shutil
import tempfile

import pytest

_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

# Four fifths of the suite's time are XLA's compiler, and a good part of that
# for programs that another module, the other worker, or a process that a test
# started has compiled before. All of one run share a new folder, made by the
# first of them. JAX does not write entries atomically, which costs a warning:
# an entry that is read before it is whole does not decompress, is compiled.
_FIRST = 'QUANTLAB_PROGRAMS' not in os.environ
if _FIRST:
  _FOLDER = tempfile.mkdtemp(prefix='quantlab-programs-')
  os.environ['QUANTLAB_PROGRAMS'] = _FOLDER
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _FOLDER
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'
# Otherwise the name of the folder is a part of every key.
os.environ['JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES'] = 'none'


def pytest_unconfigure():
  """The cache is of this run alone."""
  if _FIRST:
    shutil.rmtree(_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """What one module compiled is not carried, and searched, by the others."""
  yield
  import jax  # after the environment is set

  jax.clear_caches()


@pytest.fixture(scope='module')
def compiled_quickly():
  """LLVM at level 0, which halves the time of a compilation.

  For modules that say nothing of the last bit or of time: launchers, margins
  of methods, refusals. What has to be equal bit for bit is tested as compiled
  for users.
  """
  import jax

  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
