"""lut_matmul: codes that stand for entries of an int8 table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk
from quantlab_kernels.lut_matmul import int8_table

NF4 = np.float32(
  [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343]
  + [-0.09105004, 0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983]
  + [0.562617, 0.72295684, 1]
)


def _operands(m, k, n, bits, group, lead=(), seed=0):
  """Returns (x, packed, table, scale) and the looked-up integers."""
  rng = np.random.default_rng(seed)
  x = rng.integers(-128, 128, (*lead, m, k)).astype(np.int8)
  q = rng.integers(0, 2**bits, (*lead, k, n)).astype(np.uint8)
  table = rng.integers(-128, 128, (*lead, 2**bits)).astype(np.int8)
  s = 2.0 ** rng.integers(-2, 3, (*lead, -(-k // group), n))
  parts = [packing.pack(c, bits) for c in q.reshape(-1, k, n)]
  p = np.stack(parts).reshape(*lead, -1, n)
  w = np.take_along_axis(
    table.reshape(*lead, 1, -1).astype(np.int64).repeat(k, -2), q, -1
  )
  return (x, p, table, np.float32(s)), w


@pytest.mark.parametrize('name', ['xla', 'reference', None])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_every_width_is_exact(bits, name):
  for m, group in [(1, 16), (5, 45)]:
    args, w = _operands(m, 45, 7, bits, group)
    zero = np.full((m, 1), 3, np.int32)
    run = jax.jit(
      lambda *a, g=group, zero=zero: qk.lut_matmul(
        *a, bits=bits, group=g, x_zero=zero, implementation=name
      )
    )
    want = oracle.grouped_product(args[0], w, args[3], group, x_zero=zero)
    np.testing.assert_array_equal(run(*args), want)


def test_experts_have_their_own_tables():
  args, w = _operands(2, 20, 5, 4, 20, lead=(3,))
  got = qk.lut_matmul(*args, out_dtype=jnp.bfloat16)
  want = [
    oracle.grouped_product(args[0][i], w[i], args[3][i], 20) for i in range(3)
  ]
  np.testing.assert_array_equal(got, np.array(want).astype(jnp.bfloat16))


def test_nf4_rounded_to_int8():
  table, unit = int8_table(NF4)
  moved = np.abs(np.asarray(table) * float(unit) - NF4)
  assert moved.max() < 0.0038
  assert moved.max() < np.diff(NF4).min() / 20
  zero, one = int8_table(jnp.zeros(4))
  np.testing.assert_array_equal(zero, np.zeros(4))
  assert np.isfinite(one)


def test_errors_say_what_was_expected():
  (x, p, table, s), _ = _operands(3, 20, 5, 4, 20)
  with pytest.raises(ValueError, match='2 to 4 bits'):
    qk.lut_matmul(x, p, table, s, bits=5)
  with pytest.raises(ValueError, match=r'table has shape \(8,\), expected'):
    qk.lut_matmul(x, p, table[:8], s)
  with pytest.raises(TypeError, match='table must be int8'):
    qk.lut_matmul(x, p, np.float32(table), s)
  with pytest.raises(ValueError, match='9 rows, expected 10'):
    qk.lut_matmul(x, p[:9], table, s)
  with pytest.raises(TypeError, match='returns floats'):
    qk.lut_matmul(x, p, table, s, out_dtype=jnp.int32)
  with pytest.raises(ValueError, match='scale has shape'):
    qk.lut_matmul(x, p, table, s[:, :2], group=4)
