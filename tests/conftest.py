"""Eight host devices, so that sharding is tested everywhere."""

import os

import pytest

_FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """What one module compiled is not carried, and searched, by the others."""
  yield
  import jax  # after XLA_FLAGS are set

  jax.clear_caches()
