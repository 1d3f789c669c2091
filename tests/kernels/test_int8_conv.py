"""int8_conv: exact against int64 loops in every geometry and layout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle

import quantlab_kernels as qk
from quantlab_kernels import int_dot
from quantlab_kernels.int8_conv import xla
from quantlab_kernels.int8_conv.specs import SPECS

NHWC = ('NHWC', 'HWIO', 'NHWC')


class Geometry(NamedTuple):
  """One convolution, channels last."""

  x: tuple
  w: tuple
  strides: tuple
  pads: tuple
  lhs_dilation: tuple | None = None
  rhs_dilation: tuple | None = None
  groups: int = 1


NONE2, ONE2 = ((0, 0), (0, 0)), ((1, 1), (1, 1))
GEOMETRIES = {
  'same': Geometry((2, 7, 6, 3), (3, 3, 3, 5), (1, 1), ONE2),
  'strided': Geometry((2, 8, 7, 3), (3, 3, 3, 4), (2, 3), ((0, 1), (2, 0))),
  'pointwise': Geometry((3, 4, 5, 6), (1, 1, 6, 7), (1, 1), NONE2),
  'pointwise_strided': Geometry((1, 5, 5, 6), (1, 1, 6, 4), (2, 2), NONE2),
  'patches': Geometry((2, 8, 8, 3), (4, 4, 3, 5), (4, 4), NONE2),
  'one_place': Geometry((1, 3, 3, 4), (3, 3, 4, 1), (1, 1), NONE2),
  'uneven': Geometry((2, 6, 7, 2), (2, 5, 2, 3), (1, 2), ((1, 0), (0, 3))),
  'cropped': Geometry((2, 7, 7, 2), (3, 3, 2, 3), (1, 1), ((-1, 0), (1, -2))),
  'dilated': Geometry(
    *((2, 9, 8, 2), (3, 2, 2, 3), (1, 1), ((2, 2), (1, 0))),
    rhs_dilation=(2, 3),
  ),
  'transposed': Geometry(
    *((2, 4, 3, 2), (3, 3, 2, 3), (1, 1), ((2, 1), (1, 2))),
    lhs_dilation=(2, 3),
  ),
  'grouped': Geometry((2, 6, 5, 6), (3, 3, 2, 9), (1, 2), ONE2, groups=3),
  'depthwise': Geometry((2, 7, 6, 5), (3, 3, 1, 5), (1, 1), ONE2, groups=5),
  'depthwise_strided_multiplied': Geometry(
    *((2, 7, 6, 4), (3, 2, 1, 12), (2, 1), ((1, 0), (1, 1))),
    rhs_dilation=(1, 2),
    groups=4,
  ),
  'depthwise_of_many_taps': Geometry(
    *((1, 9, 10, 3), (8, 9, 1, 3), (1, 1), ((1, 1), (0, 1))), groups=3
  ),
  'one_axis': Geometry((2, 9, 3), (4, 3, 5), (2,), ((1, 2),)),
  'three_axes': Geometry(
    *((1, 4, 5, 3, 2), (2, 3, 2, 2, 3), (1, 2, 1)),
    ((1, 0), (1, 1), (0, 1)),
  ),
  'no_axis': Geometry((3, 4), (4, 5), (), ()),
}


def _codes(shape, seed=0):
  return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def _geometry(name):
  """Returns codes, int8_conv's arguments, and the oracle's."""
  g = GEOMETRIES[name]
  axes = 'DHW'[5 - len(g.x) :]
  kw = {
    'window_strides': g.strides,
    'padding': g.pads,
    'lhs_dilation': g.lhs_dilation,
    'rhs_dilation': g.rhs_dilation,
    'feature_group_count': g.groups,
    'dimension_numbers': (f'N{axes}C', f'{axes}IO', f'N{axes}C'),
  }
  want = {
    'lhs_dilation': g.lhs_dilation,
    'rhs_dilation': g.rhs_dilation,
    'groups': g.groups,
  }
  return _codes(g.x), _codes(g.w, 1), kw, (g.strides, g.pads), want


@pytest.mark.parametrize('name', sorted(GEOMETRIES))
def test_every_geometry_is_exact(name):
  x, w, kw, args, want_kw = _geometry(name)
  zw = np.random.default_rng(2).integers(-128, 128, w.shape[-1])
  zeros = [{}, {'x_zero': 37}, {'w_zero': zw}, {'x_zero': -128, 'w_zero': zw}]

  @jax.jit
  def program(x, w, zeros):
    return [qk.int8_conv(x, w, **kw, **z, out_dtype=jnp.int32) for z in zeros]

  for got, zero in zip(program(x, w, zeros), zeros, strict=True):
    want = oracle.conv(x, w, *args, **want_kw, **zero)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', ['same', 'strided', 'grouped', 'depthwise'])
def test_the_reference_is_exact(name):
  x, w, kw, args, want_kw = _geometry(name)
  zx, zw = np.array([3, -128]), np.arange(w.shape[-1])
  got = qk.int8_conv(
    *(x, w),
    **kw,
    x_zero=zx,
    w_zero=zw,
    out_dtype=jnp.int32,
    implementation='reference',
  )
  want = oracle.conv(x, w, *args, **want_kw, x_zero=zx, w_zero=zw)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', ['same', 'depthwise', 'transposed', 'cropped'])
def test_each_image_may_have_its_zero_point(name):
  x, w, kw, args, want_kw = _geometry(name)
  zx = np.array([-128, 99])
  f = functools.partial(qk.int8_conv, **kw, out_dtype=jnp.int32)
  got = jax.jit(f)(x, w, x_zero=zx)
  want = oracle.conv(x, w, *args, **want_kw, x_zero=zx)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('code', [-128, 127])
@pytest.mark.parametrize('groups', [1, 40])
def test_extremes_are_exact(code, groups):
  x = np.full((1, 6, 6, 40), code, np.int8)
  w = np.full((5, 5, 40 // groups, 40), -128, np.int8)
  got = qk.int8_conv(
    *(x, w),
    window_strides=(1, 1),
    padding='VALID',
    dimension_numbers=NHWC,
    feature_group_count=groups,
    out_dtype=jnp.int32,
  )
  np.testing.assert_array_equal(
    got, np.full((1, 2, 2, 40), 25 * 40 // groups * code * -128)
  )


@pytest.mark.parametrize(
  'dn', [None, ('NCHW', 'IOHW', 'CHWN'), ('CWNH', 'OHWI', 'NHWC')]
)
@pytest.mark.parametrize('padding', ['SAME', 'SAME_LOWER', 'VALID'])
def test_layouts_and_named_padding_are_those_of_lax(dn, padding):
  lhs, rhs, _ = dn or ('NCHW', 'OIHW', 'NCHW')
  size = {'N': 2, 'C': 3, 'H': 7, 'W': 6}
  x = _codes([size[c] for c in lhs])
  w = _codes([{'O': 4, 'I': 3, 'H': 3, 'W': 2}[c] for c in rhs], 1)
  kw = {'window_strides': (2, 1), 'padding': padding, 'rhs_dilation': (1, 2)}
  got = qk.int8_conv(x, w, dimension_numbers=dn, out_dtype=jnp.int32, **kw)
  # float32 is exact here: 18 products of at most 2^14 each.
  want = jax.lax.conv_general_dilated(
    x.astype(np.float32), w.astype(np.float32), dimension_numbers=dn, **kw
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', ['same', 'grouped'])
@pytest.mark.parametrize('most', [1, 200, 10**9])
def test_walking_images_changes_nothing(name, most, monkeypatch):
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)
  monkeypatch.setattr(xla, 'WHOLE_BYTES', most)
  monkeypatch.setattr(xla, 'WALK_BYTES', 10 * most)
  x, w, kw, args, want_kw = _geometry(name)
  x = np.concatenate([x, x[::-1], x])
  zw = np.arange(w.shape[-1])
  f = functools.partial(qk.int8_conv, **kw, out_dtype=jnp.int32)
  got = jax.jit(f)(x, w, w_zero=zw)
  want = oracle.conv(x, w, *args, **want_kw, w_zero=zw)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  'name',
  ['resnet20_stage3', 'mobilenet025_dw7', 'mobilenet025_pw7', 'lenet5_conv1'],
)
def test_shapes_of_real_models(name):
  spec = SPECS[name]
  x, w = _codes((2, *spec.x[1:])), _codes(spec.w, 1)
  kw = {
    'window_strides': spec.strides,
    'padding': spec.padding,
    'feature_group_count': spec.groups,
    'dimension_numbers': NHWC,
  }
  got = jax.jit(lambda x, w: qk.int8_conv(x, w, **kw, out_dtype=jnp.int32))(
    x, w
  )
  # Fewer than 1024 products of at most 2^14 each: float32 is exact.
  want = jax.lax.conv_general_dilated(
    x.astype(np.float32), w.astype(np.float32), **kw
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_scales(implementation):
  x, w, kw, args, want_kw = _geometry('same')
  rng = np.random.default_rng(3)
  sx = rng.uniform(0.1, 2, (2, 1, 1, 1)).astype(np.float32)
  sw = rng.uniform(0.1, 2, 5).astype(np.float32)
  got = qk.int8_conv(
    x, w, **kw, x_scale=sx, w_scale=sw, implementation=implementation
  )
  want = oracle.conv(x, w, *args, **want_kw) * np.float64(sx) * sw
  np.testing.assert_allclose(got, want, rtol=3e-7)
  half = qk.int8_conv(x, w, **kw, x_scale=0.5, out_dtype=jnp.bfloat16)
  assert half.dtype == jnp.bfloat16


def test_transforms_and_gradients():
  x, w, kw, args, want_kw = _geometry('same')
  f = lambda x, s: qk.int8_conv(x, w, x_scale=s, **kw)  # noqa: E731
  want = oracle.conv(x, w, *args, **want_kw)
  xs = np.stack([x, x[::-1]])
  s = jnp.float32([1.0, 0.5])
  half = np.stack([want, want[::-1] / 2])
  np.testing.assert_array_equal(jax.jit(jax.vmap(f))(xs, s), half)
  _, scanned = jax.lax.scan(lambda c, t: (c, f(*t)), 0, (xs, s))
  np.testing.assert_array_equal(scanned, half)
  got = jax.grad(lambda s: f(x, s).sum())(1.0)
  np.testing.assert_allclose(got, want.sum(), rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', ['same', 'depthwise'])
def test_scales_that_are_not_finite_are_not_hidden(bad, name):
  x, w, kw, _, _ = _geometry(name)
  x[0] = 0
  sx, sw = np.ones(2, np.float32), np.ones(w.shape[-1], np.float32)
  sx[0] = sw[2] = bad
  y = np.asarray(qk.int8_conv(x, w, **kw, x_scale=sx, w_scale=sw))
  assert not np.isfinite(y[0]).any()
  assert not np.isfinite(y[..., 2]).any()
  assert np.isfinite(np.delete(y[1], 2, -1)).all()


@pytest.mark.parametrize(
  ('x', 'w'),
  [
    ((0, 5, 5, 3), (3, 3, 3, 4)),
    ((2, 5, 5, 0), (3, 3, 0, 4)),
    ((2, 5, 5, 3), (3, 3, 3, 0)),
    ((2, 2, 5, 3), (3, 3, 3, 4)),
  ],
)
def test_empty_axes_are_valid(x, w):
  kw = {'window_strides': (1, 1), 'padding': 'VALID', 'dimension_numbers': NHWC}
  want = jax.eval_shape(
    lambda x, w: jax.lax.conv_general_dilated(x, w, **kw),
    np.zeros(x, np.float32),
    np.zeros(w, np.float32),
  )
  y = qk.int8_conv(_codes(x), _codes(w), **kw, x_zero=3)
  np.testing.assert_array_equal(y, np.zeros(want.shape))


def test_errors_say_what_was_expected():
  x, w = _codes((2, 5, 5, 4)), _codes((3, 3, 4, 6))
  kw = {'window_strides': (1, 1), 'padding': 'SAME', 'dimension_numbers': NHWC}
  with pytest.raises(TypeError, match='xq must be int8'):
    qk.int8_conv(x.astype(np.float32), w, **kw)
  with pytest.raises(ValueError, match='feature_group_count=2 does not fit'):
    qk.int8_conv(x, w, feature_group_count=2, **kw)
  with pytest.raises(ValueError, match='w_scale has shape'):
    qk.int8_conv(x, w, w_scale=np.ones(5), **kw)
  with pytest.raises(ValueError, match='must be 2 positive integers'):
    qk.int8_conv(x, w, **{**kw, 'window_strides': (1, 0)})
  with pytest.raises(ValueError, match=r'must be 2 \(low, high\) pairs'):
    qk.int8_conv(x, w, **{**kw, 'padding': [(1, 1)]})
  with pytest.raises(ValueError, match='needs lhs_dilation 1'):
    qk.int8_conv(x, w, lhs_dilation=(2, 2), **kw)
