"""The kernels are tested under strict dtype promotion."""

import jax
import pytest

from quantlab_kernels import int_dot
from quantlab_kernels.cpu import library


@pytest.fixture(autouse=True)
def strict_promotion():
  """Operations say which dtype they mean, so that none widens silently."""
  with jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture
def cpu_kernels(monkeypatch):
  """The C++ kernels, as in a program that sees one device."""
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)
  if why := library.unavailable():
    pytest.skip(why)


@pytest.fixture(params=library.ISAS)
def isa(request, monkeypatch):
  """Every instruction set this machine has."""
  monkeypatch.setenv('QUANTLAB_CPU_ISA', request.param)
  if why := library.unavailable():
    pytest.skip(why)
  return request.param
