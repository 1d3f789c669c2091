"""Convolutions in C++: exact in every geometry, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracle import matmul as oracle

import quantlab_kernels as qk
from quantlab_kernels import int_dot

pytestmark = pytest.mark.usefixtures('cpu_kernels')
NHWC = ('NHWC', 'HWIO', 'NHWC')


def _codes(rng, *shape):
  return rng.integers(-128, 128, shape).astype(np.int8)


def _zero(rng, size):
  one = int(rng.integers(-128, 128))
  return [None, one, rng.integers(-128, 128, size).astype(np.int32)][
    rng.integers(3)
  ]


def _random_case(seed):
  """Codes, arguments of int8_conv, and the exact result; or None if empty."""
  rng = np.random.default_rng(seed)
  pick = lambda low, high: int(rng.integers(low, high + 1))  # noqa: E731
  strides, dilation = (pick(1, 3), pick(1, 3)), (pick(1, 2), pick(1, 2))
  pads = [(pick(-1, 3), pick(-1, 3)) for _ in range(2)]
  batch, kernel = pick(1, 3), (pick(1, 4), pick(1, 4))
  if seed % 3 == 0:
    groups = int(rng.choice([2, 3, 8, 16, 31, 33, 40, 64, 65, 100, 150]))
    inputs, outputs = 1, groups
  else:
    groups = (1, 2)[seed % 3 - 1]
    inputs = pick(1 if groups == 1 else 4, 19)
    outputs = groups * int(rng.choice([8, 15, 16, 17, 33, 48, 64, 65, 130]))
  x = _codes(rng, batch, pick(1, 9), pick(1, 19), groups * inputs)
  w = _codes(rng, *kernel, inputs, outputs)
  zeros = {'x_zero': _zero(rng, batch), 'w_zero': _zero(rng, outputs)}
  spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
  room = [
    n + low + high - span
    for n, (low, high), span in zip(x.shape[1:3], pads, spans, strict=True)
  ]
  if min(room) < 0:
    return None
  options = {
    'window_strides': strides,
    'padding': pads,
    'rhs_dilation': dilation,
    'feature_group_count': groups,
    'dimension_numbers': NHWC,
    **zeros,
  }
  want = oracle.conv(
    *(x, w, strides, pads),
    rhs_dilation=dilation,
    groups=groups,
    **{k: 0 if z is None else z for k, z in zeros.items()},
  )
  return x, w, options, want


def test_random_geometries_are_exact(isa):
  cases = [c for c in map(_random_case, range(60)) if c is not None]
  assert len(cases) > 30

  @jax.jit
  def program(operands):
    return [
      qk.int8_conv(x, w, **o, implementation='cpu', out_dtype=jnp.int32)
      for (x, w), (_, _, o, _) in zip(operands, cases, strict=True)
    ]

  found = program([(x, w) for x, w, _, _ in cases])
  for got, (x, w, options, want) in zip(found, cases, strict=True):
    np.testing.assert_array_equal(
      got, want, err_msg=f'{x.shape} {w.shape} {options}'
    )


@pytest.mark.parametrize('depthwise', [False, True])
def test_large_images_are_exact(isa, depthwise):
  """Several tasks of one image, several strips, on all threads."""
  rng = np.random.default_rng(0)
  c, n = (72, 72) if depthwise else (24, 200)
  x, w = _codes(rng, 2, 61, 47, c), _codes(rng, 3, 3, 1 if depthwise else c, n)
  options = {
    'window_strides': (2, 1),
    'padding': 'SAME',
    'feature_group_count': c if depthwise else 1,
    'dimension_numbers': NHWC,
  }
  got = qk.int8_conv(x, w, **options, out_dtype=jnp.int32, implementation='cpu')
  # At most 216 products of 2^14: float32 is exact.
  want = jax.lax.conv_general_dilated(
    x.astype(np.float32), w.astype(np.float32), **options
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('code', [-128, 127])
@pytest.mark.parametrize('groups', [1, 70])
def test_extremes_are_exact(isa, code, groups):
  """Sums past 16 bits in each lane, of codes and zero points at their ends."""
  x = np.full((1, 8, 8, 70), code, np.int8)
  w = np.full((7, 7, 70 // groups, 70), -128, np.int8)
  got = qk.int8_conv(
    *(x, w),
    window_strides=(1, 1),
    padding='VALID',
    dimension_numbers=NHWC,
    feature_group_count=groups,
    x_zero=127 if code < 0 else -128,
    w_zero=127,
    out_dtype=jnp.int32,
    implementation='cpu',
  )
  x_term = -255 if code < 0 else 255
  np.testing.assert_array_equal(
    got, np.full((1, 2, 2, 70), 49 * 70 // groups * x_term * -255)
  )


def test_one_spatial_axis():
  rng = np.random.default_rng(0)
  x, w = _codes(rng, 3, 20, 6), _codes(rng, 5, 6, 9)
  got = qk.int8_conv(
    *(x, w),
    window_strides=(2,),
    padding=[(1, 3)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    x_zero=np.int32([-3, 4, 5]),
    out_dtype=jnp.int32,
    implementation='cpu',
  )
  want = oracle.conv(x, w, (2,), [(1, 3)], x_zero=[-3, 4, 5])
  np.testing.assert_array_equal(got, want)


def _conv(x, w, x_scale, w_scale, x_zero=None, *, groups, name='cpu'):
  return qk.int8_conv(
    *(x, w),
    window_strides=(1, 2),
    padding='SAME',
    feature_group_count=groups,
    dimension_numbers=NHWC,
    x_scale=x_scale,
    w_scale=w_scale,
    x_zero=x_zero,
    implementation=name,
  )


def _operands(groups, lead=()):
  rng = np.random.default_rng(7)
  c = 6
  scale = lambda *s: rng.uniform(0.5, 2, s).astype(np.float32)  # noqa: E731
  return (
    _codes(rng, *lead, 3, 5, 6, c),
    _codes(rng, *lead, 3, 3, c // groups, c),
    scale(*lead, 3),
    scale(*lead, c),
    _codes(rng, *lead, 3).astype(np.int32),
  )


@pytest.mark.parametrize('groups', [1, 6])
def test_scaled_results_are_those_of_the_definition_bit_for_bit(isa, groups):
  args = _operands(groups)
  np.testing.assert_array_equal(
    _conv(*args, groups=groups),
    _conv(*args, groups=groups, name='reference'),
  )


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('mapped', [(0,), (0, 2, 4), (1,), (3,), range(5)])
def test_vmap_of_any_operands(mapped, groups):
  one, many = _operands(groups), _operands(groups, (4,))
  args = [many[i] if i in mapped else one[i] for i in range(5)]
  axes = [0 if i in mapped else None for i in range(5)]
  f = functools.partial(_conv, groups=groups)
  got = jax.jit(jax.vmap(f, axes))(*args)
  for i in range(4):
    each = [
      a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)
    ]
    want = _conv(*each, groups=groups, name='reference')
    np.testing.assert_array_equal(got[i], want)


@pytest.mark.parametrize('groups', [1, 6])
def test_gradients_of_the_scales(groups):
  x, w, sx, sw, zx = _operands(groups)

  def loss(sx, sw, name):
    y = _conv(x, w, sx, sw, zx, groups=groups, name=name)
    return (y * y).sum()

  f = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  for got, want in zip(f(sx, sw, 'cpu'), f(sx, sw, 'xla'), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5)
  shared = jax.grad(loss)(0.5, sw, 'cpu')
  np.testing.assert_allclose(shared, jax.grad(loss)(0.5, sw, 'xla'), 1e-5)


def test_shard_map_over_images_and_features(monkeypatch):
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: False)
  if jax.device_count() < 3:
    pytest.skip('fewer than three devices')
  mesh = Mesh(np.array(jax.devices()[:3]), ('d',))
  x, w, sx, sw, _ = _operands(1)
  want = _conv(x, w, sx, sw, groups=1, name='reference')
  f = functools.partial(_conv, groups=1)
  for specs, out in [
    ((P('d'), P(), P('d'), P()), P('d')),
    ((P(), P(None, None, None, 'd'), P(), P('d')), P(None, None, None, 'd')),
  ]:
    run = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)
    np.testing.assert_array_equal(jax.jit(run)(x, w, sx, sw), want)


@pytest.mark.parametrize(
  ('x', 'w', 'options', 'why'),
  [
    ((1, 4, 4, 4, 3), (2, 2, 2, 3, 4), {'window_strides': (1,) * 3}, 'axis'),
    ((1, 5, 5, 3), (3, 3, 3, 4), {'lhs_dilation': (2, 2)}, 'lhs_dilation'),
    ((1, 5, 5, 6), (3, 3, 2, 9), {'feature_group_count': 3}, 'narrower'),
    ((1, 2, 2, 3), (3, 3, 3, 4), {}, 'the output is empty'),
  ],
)
def test_what_it_refuses_runs_on_xla(x, w, options, why):
  rank = len(x) - 2
  axes = 'DHW'[3 - rank :]
  options = {
    'window_strides': (1,) * rank,
    'padding': [(0, 0)] * rank,
    'dimension_numbers': (f'N{axes}C', f'{axes}IO', f'N{axes}C'),
    **options,
  }
  x, w = np.zeros(x, np.int8), np.zeros(w, np.int8)
  (choice,) = qk.choices(qk.int8_conv, x, w, **options)
  assert choice.implementation == 'xla'
  assert why in dict(choice.refusals)['cpu']
  with pytest.raises(ValueError, match=why):
    qk.int8_conv(x, w, **options, implementation='cpu')


def test_the_choice_is_said():
  x, w = np.zeros((1, 5, 5, 8), np.int8), np.zeros((3, 3, 1, 8), np.int8)
  options = {'window_strides': (1, 1), 'padding': 'SAME'}
  (choice,) = qk.choices(
    qk.int8_conv, x, w, **options, dimension_numbers=NHWC, feature_group_count=8
  )
  assert choice.implementation == 'cpu'
  assert 'depthwise' in choice.route
