"""Weights packed ahead: the layout, exact products, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk

on_cpu = pytest.mark.usefixtures('cpu_kernels')


def _codes(*shape, seed=0):
  rng = np.random.default_rng((seed, *shape))
  return rng.integers(-128, 128, shape).astype(np.int8)


def _int32(x, w, **options):
  return qk.int8_matmul(x, w, out_dtype=jnp.int32, **options)


# The layout ------------------------------------------------------------------


@pytest.mark.parametrize(('k', 'n'), [(1, 1), (4, 64), (5, 65), (9, 130)])
def test_the_layout_is_as_documented(k, n):
  w = _codes(k, n)
  np.testing.assert_array_equal(qk.prepack(w).codes, packing.panels(w))


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.integers(0, 3), max_size=2),
  st.integers(0, 9),
  st.integers(0, 140),
)
def test_unpack_gives_the_weight_back(lead, k, n):
  w = _codes(*lead, k, n)
  p = qk.prepack(w)
  assert (p.shape, p.dtype, p.ndim) == (w.shape, w.dtype, w.ndim)
  np.testing.assert_array_equal(p.unpack(), w)


# Products --------------------------------------------------------------------


@pytest.mark.parametrize('name', ['reference', 'xla'])
def test_other_backends_take_it(name):
  x, w = _codes(3, 9), _codes(9, 70)
  got = _int32(x, qk.prepack(w), implementation=name)
  np.testing.assert_array_equal(got, oracle.int_product(x, w))


@on_cpu
def test_products_are_exact(isa):
  for i, m in enumerate((1, 2, 3, 5, 12, 13, 37, 256)):
    k, n = ((1, 1), (5, 63), (64, 64), (257, 200))[i % 4]
    x, w = _codes(m, k, seed=i), _codes(k, n, seed=i)
    zero = {}
    if i % 2:
      zero['x_zero'] = _codes(m, 1, seed=i).astype(np.int32)
    if i % 3:
      zero['w_zero'] = _codes(1, n, seed=i).astype(np.int32)
    got = _int32(x, qk.prepack(w), implementation='cpu', **zero)
    want = oracle.int_product(
      x, w, zero.get('x_zero', 0), zero.get('w_zero', 0)
    )
    np.testing.assert_array_equal(got, want, err_msg=f'{m=} {k=} {n=} {isa}')


@on_cpu
@pytest.mark.parametrize('m', [1, 17, 200])
def test_large_products_are_exact(m, isa):
  """Several blocks and tasks on all threads; extremes."""
  x, w = _codes(m, 1100), _codes(1100, 530)
  x[0], w[:, 0] = -128, -128
  got = _int32(x, qk.prepack(w), implementation='cpu')
  np.testing.assert_array_equal(got, oracle.int_product(x, w))


@on_cpu
def test_scaled_products_are_those_of_the_stored_weight(isa):
  x, w = _codes(20, 90), _codes(90, 70)
  rng = np.random.default_rng(0)
  scales = {
    'x_scale': rng.uniform(0.5, 2, (20, 1)).astype(np.float32),
    'w_scale': rng.uniform(0.5, 2, (1, 70)).astype(np.float32),
  }
  scales['x_scale'][3], scales['w_scale'][0, 5] = np.nan, np.inf
  got = qk.int8_matmul(x, qk.prepack(w), **scales, implementation='cpu')
  want = qk.int8_matmul(x, w, **scales, implementation='cpu')
  np.testing.assert_array_equal(got, want)
  assert np.isnan(got[3]).all()
  assert np.isinf(got[4, 5])


# Transformations -------------------------------------------------------------


@on_cpu
def test_experts_are_mapped_and_scanned_over():
  x, w = _codes(3, 2, 12), _codes(3, 12, 70)
  want = np.stack(
    [oracle.int_product(*each) for each in zip(x, w, strict=True)]
  )
  p = qk.prepack(w)
  np.testing.assert_array_equal(_int32(x, p), want)
  np.testing.assert_array_equal(jax.vmap(_int32)(x, p), want)
  _, scanned = jax.lax.scan(lambda c, each: (c, _int32(*each)), None, (x, p))
  np.testing.assert_array_equal(scanned, want)
  one = jax.tree.map(lambda c: c[0], p)
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(_int32, in_axes=(0, None)))(x, one),
    np.stack([oracle.int_product(each, w[0]) for each in x]),
  )


@on_cpu
def test_scales_have_the_gradients_of_the_definition():
  x, w = _codes(3, 12), _codes(12, 70)
  p = qk.prepack(w)

  def loss(scale, w, name):
    y = qk.int8_matmul(
      x, w, w_scale=scale[None], x_scale=scale[:3, None], implementation=name
    )
    return jnp.mean(y**2) / 1e6

  at = jnp.linspace(0.5, 2, 70)
  for f in (jax.grad(loss), jax.checkpoint(jax.grad(loss), static_argnums=2)):
    np.testing.assert_allclose(
      f(at, p, 'cpu'), jax.grad(loss)(at, w, 'reference'), rtol=2e-6
    )


def test_panels_are_shared_among_devices():
  x, w = _codes(3, 12), _codes(12, 128)
  mesh = Mesh(np.array(jax.devices()[:2]), 'd')
  for checked in (True, False):
    run = jax.shard_map(
      _int32,
      mesh=mesh,
      in_specs=(P(), P('d')),
      out_specs=P(None, 'd'),
      check_vma=checked,
    )
    np.testing.assert_array_equal(
      jax.jit(run)(x, qk.prepack(w)), oracle.int_product(x, w)
    )
    with pytest.raises(ValueError, match='a multiple of 64'):
      jax.eval_shape(run, x, qk.prepack(w[:, :100]))


def test_experts_are_shared_among_devices():
  x, w = _codes(2, 3, 12), _codes(2, 12, 100)
  mesh = Mesh(np.array(jax.devices()[:2]), 'd')
  run = jax.shard_map(
    _int32, mesh=mesh, in_specs=(P('d'), P('d')), out_specs=P('d')
  )
  want = [oracle.int_product(*each) for each in zip(x, w, strict=True)]
  np.testing.assert_array_equal(jax.jit(run)(x, qk.prepack(w)), want)


# Choices and errors ----------------------------------------------------------


@on_cpu
def test_the_choice_says_so():
  x, p = _codes(3, 12), qk.prepack(_codes(12, 70))
  (choice,) = qk.choices(qk.int8_matmul, x, p)
  assert choice.implementation == 'cpu'
  assert 'in panels' in choice.route
  (choice,) = qk.choices(qk.int8_matmul, x, p, implementation='xla')
  assert 'at every call' in choice.route


def test_what_cannot_be_packed_is_refused():
  w = _codes(12, 70)
  with pytest.raises(ValueError, match="'gpu': expected 'cpu'"):
    qk.prepack(w, 'gpu')
  with pytest.raises(TypeError, match=r'int8 weight.*uint8\[12, 70\]'):
    qk.prepack(w.view(np.uint8))
  with pytest.raises(TypeError, match=r'int8\[70\]'):
    qk.prepack(w[0])
  with pytest.raises(TypeError, match=r'eval_shape\(prepack, w\)'):
    qk.prepack(jax.ShapeDtypeStruct(w.shape, w.dtype))
  p = qk.prepack(w)
  assert qk.prepack(p) is p
  assert jax.eval_shape(qk.prepack, w).nbytes == p.nbytes == 2 * 3 * 256
  with pytest.raises(ValueError, match='transpose_w'):
    qk.int8_matmul(_codes(3, 70), p, transpose_w=True)
  with pytest.raises(ValueError, match='k=12'):
    qk.int8_matmul(_codes(3, 13), p)
  with pytest.raises(ValueError, match='cannot become'):
    p.reshape(6, 140)
