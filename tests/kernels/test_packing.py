"""Packing: every width against a bit-level oracle, under every transform."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import packing as oracle

import quantlab_kernels as qk

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
PACK = jax.jit(qk.pack, static_argnums=1)
UNPACK = jax.jit(qk.unpack, static_argnums=(1, 2))


def _codes(shape, bits, seed=0):
  rng = np.random.default_rng(seed)
  dtype = np.uint16 if bits == 16 else np.uint8
  return rng.integers(0, 2**bits, shape).astype(dtype)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
  bits=st.sampled_from(WIDTHS),
  lead=st.lists(st.integers(1, 3), max_size=2),
  k=st.integers(0, 19),
  n=st.integers(0, 5),
  seed=st.integers(0, 2**31),
)
def test_agrees_with_the_bit_oracle_and_round_trips(bits, lead, k, n, seed):
  q = _codes((*lead, k, n), bits, seed)
  p = PACK(q, bits)
  assert p.dtype == jnp.uint8
  assert p.shape == (*lead, qk.packed_rows(k, bits), n)
  assert qk.packed_rows(k, bits) == oracle.packed_rows(k, bits)
  np.testing.assert_array_equal(p, oracle.pack(q, bits))
  back = UNPACK(p, bits, k)
  assert back.dtype == q.dtype
  np.testing.assert_array_equal(back, q)
  np.testing.assert_array_equal(back, oracle.unpack(np.asarray(p), bits, k))


@pytest.mark.parametrize('bits', WIDTHS)
def test_every_code_survives_in_every_position(bits):
  q = np.arange(2**bits).astype(np.uint16 if bits == 16 else np.uint8)
  q = np.stack([np.roll(q, r) for r in range(8)], axis=-1)
  np.testing.assert_array_equal(UNPACK(PACK(q, bits), bits, q.shape[0]), q)


@pytest.mark.parametrize('bits', [1, 2, 3, 4, 5, 6, 7])
def test_bits_above_the_width_do_not_reach_a_neighbour(bits):
  q = _codes((11, 3), 8)
  np.testing.assert_array_equal(UNPACK(PACK(q, bits), bits, 11), q % 2**bits)


def test_known_bytes():
  q = np.arange(8, dtype=np.uint8)[:, None]
  # 3 bits, code i = i: the classic octal stream 0o76543210.
  np.testing.assert_array_equal(
    qk.pack(q, 3)[:, 0], list((0o76543210).to_bytes(3, 'little'))
  )
  np.testing.assert_array_equal(qk.pack(q, 4)[:, 0], [0x10, 0x32, 0x54, 0x76])
  w = np.array([[0x1234]], np.uint16)
  np.testing.assert_array_equal(qk.pack(w, 16)[:, 0], [0x34, 0x12])


@pytest.mark.parametrize('bits', [3, 4, 16])
def test_under_jit_vmap_and_scan(bits):
  q = _codes((4, 13, 3), bits)
  want = oracle.pack(q, bits)
  np.testing.assert_array_equal(PACK(q, bits), want)
  mapped = jax.vmap(lambda c: qk.pack(c, bits))(q)
  np.testing.assert_array_equal(mapped, want)
  _, scanned = jax.lax.scan(
    lambda c, p: (c, qk.unpack(p, bits, 13)), 0, jnp.asarray(want)
  )
  np.testing.assert_array_equal(scanned, q)


def test_errors_say_what_was_expected():
  q = _codes((8, 2), 4)
  with pytest.raises(ValueError, match='1 to 8, or 16'):
    qk.pack(q, 9)
  with pytest.raises(TypeError, match='takes uint8 codes, found int8'):
    qk.pack(q.view(np.int8), 4)
  with pytest.raises(TypeError, match='takes uint16 codes, found uint8'):
    qk.pack(q, 16)
  with pytest.raises(ValueError, match=r'\(\.\.\., K, N\)'):
    qk.pack(q[0], 4)
  with pytest.raises(ValueError, match=r'takes 4 bytes along axis -2'):
    qk.unpack(q, 4, 8)
  with pytest.raises(TypeError, match='uint8 bytes'):
    qk.unpack(q.astype(np.int32), 4, 16)
