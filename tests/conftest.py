"""Eight host devices, so that sharding is tested everywhere; one compilation
of each program.
"""

import gc
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

# Traces are many small objects that live long: looking through them for cycles
# as often as Python does takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)


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


# Folders of arithmetic that is right to the last bit as users compile it.
# The others are of launchers, margins of methods, refusals; their modules where
# the last bit depends on fusions are marked `as_for_users`.
_AS_FOR_USERS = ('core', 'formats', 'kernels')


@pytest.fixture(autouse=True, scope='module')
def compiled_quickly(request):
  """LLVM at level 0, and a kernel for each operation in place of fusions of
  them: a third of the time of a compilation. In processes started too.
  """
  marked = request.node.get_closest_marker('as_for_users')
  if marked or request.path.parent.name in _AS_FOR_USERS:
    yield
    return
  import jax
  from jax._src import compiler

  options = compiler.get_compile_options
  options(1, 1)  # XLA reads its flags once: those of this process stay

  def without_fusions(*args, **kwargs):
    made = options(*args, **kwargs)
    made.env_option_overrides = [
      *made.env_option_overrides,
      ('xla_cpu_use_fusion_emitters', False),
    ]
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    if jax.__version_info__ < (0, 11):  # the option is gone after that
      # JAX has no setting of XLA's options for all programs of a while.
      patch.setattr(compiler, 'get_compile_options', without_fusions)
      flags = os.environ['XLA_FLAGS']
      patch.setenv('XLA_FLAGS', f'{flags} --xla_cpu_use_fusion_emitters=false')
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)
