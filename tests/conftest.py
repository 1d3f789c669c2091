"""Eight host devices, so that sharding is tested everywhere; one compilation
of each program.
"""

import os
import shutil
import tempfile

import pytest

_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

# Four fifths of the suite's time are XLA's compiler, and a third of that for
# programs that another module, or a process that a test started, has compiled
# before. Each worker has its own cache: JAX does not write entries atomically.
_CACHE = tempfile.mkdtemp(prefix='quantlab-programs-')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'


def pytest_unconfigure():
  """The cache is of this run alone."""
  shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """What one module compiled is not carried, and searched, by the others."""
  yield
  import jax  # after the environment is set

  jax.clear_caches()
