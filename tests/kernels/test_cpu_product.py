"""The C++ products are exact: every width, shape, group and instruction set."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk
from quantlab_kernels import int_dot
from quantlab_kernels.cpu import product

pytestmark = pytest.mark.usefixtures('cpu_kernels')


def _rng(*seed):
  return np.random.default_rng(seed)


def _x(shape, seed=0):
  return _rng(seed).integers(-128, 128, shape).astype(np.int8)


def _w(k, n, bits, signed=True, seed=1):
  """Returns (packed codes, their integers)."""
  q = _rng(seed, bits).integers(0, 2**bits, (k, n)).astype(np.uint8)
  value = oracle.signed_value(q, bits) if signed else q.astype(np.int64)
  return packing.pack(q, bits), value


def _powers(shape, seed=2):
  """Scales of 1 and 2, with which float32 sums stay exact here."""
  return _rng(seed).integers(1, 3, shape).astype(np.float32)


def _run(op, cases):
  """Runs the cases, (arrays, options), in one compiled program."""

  def program(arrays):
    return [
      op(**a, **options, implementation='cpu')
      for a, (_, options) in zip(arrays, cases, strict=True)
    ]

  return jax.jit(program)([arrays for arrays, _ in cases])


def _check(op, cases, wants):
  for got, want, case in zip(_run(op, cases), wants, cases, strict=True):
    shapes = {k: np.shape(v) for k, v in case[0].items()}
    np.testing.assert_array_equal(got, want, err_msg=f'{shapes} {case[1]}')


ROWS = (1, 2, 3, 4, 5, 7, 12, 13, 37)


def test_int8_is_exact_over_shapes(isa):
  cases, wants = [], []
  sizes = itertools.product((1, 3, 4, 7, 64, 130), (1, 2, 31, 64, 65, 100))
  for i, (k, n) in enumerate(sizes):
    m = ROWS[i % len(ROWS)]
    x, (w, _) = _x((m, k), i), _w(k, n, 8, seed=i)
    w = w.view(np.int8)
    zero = {}
    if i % 2:
      zero['x_zero'] = _rng(i).integers(-128, 128, (m, 1)).astype(np.int32)
    if i % 3 == 1:
      zero['w_zero'] = _rng(i).integers(-128, 128, (1, n)).astype(np.int32)
    cases.append(({'xq': x, 'wq': w, **zero}, {'out_dtype': jnp.int32}))
    wants.append(
      oracle.int_product(x, w, zero.get('x_zero', 0), zero.get('w_zero', 0))
    )
  _check(qk.int8_matmul, cases, wants)


@pytest.mark.parametrize('bits', range(1, 9))
def test_every_width_is_exact(bits, isa):
  cases, wants = [], []
  groups = (None, 1, 5, 8, 32, 100)
  for i, m in enumerate(ROWS):
    k, n = (45, 100, 130)[i % 3], (7, 64, 97)[i % 3]
    group = groups[(i + bits) % len(groups)]
    size = group or k
    signed = bool((i + bits) % 2)
    x, (p, w) = _x((m, k), i), _w(k, n, bits, signed, seed=i)
    shape = (-(-k // size), n)
    arrays = {'xq': x, 'packed': p, 'scale': _powers(shape)}
    z, sx, zx = None, 1.0, 0
    if i % 2:
      z = _rng(i).integers(-9, 9, shape).astype(np.int32)
      arrays['zero_point'] = z
    if i % 3:
      sx = _powers((m, shape[0] if i % 3 == 1 else 1))
      arrays['x_scale'] = sx
    if i % 4 > 1:
      columns = shape[0] if i % 4 == 2 else 1
      zx = _rng(i).integers(-128, 128, (m, columns)).astype(np.int32)
      arrays['x_zero'] = zx
    cases.append((arrays, {'bits': bits, 'group': group, 'signed': signed}))
    wants.append(oracle.grouped_product(x, w, arrays['scale'], size, z, sx, zx))
  _check(qk.w4a8_matmul, cases, wants)


@pytest.mark.parametrize('m', [1, 4, 256])
def test_large_products_are_exact(m, isa):
  """Several panels, blocks and tasks on all threads, with narrow ends."""
  cases, wants = [], []
  for bits, group, k, n in [
    (8, None, 1337, 700),
    (4, 128, 1337, 520),
    (2, None, 2500, 333),
    (3, 48, 300, 530),
  ]:
    x, (p, w) = _x((m, k)), _w(k, n, bits)
    s = _powers((-(-k // (group or k)), n))
    options = {'bits': bits, 'group': group}
    cases.append(({'xq': x, 'packed': p, 'scale': s}, options))
    wants.append(oracle.grouped_product(x, w, s, group or k))
  _check(qk.w4a8_matmul, cases, wants)


@pytest.mark.parametrize('m', [1, 5])
def test_extremes_are_exact(m, isa):
  cases, wants = [], []
  for x0, bits, code, zx in [
    (-128, 8, 0x80, None),
    (-128, 8, 0x7F, None),
    (127, 8, 0x80, -128),
    (-128, 4, 8, 127),
    (-128, 4, 7, None),
    (-128, 2, 2, None),
    (127, 3, 4, -128),
  ]:
    x = np.full((m, 1000), x0, np.int8)
    q = np.full((1000, 70), code, np.uint8)
    arrays = {
      'xq': x,
      'packed': packing.pack(q, bits),
      'scale': np.ones((1, 70), np.float32),
      'x_zero': None if zx is None else np.full((m, 1), zx, np.int32),
    }
    cases.append((arrays, {'bits': bits}))
    w = oracle.signed_value(q, bits)
    # One rounding to float32 is left, of an integer.
    wants.append(np.float32(oracle.int_product(x, w, zx or 0)))
  _check(qk.w4a8_matmul, cases, wants)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_tables_are_exact(bits, isa):
  cases, wants = [], []
  for i, (m, k, n, group) in enumerate(
    [(1, 130, 65, 64), (3, 45, 7, None), (13, 100, 70, 16), (5, 64, 64, 5)]
  ):
    table = _rng(i).integers(-128, 128, 2**bits).astype(np.int8)
    x, (p, q) = _x((m, k), i), _w(k, n, bits, signed=False, seed=i)
    s = _powers((-(-k // (group or k)), n))
    arrays = {'xq': x, 'packed': p, 'table': table, 'scale': s}
    cases.append((arrays, {'bits': bits, 'group': group}))
    w = table[q].astype(np.int64)
    wants.append(oracle.grouped_product(x, w, s, group or k))
  _check(qk.lut_matmul, cases, wants)


def test_real_scales_within_a_millionth(isa):
  rng = _rng(5)
  k, n, group = 300, 70, 32
  cases, wants = [], []
  for m in (1, 7):
    for by_group in (False, True):
      x, (p, w) = _x((m, k)), _w(k, n, 4)
      s = rng.normal(size=(10, n)).astype(np.float32)
      sx = rng.uniform(0.1, 2, (m, 10 if by_group else 1)).astype(np.float32)
      cases.append(
        ({'xq': x, 'packed': p, 'scale': s, 'x_scale': sx}, {'group': group})
      )
      wants.append(oracle.grouped_product(x, w, s, group, x_scale=sx))
  for got, want in zip(_run(qk.w4a8_matmul, cases), wants, strict=True):
    np.testing.assert_allclose(got, want, 1e-6, 1e-6 * np.abs(want).max())


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('m', [3, 9])
def test_scales_that_are_not_finite_are_not_hidden(bad, m, isa):
  x = _x((m, 20))
  x[1] = 0
  p, _ = _w(20, 70, 4)
  s = np.ones((3, 70), np.float32)
  s[1, 2] = bad
  sx = np.ones((m, 1), np.float32)
  sx[2] = bad
  arrays = {'xq': x, 'packed': p, 'scale': s, 'x_scale': sx}
  (y,) = np.asarray(_run(qk.w4a8_matmul, [(arrays, {'group': 8})]))
  assert not np.isfinite(y[:, 2]).any()
  assert not np.isfinite(y[2]).any()
  assert np.isfinite(np.delete(np.delete(y, 2, 1), 2, 0)).all()


def test_int8_scales_equal_the_definition_bit_for_bit(isa):
  x, (w, _) = _x((6, 100)), _w(100, 70, 8)
  w = w.view(np.int8)
  s = _rng(3).normal(size=(1, 70)).astype(np.float32)
  sx = _rng(4).uniform(size=(6, 1)).astype(np.float32)
  for dtype in (jnp.float32, jnp.bfloat16):
    options = {'out_dtype': dtype}
    arrays = {'xq': x, 'wq': w, 'x_scale': sx, 'w_scale': s}
    (got,) = _run(qk.int8_matmul, [(arrays, options)])
    want = qk.int8_matmul(**arrays, **options, implementation='reference')
    np.testing.assert_array_equal(got, want)


def test_ternary_is_two_bits():
  w = _rng(0).integers(-1, 2, (50, 66))
  p = packing.pack((w & 3).astype(np.uint8), 2)
  x = _x((4, 50))
  for name in ('cpu', 'xla', 'reference'):
    got = qk.ternary_matmul(x, p, np.float32(0.5), implementation=name)
    np.testing.assert_array_equal(got, 0.5 * oracle.int_product(x, w))


def test_operands_need_no_alignment():
  """Slices of one buffer, so that addresses are odd."""
  k, n = 37, 77
  big = _rng(0).integers(0, 256, (k * n + 3,)).astype(np.uint8)
  x = _x((3, k))

  def f(big, x):
    return [
      qk.int8_matmul(
        x,
        big[i : i + k * n].reshape(k, n).view(jnp.int8),
        out_dtype=jnp.int32,
        implementation='cpu',
      )
      for i in range(4)
    ]

  for i, got in enumerate(jax.jit(f)(big, x)):
    w = big[i : i + k * n].reshape(k, n).view(np.int8)
    np.testing.assert_array_equal(got, oracle.int_product(x, w))


def test_what_is_not_for_the_kernels_goes_to_xla(monkeypatch):
  x, w = _x((2, 8)), _x((8, 3))

  def refusal(*args, **options):
    (choice,) = qk.choices(qk.int8_matmul, *args, **options)
    assert choice.implementation == 'xla'
    return dict(choice.refusals)['cpu']

  assert 'as (K, N)' in refusal(x, _x((3, 8)), transpose_w=True)
  assert 'empty' in refusal(_x((0, 8)), w)
  monkeypatch.setenv('QUANTLAB_CPU_ISA', 'none')
  assert 'neither AVX2' in refusal(x, w)
  monkeypatch.setenv('QUANTLAB_CPU_FFI', 'require')
  with pytest.raises(RuntimeError, match='require, but the processor'):
    qk.int8_matmul(x, w)
  monkeypatch.setenv('QUANTLAB_CPU_FFI', '0')
  assert 'QUANTLAB_CPU_FFI=0' in refusal(x, w)
  monkeypatch.setenv('QUANTLAB_CPU_FFI', 'yes')
  with pytest.raises(ValueError, match='expected auto, 0'):
    qk.int8_matmul(x, w)
  monkeypatch.setenv('QUANTLAB_CPU_FFI', 'auto')
  monkeypatch.setenv('QUANTLAB_CPU_ISA', 'mmx')
  with pytest.raises(ValueError, match="'mmx', expected one of"):
    qk.int8_matmul(x, w)


@pytest.mark.skipif('XLA_FLAGS' not in os.environ, reason='one device')
def test_sharded_operands_are_refused_outside_shard_map(monkeypatch):
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: False)
  with pytest.raises(ValueError, match='devices: an operand that is sharded'):
    qk.int8_matmul(_x((2, 8)), _x((8, 3)), implementation='cpu')


def test_the_library_refuses_what_does_not_fit():
  """Such as the operands of an exported program that were changed."""
  x, (w, _) = _x((3, 64)), _w(64, 8, 4)
  run = lambda w: product.multiply(  # noqa: E731
    *map(jnp.asarray, (x, w)),
    *(None,) * 4,
    bits=4,
    group=64,
    signed=True,
    otherwise=None,
  )
  assert run(w).shape == (3, 8)
  with pytest.raises(
    jax.errors.JaxRuntimeError, match=r'codes \(1, 31, 8\).*4 bits in groups'
  ):
    run(w[:31])
