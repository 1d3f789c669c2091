"""Low-bit weights and entries apart: against one dense float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab_kernels as qk

BACKENDS = ['reference', 'xla']
K, N, GROUP = 24, 10, 8


def _case(seed=0, m=3, nnz=9):
  r = np.random.default_rng(seed)
  codes = r.integers(-8, 8, (K, N))
  scale = r.uniform(0.1, 1, (K // GROUP, N)).astype(np.float32)
  packed = qk.pack(jnp.asarray(codes, jnp.int8).view(jnp.uint8) & 15, 4)
  rows, columns = r.integers(0, K, nnz), r.integers(0, N, nnz)
  values = r.normal(size=nnz).astype(np.float32)
  x = r.normal(size=(m, K)).astype(np.float32)
  dense = codes * np.repeat(scale.astype(float), GROUP, 0)
  np.add.at(dense, (rows, columns), values)
  return (x, packed, values, rows, columns, scale), x.astype(float) @ dense


def _run(*operands, **options):
  return qk.dense_and_sparse_matmul(*operands, bits=4, group=GROUP, **options)


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('nnz', [0, 1, 9, 400])  # the last: entries add up
@pytest.mark.parametrize('m', [0, 1, 5])
def test_equals_the_dense_product(implementation, nnz, m):
  operands, want = _case(nnz, m, nnz)
  got = _run(*operands, implementation=implementation)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_few_entries_apart_take_the_error_of_outliers():
  """SqueezeLLM, section 4.2, in kind: outliers stretch the range of a group."""
  r = np.random.default_rng(0)
  w = r.normal(size=(64, 32))
  rows, columns = r.integers(0, 64, 9), r.integers(0, 32, 9)
  w[rows, columns] = 20 * r.choice([-1, 1], 9)  # 0.45 % of the entries
  x = r.normal(size=(16, 64)).astype(np.float32)

  def coded(w):
    scale = np.abs(w).max(0, keepdims=True) / 7
    codes = jnp.asarray(np.round(w / scale), jnp.int8)
    return qk.pack(codes.view(jnp.uint8) & 15, 4), scale.astype(np.float32)

  packed, scale = coded(w)
  plain = qk.w4a16_matmul(x, packed, scale, bits=4)
  inner = w.copy()
  inner[rows, columns] = 0
  kept, scale = coded(inner)
  values = w[rows, columns].astype(np.float32)
  # An entry drawn twice is one entry.
  _, once = np.unique(rows * 32 + columns, return_index=True)
  found = qk.dense_and_sparse_matmul(
    *(x, kept, values[once], rows[once], columns[once], scale), bits=4
  )
  error, before = (np.square(y - x @ w).mean() for y in (found, plain))
  assert error < before / 2


@pytest.mark.parametrize('implementation', BACKENDS)
def test_transformations(implementation):
  operands, want = _case(1)

  @jax.jit
  def f(x, values):
    _, packed, _, rows, columns, scale = operands
    return _run(
      *(x, packed, values, rows, columns, scale), implementation=implementation
    )

  x, values = operands[0], jnp.asarray(operands[2])
  np.testing.assert_allclose(f(x, values), want, rtol=1e-5, atol=1e-4)
  mapped = jax.vmap(f, (0, None))(x[:, None], values)
  np.testing.assert_allclose(mapped[:, 0], want, rtol=1e-5, atol=1e-4)
  g = jax.grad(lambda v: f(x, v)[:, :].sum())(values)
  np.testing.assert_allclose(g, x.sum(0)[operands[3]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('index', [3, 4])
@pytest.mark.parametrize('bad', [-1, 10**6])
def test_an_index_out_of_range_is_nan(implementation, index, bad):
  operands, _ = _case()
  operands = list(operands)
  operands[index] = operands[index].copy()
  operands[index][2] = bad
  assert np.isnan(_run(*operands, implementation=implementation)).all()


def test_refused():
  (x, packed, values, rows, columns, scale), _ = _case()
  with pytest.raises(ValueError, match='rows has shape'):
    _run(x, packed, values, rows[1:], columns, scale)
  with pytest.raises(TypeError, match='columns must be integers'):
    _run(x, packed, values, rows, columns * 1.0, scale)
  with pytest.raises(TypeError, match='values must be floating'):
    _run(x, packed, rows, rows, columns, scale)
  with pytest.raises(ValueError, match='two axes'):
    _run(x, packed[None], values, rows, columns, scale)
