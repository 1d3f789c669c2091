"""Tables: NF4, powers of two and learned codebooks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import formats as oracle

from quantlab import formats


def test_nf4_is_the_released_table_bit_for_bit():
  want = np.asarray(oracle.NF4, np.float32)
  np.testing.assert_array_equal(formats.NF4.values, want)


def test_nf4_beats_int4_on_normal_blocks():
  """The claim of arXiv 2305.14314, absmax scaling in blocks of 64."""
  x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
  x /= np.abs(x).max(1, keepdims=True)
  nf4 = np.asarray(formats.NF4.round(x))
  int4 = np.asarray(formats.get('int4').round(x * 7)) / 7
  assert np.mean((nf4 - x) ** 2) < np.mean((int4 - x) ** 2)


def test_pow2_values():
  np.testing.assert_array_equal(
    formats.pow2(3).values, [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
  )
  assert len(formats.pow2(5).values) == 2**5 - 1


def _learned(bits=3, columns=5, seed=0):
  rng = np.random.default_rng(seed)
  table = np.sort(rng.uniform(-1, 1, (2**bits, 1, columns)), axis=0)
  x = rng.uniform(-1.2, 1.2, (400, columns))
  return formats.codebook(bits), table.astype('f'), x.astype('f')


@pytest.mark.parametrize('bits', [1, 2, 3, 4, 6])
def test_learned_table_is_nearest(bits):
  fmt, table, x = _learned(bits)
  codes = np.asarray(jax.jit(fmt.encode)(x, table))
  distance = np.abs(x[None].astype(np.float64) - table)
  chosen = np.take_along_axis(distance, codes[None].astype(int), 0)[0]
  np.testing.assert_allclose(chosen, distance.min(0), rtol=0, atol=1e-7)
  want = np.take_along_axis(
    np.broadcast_to(table, distance.shape), codes[None].astype(int), 0
  )[0]
  np.testing.assert_array_equal(fmt.decode(codes, table), want)
  np.testing.assert_array_equal(fmt.round(x, table), want)


def test_learned_round_keeps_nan():
  fmt, table, x = _learned()
  x[3, 2] = np.nan
  got = np.asarray(fmt.round(x, table))
  assert np.isnan(got[3, 2])
  assert np.isnan(got).sum() == 1


def test_learned_stochastic_rounding_is_unbiased():
  fmt, table, x = _learned()
  x = np.clip(x, table[0], table[-1])[:20]
  n = 4000
  many = jnp.asarray(np.tile(x, (n, 1, 1)))
  got = jax.jit(fmt.stochastic_round)(jax.random.key(1), many, table[:, None])
  gap = np.diff(table, axis=0).max()
  bound = 5 * gap * 0.5 / np.sqrt(n)
  assert (np.abs(np.asarray(got).mean(0, dtype=np.float64) - x) < bound).all()


def test_learned_needs_its_table():
  with pytest.raises(ValueError, match='no table of its own'):
    formats.codebook(3).encode(jnp.zeros(3))
