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


def _packed(k, n, bits, signed, seed=0):
  """Codes as `pack` stores them, the same in panels, and their integers."""
  rng = np.random.default_rng((seed, k, n, bits))
  q = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
  value = oracle.signed_value(q, bits) if signed else q.astype(np.int64)
  p = packing.pack(q, bits)
  return p, qk.prepack(p.view(np.int8) if bits == 8 and signed else p), value


def _int32(x, w, **options):
  return qk.int8_matmul(x, w, out_dtype=jnp.int32, **options)


# The layout ------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [np.int8, np.uint8])
@pytest.mark.parametrize(('k', 'n'), [(1, 1), (4, 64), (5, 65), (9, 130)])
def test_the_layout_is_as_documented(k, n, dtype):
  w = _codes(k, n).view(dtype)
  np.testing.assert_array_equal(qk.prepack(w).codes, packing.panels(w))


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.integers(0, 3), max_size=2),
  st.integers(0, 9),
  st.integers(0, 140),
  st.sampled_from([np.int8, np.uint8]),
)
def test_unpack_gives_the_weight_back(lead, k, n, dtype):
  w = _codes(*lead, k, n).view(dtype)
  p = qk.prepack(w)
  assert (p.shape, p.dtype, p.ndim) == (w.shape, w.dtype, w.ndim)
  np.testing.assert_array_equal(p.unpack(), w)


# Products --------------------------------------------------------------------


@pytest.mark.parametrize('name', ['reference', 'xla'])
def test_other_backends_take_it(name):
  x, w = _codes(3, 9), _codes(9, 70)
  got = _int32(x, qk.prepack(w), implementation=name)
  np.testing.assert_array_equal(got, oracle.int_product(x, w))


@pytest.mark.parametrize('name', ['reference', 'xla'])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_other_backends_take_packed_codes(name, bits):
  x = _codes(3, 45)
  for signed in (True, False):
    p, panels, _ = _packed(45, 70, bits, signed)
    options = {'bits': bits, 'signed': signed, 'implementation': name}
    scale = np.ones((3, 70), np.float32)
    np.testing.assert_array_equal(
      qk.w4a8_matmul(x, panels, scale, group=16, **options),
      qk.w4a8_matmul(x, p, scale, group=16, **options),
    )


@on_cpu
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_packed_products_are_exact(bits, isa):
  """Every kind of scale and zero point, groups whole and cut short."""
  word = 32 // bits
  for i, m in enumerate((1, 2, 3, 4, 5, 12, 13, 37, 256)):
    k, n = ((1, 1), (45, 63), (128, 64), (257, 200))[i % 4]
    group = (None, word, 3 * word, 64)[(i + i // 4) % 4]
    signed = bool(i % 3)
    x, (_, panels, w) = _codes(m, k, seed=i), _packed(k, n, bits, signed, i)
    rng = np.random.default_rng(i)
    size = group or k
    shape = (-(-k // size), n)
    # Powers of two, with which float32 sums stay exact.
    scale = rng.integers(1, 3, shape).astype(np.float32)
    z, sx, zx = None, 1.0, 0
    if i % 2:
      z = rng.integers(-9, 9, shape).astype(np.int32)
    if i % 3:
      columns = shape[0] if i % 3 == 1 else 1
      sx = rng.integers(1, 3, (m, columns)).astype(np.float32)
    if i % 4 > 1:
      columns = shape[0] if i % 4 == 2 else 1
      zx = rng.integers(-128, 128, (m, columns)).astype(np.int32)
    got = qk.w4a8_matmul(
      *(x, panels, scale),
      bits=bits,
      group=group,
      signed=signed,
      zero_point=z,
      x_scale=sx if i % 3 else None,
      x_zero=zx if i % 4 > 1 else None,
      implementation='cpu',
    )
    want = oracle.grouped_product(x, w, scale, size, z, sx, zx)
    np.testing.assert_array_equal(got, want, err_msg=f'{m=} {k=} {n=} {group=}')


@on_cpu
@pytest.mark.parametrize(('k', 'bits'), [(150_000, 4), (2_800_000, 2)])
def test_a_long_contraction_stays_within_int32(k, bits, isa):
  """Sums of the upper codes of a byte are kept apart, multiplied by 16 or 4."""
  x = np.full((2, k), -128, np.int8)
  code, value = (7, 7) if bits == 4 else (1, 1)
  byte = sum(code << i for i in range(0, 8, bits))
  p = qk.prepack(np.full((k * bits // 8, 3), byte, np.uint8))
  got = qk.w4a8_matmul(x, p, np.ones((1, 3), np.float32), bits=bits)
  assert (got == np.float32(-128 * value * k)).all()


@on_cpu
@pytest.mark.parametrize('m', [1, 3, 16, 40, 200])
def test_large_packed_products_are_exact(m, isa):
  """Several panels, blocks and tasks on all threads, with narrow ends."""
  for bits, group in ((4, 128), (4, None), (2, None), (2, 32), (8, 32)):
    x, (_, panels, w) = _codes(m, 1337), _packed(1337, 530, bits, True)
    x[0] = -128
    size = group or 1337
    scale = np.ones((-(-1337 // size), 530), np.float32)
    got = qk.w4a8_matmul(
      x, panels, scale, bits=bits, group=group, implementation='cpu'
    )
    want = oracle.grouped_product(x, w, scale, size)
    np.testing.assert_array_equal(got, want, err_msg=f'{bits=} {group=}')


@on_cpu
@pytest.mark.parametrize('m', [1, 4, 5, 40])
@pytest.mark.parametrize('bits', [2, 4])
def test_tables_are_looked_up(bits, m, isa):
  p, panels, _ = _packed(300, 200, bits, signed=False)
  x, table = _codes(m, 300), _codes(2**bits, 1)[:, 0]
  scale = np.random.default_rng(0).integers(1, 3, (5, 200)).astype(np.float32)
  got, want = (
    qk.lut_matmul(x, w, table, scale, bits=bits, group=64, implementation=name)
    for w, name in ((panels, 'cpu'), (p, 'reference'))
  )
  np.testing.assert_array_equal(got, want)


@on_cpu
def test_ternary_products_are_exact():
  _, panels, w = _packed(260, 130, 2, signed=True)
  x = _codes(2, 260)
  got = qk.ternary_matmul(x, panels, np.float32(1), implementation='cpu')
  np.testing.assert_array_equal(got, oracle.int_product(x, w))
  nan = qk.ternary_matmul(
    x, panels, np.full((1, 130), np.nan, np.float32), implementation='cpu'
  )
  assert np.isnan(nan).all()


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
def test_packed_codes_are_mapped_and_have_gradients():
  made = [_packed(64, 70, 4, True, seed) for seed in range(3)]
  p, x = np.stack([m[0] for m in made]), _codes(3, 2, 64)
  panels = qk.prepack(p)
  scale = np.random.default_rng(0).uniform(0.5, 2, (3, 4, 70))
  scale = scale.astype(np.float32)

  def product(x, p, scale, name='cpu'):
    return qk.w4a8_matmul(x, p, scale, group=16, implementation=name)

  want = product(x, p, scale, 'reference')
  for f in (product, jax.vmap(product), jax.jit(product)):
    np.testing.assert_allclose(f(x, panels, scale), want, rtol=1e-6, atol=1e-3)

  def loss(scale, p, name):
    return jnp.mean(product(x, p, scale, name) ** 2) / 1e6

  for f in (jax.grad(loss), jax.checkpoint(jax.grad(loss), static_argnums=2)):
    np.testing.assert_allclose(
      f(scale, panels, 'cpu'), jax.grad(loss)(scale, p, 'reference'), rtol=1e-4
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
  for bits, group, why in ((4, 8, ''), (4, 4, 'the 8 codes'), (3, 8, 'strad')):
    _, p, _ = _packed(32, 70, bits, signed=True)
    scale = np.ones((32 // group, 70), np.float32)
    (choice,) = qk.choices(
      qk.w4a8_matmul, _codes(3, 32), p, scale, bits=bits, group=group
    )
    assert (choice.implementation == 'cpu') == (not why)
    assert 'in panels' in choice.route or 'out of panels' in choice.route
    assert why in dict(choice.refusals).get('cpu', '')


def test_what_cannot_be_packed_is_refused():
  w = _codes(12, 70)
  with pytest.raises(ValueError, match="'gpu': expected 'cpu'"):
    qk.prepack(w, 'gpu')
  with pytest.raises(TypeError, match=r'int8 weight.*int16\[12, 70\]'):
    qk.prepack(w.astype(np.int16))
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
  x, one = _codes(3, 12), np.ones((1, 70), np.float32)
  with pytest.raises(TypeError, match=r'give w\.unpack\(\)'):
    qk.w4a16_matmul(x.astype(np.float32), p, one, bits=8)
  with pytest.raises(TypeError, match='packed must be uint8, found int8'):
    qk.w4a8_matmul(x, p, one, bits=4)
  with pytest.raises(TypeError, match='packed must be int8, found uint8'):
    qk.w4a8_matmul(x, qk.prepack(w.view(np.uint8)), one, bits=8)
  with pytest.raises(TypeError, match='wq must be int8, found uint8'):
    qk.int8_matmul(x, qk.prepack(w.view(np.uint8)))
  for read in (np.asarray, jnp.asarray, qk.quantize_activation):
    with pytest.raises(TypeError, match=r'shape \(12, 70\) in panels stands'):
      read(p)
  with pytest.raises(ValueError, match='expected 6 for K=12'):
    qk.w4a8_matmul(x, qk.prepack(w.view(np.uint8)), one, bits=4)


@on_cpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize('name', ['cpu', 'xla'])
def test_panels_that_were_changed_are_refused(name, dtype):
  """As a function over all arrays of a model would change them."""
  x, p = _codes(3, 12), qk.prepack(_codes(12, 70))
  cast = jax.tree.map(lambda a: a.astype(dtype), p)
  with pytest.raises(TypeError, match=rf'{jnp.dtype(dtype)}\[2, 3, 256\]'):
    qk.int8_matmul(x, cast, implementation=name)
  cut = jax.tree.map(lambda a: a[..., :128], p)
  with pytest.raises(TypeError, match=r'uint8\[2, 3, 128\]: leave'):
    qk.int8_matmul(x, cut, implementation=name)
