"""The definition of hadamard: one product with the whole matrix."""

import functools

import jax.numpy as jnp
from jax import lax

from quantlab_kernels.registry import is_definition as route  # noqa: F401
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def run(x, *factors):
  """Returns x (I kron A kron B ...), of the shape of x."""
  whole = functools.reduce(jnp.kron, factors, jnp.ones((1, 1), x.dtype))
  n = len(whole)
  blocks = x.reshape(*x.shape[:-1], x.shape[-1] // n, n)
  y = jnp.matmul(blocks, whole, precision=lax.Precision.HIGHEST)
  return y.reshape(x.shape)
