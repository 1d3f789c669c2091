"""The public rotation: checks and dispatch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from quantlab_kernels import registry
from quantlab_kernels.quantize_activation import quantize_activation

_OP = registry.Op('hadamard')

Quantized = tuple[
  Int8[Array, '*b k'], Float[Array, '*b 1'], Int32[Array, '*b 1'] | None
]


def hadamard(
  x: Float[Array, '*b k'],
  factors: Sequence[jax.typing.ArrayLike] | None = None,
  *,
  bits: int | None = None,
  symmetric: bool = True,
  narrow: bool = False,
  implementation: str | None = None,
) -> Float[Array, '*b k'] | Quantized:
  """Rotates the last axis, in blocks: x (I kron A kron B kron ...).

  Args:
    x: floating activations, shape (..., K).
    factors: square matrices whose sizes multiply to a divisor of K; of sizes a
      and b they cost a + b products a channel instead of a b. None is the
      orthonormal Walsh-Hadamard transform (Sylvester's order) of the largest
      power of two that divides K.
    bits: also quantize the rows of what comes out, to so many bits; see
      `quantize_activation`.
    symmetric: of the quantizer.
    narrow: of the quantizer.
    implementation: None for the preferred one, or its name.

  Returns:
    The rotated x, computed in float32 and given in its dtype; with `bits` what
    `quantize_activation` returns for it, per row.

  References:
    QuaRot, arXiv:2404.00456, section 3.
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
    raise TypeError(
      'hadamard takes a floating array of one axis or more, found '
      f'{x.dtype} of shape {x.shape}'
    )
  k = x.shape[-1]
  if factors is None:
    factors = walsh(k & -k)
  matrices = [jnp.asarray(f, jnp.float32) for f in factors]
  if any(f.ndim != 2 or f.shape[0] != f.shape[1] for f in matrices):
    raise ValueError(
      'factors must be square matrices, found shapes '
      f'{[f.shape for f in matrices]}'
    )
  sizes = [f.shape[0] for f in matrices]
  if math.prod(sizes) == 0 or k % math.prod(sizes):
    raise ValueError(f'rotations of sizes {sizes} do not divide {k} channels')
  y = _OP(implementation, x.astype(jnp.float32), *matrices)
  if bits is None:
    return y.astype(x.dtype)
  return quantize_activation(y, bits=bits, symmetric=symmetric, narrow=narrow)


def walsh(n: int) -> list[jax.Array]:
  """Factors of the orthonormal Walsh-Hadamard matrix of a power of two.

  Of at most 64 rows: larger ones are products of smaller, at fewer operations.
  """
  pair = jnp.asarray([[1.0, 1.0], [1.0, -1.0]], jnp.float32) / math.sqrt(2)
  found, left = [], max(n, 1).bit_length() - 1
  while left:
    matrix = jnp.ones((1, 1), jnp.float32)
    for _ in range(min(left, 6)):
      matrix = jnp.kron(matrix, pair)
    found.append(matrix)
    left -= min(left, 6)
  return found
