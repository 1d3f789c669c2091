"""The kernels are tested under strict dtype promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
  """Operations say which dtype they mean, so that none widens silently."""
  with jax.numpy_dtype_promotion('strict'):
    yield
