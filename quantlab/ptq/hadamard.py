"""Orthogonal matrices that spread any one channel over all of them.

Sylvester's Hadamard matrices for powers of two, random orthogonal ones for odd
parts, their Kronecker product for what is both (QuaRot, arXiv 2404.00456,
section 3). Made in float64 on the host; the same key gives the same matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from quantlab.core.rng import fold_in_name

# Larger powers of two are products of smaller ones: fewer operations.
LARGEST = 64
# Random matrices of an odd size, of which the flattest is taken.
DRAWS = 32


def generator(key: jax.Array, name: str) -> np.random.Generator:
  """A generator on the host, of a key and a name."""
  words = jax.random.bits(fold_in_name(key, name), (4,))
  return np.random.default_rng(np.asarray(words).tolist())


def sizes(channels: int) -> tuple[int, ...]:
  """Sizes of the Kronecker factors of a rotation: powers of two, odd parts."""
  odd = channels
  power = 0
  while odd % 2 == 0:
    odd, power = odd // 2, power + 1
  most = LARGEST.bit_length() - 1
  count = -(-power // most)
  twos = [2 ** (power // count + (i < power % count)) for i in range(count)]
  return (*sorted(twos, reverse=True), *_odd_sizes(odd))


def _odd_sizes(odd: int) -> list[int]:
  """Products of prime factors, not larger than needed."""
  found: list[int] = []
  prime = 3
  while odd > 1:
    if prime * prime > odd:
      prime = odd
    while odd % prime == 0:
      odd //= prime
      if found and found[-1] * prime <= LARGEST:
        found[-1] *= prime
      else:
        found.append(prime)
    prime += 2
  return found


def factors(rng: np.random.Generator, channels: int) -> list[np.ndarray]:
  """Orthogonal matrices whose Kronecker product is (channels, channels)."""
  return [
    hadamard(n) if n % 2 == 0 else _flattest(rng, n) for n in sizes(channels)
  ]


def signs(rng: np.random.Generator, channels: int) -> np.ndarray:
  """+-1 for each channel."""
  return rng.choice([-1.0, 1.0], channels)


def hadamard(n: int) -> np.ndarray:
  """The orthogonal Sylvester matrix of a power of two; +-1/sqrt(n)."""
  pair = np.array([[1.0, 1.0], [1.0, -1.0]])
  return kron([pair] * (n.bit_length() - 1)) / np.sqrt(n)


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
  """A random orthogonal matrix, all alike probable: QR with its signs fixed."""
  q, r = np.linalg.qr(rng.normal(size=(n, n)))
  return q * np.sign(np.diag(r))


def _flattest(rng: np.random.Generator, n: int) -> np.ndarray:
  """Of some random orthogonal matrices that of the smallest largest entry."""
  drawn = [orthogonal(rng, n) for _ in range(DRAWS if n <= LARGEST else 1)]
  return min(drawn, key=lambda q: np.abs(q).max())


def kron(matrices: Sequence[np.ndarray]) -> np.ndarray:
  """The Kronecker product of all."""
  whole = np.ones((1, 1))
  for matrix in matrices:
    whole = np.kron(whole, matrix)
  return whole


def rotation(rng: np.random.Generator, channels: int) -> np.ndarray:
  """diag(signs) times the Kronecker product: a random Hadamard matrix."""
  turned = kron(factors(rng, channels))
  return signs(rng, channels)[:, None] * turned


def mean_keeping(rng: np.random.Generator, channels: int) -> np.ndarray:
  """A rotation R with R 1 = 1: a LayerNorm's mean and variance stay.

  Permutations on both sides of a Kronecker product of regular Hadamard
  matrices of order 4, J / 2 - I, which are flat and keep the vector of ones,
  and of one small factor for what is not a power of four.
  """
  rest, fours = channels, 0
  while rest % 4 == 0 and rest // 4 != 2:
    rest, fours = rest // 4, fours + 1
  parts = [np.full((4, 4), 0.5) - np.eye(4)] * fours
  whole = kron([*parts, _mean_keeping_rest(rng, rest)])
  return whole[rng.permutation(channels)][:, rng.permutation(channels)]


def _mean_keeping_rest(rng: np.random.Generator, n: int) -> np.ndarray:
  """The flattest of some B diag(1, D) C' with constant first columns.

  With orthogonal B and C whose first column is 1/sqrt(n), and D orthogonal,
  R 1 = sqrt(n) B e_1 = 1.
  """

  def one() -> np.ndarray:
    first, last = (_with_ones(rng, n) for _ in range(2))
    inner = np.eye(n)
    if n > 1:
      inner[1:, 1:] = orthogonal(rng, n - 1)
    return first @ inner @ last.T

  drawn = [one() for _ in range(DRAWS if n <= LARGEST else 1)]
  return min(drawn, key=lambda q: np.abs(q).max())


def _with_ones(rng: np.random.Generator, n: int) -> np.ndarray:
  """A random orthogonal matrix with a constant first column."""
  start = rng.normal(size=(n, n))
  start[:, 0] = 1
  q, r = np.linalg.qr(start)
  return q * np.sign(np.diag(r))
